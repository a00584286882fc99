"""Group the neurons of an FFN into experts by what they compute on the calibration text, and fit the router that chooses among them.

The energy of a neuron at a token is the squared length of what it adds to the FFN's output. Neurons are grouped so that the experts that run have as
much of it as possible, and the router is a ridge regression from the FFN's input to the logarithm of each expert's energy.
MoEfication (Zhang et al. 2022, arXiv 2110.01786) groups by weights, and CMoE (Pei et al. 2025, arXiv 2502.04416) by how often a neuron is active.
"""
# N = tokens, M = hidden width, F = neurons, E = experts with a router, S = shares of the shared expert, K = experts chosen for a token, W = windows.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effconvert.surgery._ridge import HELD_OUT, TINY, Moments, ridge

ROUNDS = 6  # of grouping neurons and choosing experts; in the second half the router chooses
PRICES = 400  # most steps towards groups of one size


@dataclass(frozen=True)
class Sample:
    """Tokens of an FFN."""

    inputs: Sequence[Tensor]  # of each window, [T, M]
    energy: Tensor  # of each neuron at each token, [N, F]


@dataclass(frozen=True)
class Split:
    """Which neurons go where."""

    shared: Tensor  # numbers of the neurons that always run, [S * F/(E + S)]
    routed: Tensor  # those of each expert, [E, F/(E + S)]
    router: Tensor  # its weights, [E, M]


def in_order(neurons: int, experts: int, shared: int, width: int) -> Split:
    """Split neurons as they come, behind a router of zeros: for experts that all run."""
    order = torch.arange(neurons)
    first = shared * neurons // (experts + shared)
    return Split(order[:first], order[first:].unflatten(0, (experts, -1)), torch.zeros(experts, width))


def by_energy(sample: Sample, experts: int, shared: int, chosen: int) -> Split:
    """Split neurons so that the experts that run for a token have the most energy.

    In turns, experts are chosen for each token, and each neuron goes to the expert that runs where the neuron has the most energy. The shared expert
    runs for all tokens.
    """
    energy = sample.energy
    groups = _alike(energy, experts, shared)
    for turn in range(ROUNDS):
        sums = _sums(energy, groups, experts)
        scores = sums if turn < ROUNDS // 2 else torch.cat(list(sample.inputs)) @ _router(sample, sums).T
        runs = torch.cat([_best(scores, chosen), energy.new_ones(len(energy), shared)], 1)  # [N, E + S]
        captured = energy.T @ runs
        groups = _balanced(captured / captured.mean().clamp_min(TINY)).clamp_max(experts)
    router = _router(sample, _sums(energy, groups, experts))
    places = [torch.nonzero(groups == expert).flatten().cpu() for expert in range(experts + 1)]
    return Split(places[-1], torch.stack(places[:-1]), router.float().cpu())


def _alike(energy: Tensor, experts: int, shared: int) -> Tensor:
    """Return a group for each neuron: the most energetic ones are shared (group E), the others in E groups that are active together."""
    neurons = energy.shape[1]
    groups = torch.full((neurons,), experts, device=energy.device)
    rest = energy.mean(0).argsort(descending=True)[shared * neurons // (experts + shared) :]
    rows = torch.nn.functional.normalize(energy[:, rest].sqrt().T, dim=1)  # [F', N]
    centres = rows[torch.linspace(0, len(rest) - 1, experts).long()]
    for _ in range(ROUNDS):
        where = _balanced(rows @ centres.T)
        centres = torch.nn.functional.normalize(torch.stack([rows[where == expert].mean(0) for expert in range(experts)]), dim=1)
    groups[rest] = where
    return groups


def _balanced(gain: Tensor) -> Tensor:
    """Assign rows to columns, equally many to each, with nearly the greatest total gain: gain [F, C] -> column of each row, [F].

    A price for each column rises while too many rows want it; the few that are left over go where they lose least.
    """
    rows, columns = gain.shape
    size, price, spread = rows // columns, gain.new_zeros(columns), gain.std()
    for step in range(PRICES):
        excess = torch.bincount((gain - price).argmax(1), minlength=columns) - size
        if excess.abs().max() <= 2:
            break
        price = price + spread * (excess / size) / (1 + 0.3 * step) ** 0.7
    net = gain - price
    where = net.argmax(1)
    while ((counts := torch.bincount(where, minlength=columns)) > size).any():
        best = torch.where(counts < size, net, -torch.inf).max(1)
        loss = net.gather(1, where[:, None])[:, 0] - best.values
        row = torch.where(counts[where] > size, loss, torch.inf).argmin()
        where[row] = best.indices[row]
    return where


def _sums(energy: Tensor, groups: Tensor, experts: int) -> Tensor:
    """Return the energy of each expert at each token, [N, E]."""
    return energy @ torch.nn.functional.one_hot(groups, experts + 1)[:, :experts].to(energy)


def _best(scores: Tensor, chosen: int) -> Tensor:
    """Return 1 for the `chosen` experts with the highest scores of each token, else 0: [N, E]."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(chosen, 1).indices, 1.0)


def _router(sample: Sample, sums: Tensor) -> Tensor:
    """Fit weights [E, M] to the logarithm of each expert's energy, less its mean over experts."""
    target = sums.clamp_min(TINY).log()
    target = target - target.mean(1, keepdim=True)
    moments = (Moments(), Moments())
    for index, (inputs, wanted) in enumerate(zip(sample.inputs, target.split([len(window) for window in sample.inputs]), strict=True)):
        moments[int((index + 1) % HELD_OUT == 0)].add(inputs, wanted)
    fitted = ridge(*moments)
    return torch.zeros_like(sums[:1]).T @ sample.inputs[0][:1] if fitted is None else fitted.to(sums)
