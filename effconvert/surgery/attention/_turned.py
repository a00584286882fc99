"""Fit queries and keys that RoPE turns to the scores of attention that reads positions in its inputs.

A score of the original knows both tokens and both positions; here it is a sum over pairs of numbers, each turned by the distance. Queries and keys are
fitted in turn, each by least squares on the scores with the others fixed, from those of the original on. Both have a bias, and so a part that knows the
distance alone. The inputs are those of the converted layers below, the scores those of the original on its own inputs.
"""
# B = windows run at a time, T = tokens, M = hidden width, H = heads, D = head width.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.surgery._regression import AttentionWindow, Keys, Queries, Rotation, by_head, solve
from effconvert.surgery._ridge import TINY

if TYPE_CHECKING:
    from effconvert.surgery._surgery import ForwardProtocol

ROUNDS = 3  # of queries, then keys


def fit_scores(layer: Layer, theta: float, layout: str) -> None:
    """Fit q and k of a layer, with their biases; RoPE will turn all of a head, by the base `theta`, its pairs laid out as `layout`."""
    heads, windows = layer.config.heads, _windows(layer)
    rotation = turning(max(len(window.inputs) for window in windows), layer.config.head_dim, theta, layout, windows[0].inputs.device)

    def turned(weights: Tensor) -> list[Tensor]:
        return [rotation(by_head(window.inputs @ weights.T, heads)) for window in windows]

    queries, keys = (torch.cat([layer[part], layer[f"{part}.bias"][:, None]], 1).to(windows[0].inputs) for part in ("q", "k"))
    for _ in range(ROUNDS):
        queries = solve(Queries(windows, turned(keys), rotation, heads), queries)
        keys = solve(Keys(windows, turned(queries), rotation, heads), keys)
    for part, weights in (("q", queries), ("k", keys)):
        layer[part], layer[f"{part}.bias"] = weights[:, :-1].cpu(), weights[:, -1].cpu()


def fit_norm(forward: ForwardProtocol, table: Tensor) -> dict[str, Tensor]:
    """Fit what stays of positions, [M] each: their mean on the calibration text, and the gain and the bias of the embeddings' LayerNorm behind it.

    The norm divides by the deviation of what it gets, to which positions added. Each of its numbers is fitted by itself to the original's embeddings.
    """
    tokens = torch.cat([batch.flatten() for batch in forward.ids]).cpu()
    mean = torch.stack([len(batch) * table[: batch.shape[1]].sum(0) for batch in forward.ids]).sum(0) / len(tokens)
    known, numbers = tokens.unique(return_inverse=True)
    rows = forward.table_rows("embed", known) + (mean + forward.outer["types"][0] if "types" in forward.outer else mean)
    inputs = torch.nn.functional.layer_norm(rows, mean.shape, eps=forward.config.get("layer_norm_eps") or 1e-12).double()[numbers]  # [N, M]
    targets = torch.cat([state.flatten(0, 1).cpu().double() for state in forward.begin(len(tokens))])
    middle = inputs - inputs.mean(0)
    gain = (middle * targets).sum(0) / middle.square().sum(0).clamp_min(TINY)
    return {"mean": mean, "gain": gain.float(), "bias": (targets.mean(0) - gain * inputs.mean(0)).float()}


def turning(tokens: int, width: int, theta: float, layout: str, device: torch.device | None = None) -> Rotation:
    """Return the rotation of all numbers of a head by the position."""
    turns = angles(tokens, width, theta)
    return Rotation(torch.polar(torch.ones_like(turns), turns).to(device, torch.complex64), width, layout, width)


def angles(tokens: int, width: int, theta: float) -> Tensor:
    """Return the angle by which each pair of a head turns at each position, [T, P] in float64."""
    return torch.arange(tokens).double()[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)


def _windows(layer: Layer) -> list[AttentionWindow]:
    """Return what q and k read here, which ends in 1, and the original's attention: its weights in half precision, queries, keys and output."""
    assert layer.activations
    windows = []
    originals = layer.activations.original([layer.originals[0]], ("o",), until="o")
    for own, theirs in zip(layer.activations.capture(layer.unchanged, ("q",), until="q"), originals, strict=True):
        inputs = torch.cat([own.inputs["q"], torch.ones_like(own.inputs["q"][..., :1])], -1)
        windows += [AttentionWindow(*parts) for parts in zip(inputs, theirs.weights.half(), theirs.query, theirs.key, theirs.outputs["o"], strict=True)]
    return windows
