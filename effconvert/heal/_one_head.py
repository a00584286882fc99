"""Refit the one head of keys and values that stands in place of a layer's attention: queries, then outputs and values, to what the original's layer does."""
# T = tokens, M = hidden width, H = query heads, N = pairs that RoPE turns, R = other numbers.

from collections.abc import Sequence

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.replaced import OWN
from effconvert.heal._regression import AttentionWindow, Queries, Rotation, Values, by_head, mixtures, solve
from effconvert.surgery._ridge import HELD_OUT, Moments, ridge

PREFIX = f"attention.{OWN}"
PARTS = tuple(f"{PREFIX}{name}" for name in ("q", "q_bias", "kv", "kv_bias", "o", "o_bias"))
NEGLIGIBLE = 1e-5  # relative error below which there is nothing to heal


def refit_head(layer: Layer, original: int) -> None:
    """Fit q to the scores of the original's layer, then o and the values to its attention's output, on the same inputs."""
    windows = _windows(layer, original)
    if _relative_error(layer, windows) < NEGLIGIBLE:
        return
    rank = layer[f"{PREFIX}o"].shape[1] // layer.config.heads
    _fit_queries(layer, windows)
    _attend_anew(layer, windows)
    _fit_output(layer, windows, rank)
    if layer[f"{PREFIX}q"].shape[0] // layer.config.heads + rank == len(layer[f"{PREFIX}kv"]):  # else values are keys too
        latents = _with_bias(layer, "kv")
        values = Values(windows, layer[f"{PREFIX}o"].to(windows[0].inputs), layer.config.heads, 1)
        fitted = solve(values, latents[len(latents) - rank :].to(windows[0].inputs))
        _assign(layer, "kv", torch.cat([latents[: len(latents) - rank], fitted.cpu()]))
        _fit_output(layer, windows, rank)


def _windows(layer: Layer, original: int) -> list[AttentionWindow]:
    """Return each window inside the original's attention, on this layer's inputs."""
    assert layer.activations
    windows: list[AttentionWindow] = []
    bias = layer[f"{PREFIX}o_bias"]
    own = next(iter(layer.activations.capture(layer, until="attention")))
    for capture in layer.activations.original([original], ("q", "o"), until="o"):
        assert capture.query is not None
        assert capture.key is not None
        assert capture.weights is not None
        assert capture.scaling
        assert own.scaling
        inputs, targets = _with_ones(capture.inputs["q"]), capture.outputs["o"] - bias.to(capture.outputs["o"])
        queries = capture.query * (capture.scaling / own.scaling)
        windows += [AttentionWindow(*parts) for parts in zip(inputs, capture.weights.half(), queries, capture.key, targets, strict=True)]
    return windows


def _relative_error(layer: Layer, windows: Sequence[AttentionWindow]) -> float:
    """Return the distance of attention's output from its targets, relative to their norm."""
    assert layer.activations
    captures = layer.activations.capture(layer, ("attention",), until="attention")
    outputs = torch.cat([capture.outputs["attention"] for capture in captures]) - layer[f"{PREFIX}o_bias"].to(windows[0].target)
    error = sum(float((output - window.target).square().sum()) for output, window in zip(outputs, windows, strict=True))
    return float((error / max(sum(float(window.target.square().sum()) for window in windows), 1e-30)) ** 0.5)


def _fit_queries(layer: Layer, windows: Sequence[AttentionWindow]) -> None:
    assert layer.activations
    heads, weights = layer.config.heads, _with_bias(layer, "q").to(windows[0].inputs)
    width = len(weights) // heads  # without what `Attending.attend` pads
    pairs = len(layer[f"{PREFIX}pairs"]) if f"{PREFIX}pairs" in layer else 0
    keys: list[Tensor] = []
    rotation: Rotation | None = None
    for capture in layer.activations.capture(layer, until="attention"):
        assert capture.query is not None
        assert capture.key is not None
        if rotation is None:
            before = torch.stack([by_head(window.inputs @ weights.T, heads) for window in windows[: len(capture.query)]])
            rotation = Rotation.estimate(before, capture.query[..., :width], 2 * pairs, "halves")
        keys += capture.key[..., :width]
    if rotation:
        _assign(layer, "q", solve(Queries(windows, keys, rotation, heads), weights).cpu())


def _attend_anew(layer: Layer, windows: Sequence[AttentionWindow]) -> None:
    """Replace the original's attention weights in the windows by the layer's own."""
    assert layer.activations
    weights = (weights for capture in layer.activations.capture(layer, until="attention") for weights in capture.weights)
    for window, own in zip(windows, weights, strict=True):
        window.weights.copy_(own)


def _fit_output(layer: Layer, windows: Sequence[AttentionWindow], rank: int) -> None:
    """Ridge regression of the output projection."""
    moments, weights = (Moments(), Moments()), layer[f"{PREFIX}o"]
    values, outputs = _with_bias(layer, "kv")[-rank:].to(windows[0].inputs), weights.to(windows[0].inputs)
    for index, window in enumerate(windows):
        mixed = mixtures(window, values, layer.config.heads, 1)
        moments[int((index + 1) % HELD_OUT == 0)].add(mixed, window.target - mixed @ outputs.T)
    if (change := ridge(*moments)) is not None:
        layer[f"{PREFIX}o"] = weights + change.float().cpu()


def _with_bias(layer: Layer, name: str) -> Tensor:
    """Return weights with the bias as a last column."""
    return torch.cat([layer[PREFIX + name], layer[f"{PREFIX}{name}_bias"][:, None]], 1)


def _assign(layer: Layer, name: str, weights: Tensor) -> None:
    layer[PREFIX + name], layer[f"{PREFIX}{name}_bias"] = weights[:, :-1].float(), weights[:, -1].float()


def _with_ones(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
