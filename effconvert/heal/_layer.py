"""Refit one layer: run the original's layer and the converted one on the same inputs, and solve for weights."""
# B = windows run at a time, T = tokens, M = hidden width, H = query heads, Hk = KV heads, G = KV heads after, D = head width.

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.heal._capture import Capture
from effconvert.heal._tensors import zero_sublayer
from effconvert.surgery._regression import AttentionWindow, Queries, Rotation, Values, by_head, solve
from effconvert.surgery._ridge import HELD_OUT, Moments, ridge
from effconvert.surgery.projections._factors import assign_product, fitted_of, outputs_of, product_of

NEGLIGIBLE = 1e-5  # relative error below which there is nothing to heal


def refit_attention(layer: Layer, original: int) -> None:
    """Fit q to the scores of the original's layer, then v and o to its attention's output, where the families' attention allows it."""
    assert layer.activations
    if "o" not in layer:
        return
    bias = layer["o.bias"] if "o.bias" in layer else torch.zeros(layer.config.hidden)
    targets, windows = _original_attention(layer, original, bias)
    if _relative_error(layer, targets, bias) < NEGLIGIBLE:
        return
    if windows:
        if "q" in layer:  # a technique may run in its place
            _fit_queries(layer, windows)
        for window, weights in zip(windows, _attention_weights(layer), strict=True):
            window.weights.copy_(weights)  # use the converted layer's attention weights from here on
        _fit_output(layer, targets)
        if "v" in layer:
            _fit_values(layer, windows)
    _fit_output(layer, targets)


def refit_output(layer: Layer, originals: Sequence[int]) -> None:
    """Fit the MLP's output to the output of the original's layers that this one stands for, on the same inputs."""
    assert layer.activations
    if "down" not in layer or "mlp_post_norm" in layer:
        return  # the output after a norm is not linear in the weights before it
    _fit_part(layer, layer, "down", [capture.out for capture in layer.activations.original(originals)])


def refit_stream(layer: Layer, part: str, step: int) -> None:
    """Fit o or down so that the stream after it is the original's stream at `step`, whatever the layers below are.

    The output after a norm is not linear in the weights before it, so such parts stay.
    """
    assert layer.activations
    if not fitted_of(layer, part) or layer.config.norms_stream or {"o": "attn_post_norm", "down": "mlp_post_norm"}[part] in layer:
        return
    alone = zero_sublayer(layer, "ffn") if part == "o" else layer  # up to this part of the layer
    _fit_part(layer, alone, part, layer.activations.original_stream(step))


def _fit_part(layer: Layer, alone: Layer, part: str, targets: Sequence[Tensor]) -> None:
    """Ridge regression of a part that writes to the stream, towards `targets` [B, T, M] after `alone`: the layer or the half of it up to this part."""
    assert layer.activations
    factor, moments = _residual_multiplier(alone, part), (Moments(), Moments())
    for index, (capture, target) in enumerate(zip(layer.activations.capture(alone, (part,)), targets, strict=True)):
        for row, (inputs, residuals) in enumerate(zip(_inputs(capture, part), (target - capture.out) / factor, strict=True)):
            moments[_is_held_out(index, row, targets)].add(inputs, residuals)
    if (change := ridge(*moments)) is not None:
        assign_product(layer, part, product_of(layer, part) + change.cpu(), moments[0].gram)


def _residual_multiplier(layer: Layer, part: str) -> float:
    """Return the factor by which a part's output is added to the stream: not 1 in families with a residual multiplier, such as Granite."""
    assert layer.activations
    outs = []
    for factor in (0, 1):
        copy = layer.on_top(layer.index, layer.config)
        for name in outputs_of(layer, part):
            copy[name] = factor * layer[name]
        capture = next(layer.activations.capture(copy, (part,)))
        outs.append(capture.out)
    output = _inputs(capture, part) @ product_of(layer, part).to(capture.out).T
    return float(((outs[1] - outs[0]) * output).sum() / output.square().sum()) if output.any() else 1.0


def _inputs(capture: Capture, part: str) -> Tensor:
    """Return the inputs of a part's module, [B, T, ...]: OPT flattens B and T for its MLP."""
    return capture.inputs[part].reshape(*capture.state.shape[:2], -1)


def _fit_output(layer: Layer, targets: Sequence[Tensor]) -> None:
    """Ridge regression of the output projection."""
    assert layer.activations
    moments, weights = (Moments(), Moments()), layer["o"]
    for index, (capture, target) in enumerate(zip(layer.activations.capture(layer, ("o",), until="o"), targets, strict=True)):
        for row, (inputs, output) in enumerate(zip(capture.inputs["o"], target, strict=True)):
            moments[_is_held_out(index, row, targets)].add(inputs, output - inputs @ weights.to(inputs).T)
    if (change := ridge(*moments)) is not None:
        layer["o"] = weights + change.float().cpu()


def _fit_queries(layer: Layer, windows: Sequence[AttentionWindow]) -> None:
    assert layer.activations
    keys: list[Tensor] = []
    rotation: Rotation | None = None
    for capture in layer.activations.capture(layer, ("q", "o"), until="o"):
        if not keys and (rotation := _rotation(layer, capture)) is None:
            return
        keys += _present(capture.key)
    assert rotation
    _assign(layer, "q", solve(Queries(windows, keys, rotation, layer.config.heads), _weights_and_bias(layer, "q").to(keys[0])))


def _fit_values(layer: Layer, windows: Sequence[AttentionWindow]) -> None:
    heads, outputs = layer.config.heads, layer["o"].to(windows[0].inputs)
    _assign(layer, "v", solve(Values(windows, outputs, heads, layer.config.kv_heads), _weights_and_bias(layer, "v").to(outputs)))


def _original_attention(layer: Layer, original: int, bias: Tensor) -> tuple[list[Tensor], list[AttentionWindow]]:
    """Return the output of the original's attention, [B, T, M] without the bias of o, and its windows; no windows where it has other heads than this layer."""
    assert layer.activations
    targets: list[Tensor] = []
    windows: list[AttentionWindow] = []
    buffer = torch.empty(0)
    offset = 0
    captures = layer.activations.capture(layer, ("q", "o"), until="o")
    for capture, own in zip(layer.activations.original([original], ("o",), until="o"), captures, strict=True):
        targets.append(capture.outputs["o"] - bias.to(capture.outputs["o"]))
        if capture.weights is None or own.weights is None or _present(capture.query).shape != _present(own.query).shape:
            continue
        if not len(buffer):  # one block for all: many small ones would fragment memory
            buffer = capture.weights.new_empty(capture.weights.shape[1] * layer.activations.scores, dtype=torch.half)
        weights = buffer[offset : offset + capture.weights.numel()].view(capture.weights.shape).copy_(capture.weights)
        offset += weights.numel()
        inputs = _with_ones(own.inputs["q"], layer)
        windows += [AttentionWindow(*parts) for parts in zip(inputs, weights, _present(capture.query), _present(capture.key), targets[-1], strict=True)]
    return targets, windows


def _attention_weights(layer: Layer) -> Iterator[Tensor]:
    """Yield the weights of attention for each window, [H, T, T] in half precision."""
    assert layer.activations
    for capture in layer.activations.capture(layer, ("o",), until="o"):
        yield from _present(capture.weights).half()


def _rotation(layer: Layer, capture: Capture) -> Rotation | None:
    """Estimate what the family does to queries between their projection and the scores; None where that is no rotation."""
    config, weights = layer.config, _weights_and_bias(layer, "q")
    inputs = _with_ones(capture.inputs["q"], layer)
    return Rotation.estimate(by_head(inputs @ weights.to(inputs).T, config.heads), _present(capture.query), config.rotary_of(layer.index), config.family.rope)


def _weights_and_bias(layer: Layer, part: str) -> Tensor:
    """Return the weights of q or v, with the bias as a last column where there is one."""
    if not _has_bias(layer):
        return layer[part]
    return torch.cat([layer[part], layer[f"{part}.bias"][:, None]], 1)


def _assign(layer: Layer, part: str, weights: Tensor) -> None:
    width = layer.config.hidden
    layer[part] = weights[:, :width].cpu()
    if f"{part}.bias" in layer:
        layer[f"{part}.bias"] = weights[:, width].cpu()


def _has_bias(layer: Layer) -> bool:
    return "q.bias" in layer and ("v" not in layer or "v.bias" in layer)


def _with_ones(inputs: Tensor, layer: Layer) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1) if _has_bias(layer) else inputs


def _relative_error(layer: Layer, targets: Sequence[Tensor], bias: Tensor) -> float:
    """Return the distance of attention's output from its targets, relative to their norm."""
    assert layer.activations
    outputs = (capture.outputs["o"] - bias.to(capture.outputs["o"]) for capture in layer.activations.capture(layer, ("o",), until="o"))
    error = sum(float((output - target).square().sum()) for output, target in zip(outputs, targets, strict=True))
    return float((error / max(sum(float(target.square().sum()) for target in targets), 1e-30)) ** 0.5)


def _is_held_out(batch: int, row: int, batches: Sequence[Tensor]) -> int:
    """Return 1 for a window that is held out, else 0."""
    return int((sum(map(len, batches[:batch])) + row + 1) % HELD_OUT == 0)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
