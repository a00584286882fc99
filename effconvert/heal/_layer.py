"""Refit one layer: gather what the original and the converted layer are on the same inputs, and solve."""
# B = windows run at a time, T = tokens, M = hidden width, H = query heads, Hk = KV heads, G = KV heads after, D = head width.

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from effconvert.convert.layer import Layer
from effconvert.convert.walk import Look
from effconvert.heal._regression import HELD_OUT, Attended, Moments, Queries, Turn, Values, by_head, ridge, solve

SAME = 1e-5  # of the size of an output: nearer than this there is nothing to heal


def refit_attention(layer: Layer, original: int) -> None:
    """Fit q to the scores of the original's layer, then v and o to what its attention gives, where the families' attention allows it."""
    assert layer.walk
    bias = layer["o.bias"] if "o.bias" in layer else torch.zeros(layer.config.hidden)
    wanted = [_unbiased(look.outputs["o"], bias, layer) for look in layer.walk.original([original], ("o",), until="o")]
    looks = list(layer.walk.look(layer, ("q", "o"), until="o"))
    if _far(looks, wanted, bias, layer) < SAME:
        return
    if all(look.weights is not None for look in looks) and (windows := _windows(layer, original, looks, wanted)):
        if turn := _turn(layer, looks):
            _queries(layer, windows, looks, turn)
            looks = list(layer.walk.look(layer, ("q", "o"), until="o"))
        _replace_weights(windows, looks)
        _output(layer, looks, wanted, bias)
        _values(layer, windows)
        looks = list(layer.walk.look(layer, ("o",), until="o"))
    _output(layer, looks, wanted, bias)


def refit_output(layer: Layer, originals: Sequence[int]) -> None:
    """Fit the MLP's output to what layers of the original, of which this one alone is left, would have made of the same inputs."""
    assert layer.walk
    if "mlp_post_norm" in layer:
        return  # what comes after the norm is not linear in the weights before it
    wanted = [look.out for look in layer.walk.original(originals)]
    moments = Moments(), Moments()
    for index, (look, want) in enumerate(zip(layer.walk.look(layer, ("down",)), wanted, strict=True)):
        for row, (inputs, missing) in enumerate(zip(look.inputs["down"], want - look.out, strict=True)):
            moments[_held(index, row, wanted)].add(inputs, missing)
    if (change := ridge(*moments)) is not None:
        layer["down"] = layer["down"] + change.float().cpu()


def _output(layer: Layer, looks: Iterable[Look], wanted: Sequence[Tensor], bias: Tensor) -> None:
    """Ridge regression of the output projection."""
    moments = Moments(), Moments()
    weights = layer["o"]
    for index, (look, want) in enumerate(zip(looks, wanted, strict=True)):
        for row, (inputs, given) in enumerate(zip(look.inputs["o"], want, strict=True)):
            moments[_held(index, row, wanted)].add(inputs, given - inputs @ weights.to(inputs).T)
    if (change := ridge(*moments)) is not None:
        layer["o"] = weights + change.float().cpu()


def _queries(layer: Layer, windows: Sequence[Attended], looks: Sequence[Look], turn: Turn) -> None:
    keys = [key for look in looks for key in _given(look.key)]
    _assign(layer, "q", solve(Queries(windows, keys, turn, layer.config.heads), _augmented(layer, "q").to(keys[0])))


def _values(layer: Layer, windows: Sequence[Attended]) -> None:
    heads, outputs = layer.config.heads, layer["o"].to(windows[0].read)
    _assign(layer, "v", solve(Values(windows, outputs, heads, layer.config.kv_heads), _augmented(layer, "v").to(outputs)))


def _windows(layer: Layer, original: int, looks: Sequence[Look], wanted: Sequence[Tensor]) -> list[Attended]:
    """Gather the original's attention, empty where it has other heads than this layer."""
    assert layer.walk
    windows = []
    for mine, look, want in zip(looks, layer.walk.original([original], ("o",), until="o"), wanted, strict=True):
        query, key, weights = look.query, look.key, look.weights
        if query is None or key is None or weights is None or query.shape != _given(mine.query).shape:
            return []
        read = mine.inputs["q"]
        read = torch.cat([read, read.new_ones(*read.shape[:-1], 1)], -1) if _biased(layer) else read
        windows += [Attended(*parts) for parts in zip(read, weights.half(), query, key, want, strict=True)]
    return windows


def _replace_weights(windows: Sequence[Attended], looks: Sequence[Look]) -> None:
    """From here on the converted layer's own attention counts: what is mixed is what it will mix."""
    for window, weights in zip(windows, (each for look in looks for each in _given(look.weights)), strict=True):
        window.weights = weights.half()


def _turn(layer: Layer, looks: Sequence[Look]) -> Turn | None:
    """Find what the family does to queries between their projection and the scores; None where that is no rotation."""
    config, weights = layer.config, _augmented(layer, "q")
    read, after = looks[0].inputs["q"], _given(looks[0].query)
    read = torch.cat([read, read.new_ones(*read.shape[:-1], 1)], -1) if _biased(layer) else read
    return Turn.seen(by_head(read @ weights.to(read).T, config.heads), after, config.rotary, config.family.rope)


def _augmented(layer: Layer, part: str) -> Tensor:
    """Return the weights of q or v with the bias as a last column, where one of them has one."""
    if not _biased(layer):
        return layer[part]
    return torch.cat([layer[part], (layer[f"{part}.bias"] if f"{part}.bias" in layer else torch.zeros(len(layer[part])))[:, None]], 1)


def _assign(layer: Layer, part: str, weights: Tensor) -> None:
    width = layer.config.hidden
    layer[part] = weights[:, :width].cpu()
    if f"{part}.bias" in layer:
        layer[f"{part}.bias"] = weights[:, width].cpu()


def _biased(layer: Layer) -> bool:
    return "q.bias" in layer and "v.bias" in layer


def _unbiased(outputs: Tensor, bias: Tensor, layer: Layer) -> Tensor:
    return outputs - bias.to(outputs)


def _far(looks: Sequence[Look], wanted: Sequence[Tensor], bias: Tensor, layer: Layer) -> float:
    """Return how far the outputs of attention are from those that are wanted, relative to these."""
    off = sum(float((_unbiased(look.outputs["o"], bias, layer) - want).square().sum()) for look, want in zip(looks, wanted, strict=True))
    return (off / max(sum(float(want.square().sum()) for want in wanted), 1e-30)) ** 0.5


def _held(batch: int, row: int, batches: Sequence[Tensor]) -> int:
    """Say for a window whether it is held out: 1, else 0."""
    return int((batch * len(batches[0]) + row + 1) % HELD_OUT == 0)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
