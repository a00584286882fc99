"""Filters as a function of the lag: a small network of sines, times a window that falls with the distance."""
# F = filters, E = numbers that describe a lag, W = width of the network, n = lags.

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

OCTAVES = 16  # of periods that describe a lag: 2, 4, ... tokens
WIDTH = 64
SPEED = 3.0  # of the sines' arguments
REACHES = tuple(2.0**power for power in range(13))  # tokens in which a window may fall to 1/e
RIDGE = 1e-4  # of the mean of the Gram matrix's diagonal
TINY = 1e-30  # least ridge, where there is one lag alone


def shapes(filters: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters of some filters."""
    network = {"first": (WIDTH, 2 * OCTAVES + 2), "first_bias": (WIDTH,), "second": (WIDTH, WIDTH), "second_bias": (WIDTH,), "last": (filters, WIDTH)}
    return {**network, "fall": (filters,), "own": (filters,)}


def initial(filters: int, index: int) -> dict[str, Tensor]:
    """Return a random network, filters that are 0, and windows that reach 32 tokens."""
    draw, values = torch.Generator().manual_seed(index), {}
    for name, shape in shapes(filters).items():
        values[name] = torch.zeros(shape)
        if name.startswith(("first", "second")):
            spread = SPEED * shape[-1] ** -0.5 if len(shape) > 1 else math.pi
            values[name] = (spread * torch.randn(shape, generator=draw)).bfloat16().float()  # the same network in every type, as the rest is fitted to it
    return {**values, "fall": torch.full((filters,), math.log(math.expm1(1 / 32)))}


def taps(weights: Mapping[str, Tensor], lags: Tensor, rows: slice = slice(None)) -> Tensor:
    """Return some filters at these lags, [F, n]: the network times the window, and at lag 0 a number of its own."""
    network = {name: weight.float() for name, weight in weights.items()}
    last, fall, own = (network[name][rows] for name in ("last", "fall", "own"))
    return linear(last, _features(network, lags)) * (-softplus(fall)[:, None] * lags.abs()).exp() + own[:, None] * (lags == 0)


def fitted(weights: Mapping[str, Tensor], target: Tensor, lags: Tensor) -> dict[str, Tensor]:
    """Return the parameters whose filters come closest to `target` [F, n], by least squares for each of some windows; at lag 0 they are equal.

    The network's insides stay as they are.
    """
    features, target, own = _features(weights, lags).double(), target.double(), lags == 0
    best = torch.full((len(target),), torch.inf).double()
    last, fall = weights["last"].double(), weights["fall"].double()
    for reach in REACHES:
        inputs = (features * (-lags.abs() / reach).exp()[:, None])[~own]  # [n - 1, W]
        gram = inputs.mT @ inputs
        gram += RIDGE * gram.diagonal().mean().clamp_min(TINY) * torch.eye(len(gram)).double()
        solution = torch.linalg.solve(gram, inputs.mT @ target[:, ~own].mT).mT  # [F, W]
        error = (solution @ inputs.mT - target[:, ~own]).square().sum(1)
        better = error < best
        best, last = torch.where(better, error, best), torch.where(better[:, None], solution, last)
        fall = torch.where(better, math.log(math.expm1(1 / reach)), fall)
    left = target[:, own] - last @ features[own].mT
    return {**weights, "last": last.float(), "own": left[:, 0].float(), "fall": fall.float()}


def _features(weights: Mapping[str, Tensor], lags: Tensor) -> Tensor:
    """Return what the network has in its last hidden layer for each lag, [n, W]."""
    distance = lags.abs().float()
    angle = 2 * math.pi * distance[:, None] / 2.0 ** torch.arange(1, OCTAVES + 1, device=lags.device)
    described = torch.cat([angle.sin(), angle.cos(), distance.log1p()[:, None], lags.sign().float()[:, None]], 1)  # [n, E]
    inner = linear(described, weights["first"], weights["first_bias"]).sin()
    return linear(inner, weights["second"], weights["second_bias"]).sin()
