"""Refit one layer: gather what the original and the converted layer are on the same inputs, and solve."""
# B = windows run at a time, T = tokens, M = hidden width, H = query heads, Hk = KV heads, G = KV heads after, D = head width.

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.heal._layerwise import Capture, silenced
from effconvert.heal._regression import Attended, Queries, Turn, Values, by_head, solve
from effconvert.surgery._ridge import HELD_OUT, Moments, ridge

SAME = 1e-5  # of the size of an output: nearer than this there is nothing to heal


def refit_attention(layer: Layer, original: int) -> None:
    """Fit q to the scores of the original's layer, then v and o to what its attention gives, where the families' attention allows it."""
    assert layer.activations
    if "o" not in layer:
        return
    bias = layer["o.bias"] if "o.bias" in layer else torch.zeros(layer.config.hidden)
    wanted, windows = _original(layer, original, bias)
    if _far(layer, wanted, bias) < SAME:
        return
    if windows:
        _queries(layer, windows)
        for window, weights in zip(windows, _attention(layer), strict=True):
            window.weights.copy_(weights)  # use the converted layer's attention weights from here on
        _output(layer, wanted)
        _values(layer, windows)
    _output(layer, wanted)


def refit_output(layer: Layer, originals: Sequence[int]) -> None:
    """Fit the MLP's output to what layers of the original, of which this one alone is left, would have made of the same inputs."""
    assert layer.activations
    if "down" not in layer or "mlp_post_norm" in layer:
        return  # what comes after the norm is not linear in the weights before it
    _fit(layer, layer, "down", [look.out for look in layer.activations.original(originals)])


def refit_stream(layer: Layer, part: str, step: int) -> None:
    """Fit what writes to the stream, o or down, so that there is after it what there is in the original at `step`, however other the layers below are.

    What comes after a norm is not linear in the weights before it, and stays.
    """
    assert layer.activations
    if part not in layer or layer.config.norms_stream or {"o": "attn_post_norm", "down": "mlp_post_norm"}[part] in layer:
        return
    alone = silenced(layer, "ffn") if part == "o" else layer  # up to this part of the layer
    _fit(layer, alone, part, layer.activations.own(step))


def _fit(layer: Layer, alone: Layer, part: str, wanted: Sequence[Tensor]) -> None:
    """Ridge regression of what a part writes to the stream, so that there is `wanted` [B, T, M] after `alone`, the layer or a half of it."""
    assert layer.activations
    factor, moments = _factor(alone, part), (Moments(), Moments())
    for index, (look, want) in enumerate(zip(layer.activations.capture(alone, (part,)), wanted, strict=True)):
        for row, (inputs, missing) in enumerate(zip(_read(look, part), (want - look.out) / factor, strict=True)):
            moments[_held(index, row, wanted)].add(inputs, missing)
    if (change := ridge(*moments)) is not None:
        layer[part] = layer[part] + change.float().cpu()


def _factor(layer: Layer, part: str) -> float:
    """Return what a part's output is multiplied by before it is added: 1 but in families with a multiplier of the residual, such as Granite."""
    assert layer.activations
    weights, outs = layer[part], []
    for tried in (torch.zeros_like(weights), weights):
        changed = layer.on_top(layer.index, layer.config)
        changed[part] = tried
        look = next(layer.activations.capture(changed, (part,)))
        outs.append(look.out)
    made = _read(look, part) @ weights.to(look.out).T
    return float(((outs[1] - outs[0]) * made).sum() / made.square().sum()) if made.any() else 1.0


def _read(look: Capture, part: str) -> Tensor:
    """Return what the module of a part read, [B, T, ...]: the MLP of OPT knows no windows."""
    return look.inputs[part].reshape(*look.state.shape[:2], -1)


def _output(layer: Layer, wanted: Sequence[Tensor]) -> None:
    """Ridge regression of the output projection."""
    assert layer.activations
    moments, weights = (Moments(), Moments()), layer["o"]
    for index, (look, want) in enumerate(zip(layer.activations.capture(layer, ("o",), until="o"), wanted, strict=True)):
        for row, (inputs, given) in enumerate(zip(look.inputs["o"], want, strict=True)):
            moments[_held(index, row, wanted)].add(inputs, given - inputs @ weights.to(inputs).T)
    if (change := ridge(*moments)) is not None:
        layer["o"] = weights + change.float().cpu()


def _queries(layer: Layer, windows: Sequence[Attended]) -> None:
    assert layer.activations
    keys: list[Tensor] = []
    turn: Turn | None = None
    for look in layer.activations.capture(layer, ("q", "o"), until="o"):
        if not keys and (turn := _turn(layer, look)) is None:
            return
        keys += _given(look.key)
    assert turn
    _assign(layer, "q", solve(Queries(windows, keys, turn, layer.config.heads), _augmented(layer, "q").to(keys[0])))


def _values(layer: Layer, windows: Sequence[Attended]) -> None:
    heads, outputs = layer.config.heads, layer["o"].to(windows[0].read)
    _assign(layer, "v", solve(Values(windows, outputs, heads, layer.config.kv_heads), _augmented(layer, "v").to(outputs)))


def _original(layer: Layer, original: int, bias: Tensor) -> tuple[list[Tensor], list[Attended]]:
    """Return what the original's attention gives, [B, T, M] without the bias of o, and its windows; of these none, where it has other heads than this layer."""
    assert layer.activations
    wanted: list[Tensor] = []
    windows: list[Attended] = []
    room = torch.empty(0)
    used = 0
    mine = layer.activations.capture(layer, ("q", "o"), until="o")
    for look, own in zip(layer.activations.original([original], ("o",), until="o"), mine, strict=True):
        wanted.append(look.outputs["o"] - bias.to(look.outputs["o"]))
        if look.weights is None or own.weights is None or _given(look.query).shape != _given(own.query).shape:
            continue
        if not len(room):  # one block for all: among smaller ones the allocator would lose more memory than they take
            room = look.weights.new_empty(look.weights.shape[1] * layer.activations.scores, dtype=torch.half)
        mixed = room[used : used + look.weights.numel()].view(look.weights.shape).copy_(look.weights)
        used += mixed.numel()
        read = _ending_in_one(own.inputs["q"], layer)
        windows += [Attended(*parts) for parts in zip(read, mixed, _given(look.query), _given(look.key), wanted[-1], strict=True)]
    return wanted, windows


def _attention(layer: Layer) -> Iterator[Tensor]:
    """Yield the weights of attention for each window, [H, T, T] in half precision."""
    assert layer.activations
    for look in layer.activations.capture(layer, ("o",), until="o"):
        yield from _given(look.weights).half()


def _turn(layer: Layer, look: Capture) -> Turn | None:
    """Find what the family does to queries between their projection and the scores; None where that is no rotation."""
    config, weights = layer.config, _augmented(layer, "q")
    read = _ending_in_one(look.inputs["q"], layer)
    return Turn.seen(by_head(read @ weights.to(read).T, config.heads), _given(look.query), config.turned(layer.index), config.family.rope)


def _augmented(layer: Layer, part: str) -> Tensor:
    """Return the weights of q or v with the bias as a last column, where one of them has one."""
    if not _biased(layer):
        return layer[part]
    return torch.cat([layer[part], layer[f"{part}.bias"][:, None]], 1)


def _assign(layer: Layer, part: str, weights: Tensor) -> None:
    width = layer.config.hidden
    layer[part] = weights[:, :width].cpu()
    if f"{part}.bias" in layer:
        layer[f"{part}.bias"] = weights[:, width].cpu()


def _biased(layer: Layer) -> bool:
    return "q.bias" in layer and "v.bias" in layer


def _ending_in_one(read: Tensor, layer: Layer) -> Tensor:
    return torch.cat([read, read.new_ones(*read.shape[:-1], 1)], -1) if _biased(layer) else read


def _far(layer: Layer, wanted: Sequence[Tensor], bias: Tensor) -> float:
    """Return how far the output of attention is from what is wanted, relative to that."""
    assert layer.activations
    outputs = (look.outputs["o"] - bias.to(look.outputs["o"]) for look in layer.activations.capture(layer, ("o",), until="o"))
    off = sum(float((output - want).square().sum()) for output, want in zip(outputs, wanted, strict=True))
    return float((off / max(sum(float(want.square().sum()) for want in wanted), 1e-30)) ** 0.5)


def _held(batch: int, row: int, batches: Sequence[Tensor]) -> int:
    """Say for a window whether it is held out: 1, else 0."""
    return int((sum(map(len, batches[:batch])) + row + 1) % HELD_OUT == 0)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
