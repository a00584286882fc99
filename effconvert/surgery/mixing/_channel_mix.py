"""RWKV's channel mixing in place of an FFN: squared ReLU, token shift, and in version 4 a receptance. It begins as the model's own FFN.

A product act(g) u, where act is like ReLU, is a difference of squares: relu(g + c u)^2 - relu(g - c u)^2 is 4 c g u where g > |c u|, 0 where g < -|c u|, and
smooth between these. So two neurons stand for each of the FFN. Without a gate u is 1. Least squares on the calibration text mend the rest.
"""
# B = batch, T = tokens, M = hidden width, F = neurons of the model's FFN.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call

SMOOTH = 0.1  # c, where g and u have the same mean square: less is nearer to ReLU, and rounds more
TINY = 1e-12  # least mean square
LAST = "last_ffn"  # where the state keeps the last token's input


def parameters(config: Config, receptance: bool) -> Mapping[str, tuple[int, ...]]:
    """Name the parameters: keys and values with biases, which RWKV itself has not, receptances, and shares of the token before."""
    inner, width = 2 * config.ffn, config.hidden
    shapes = {"key": (inner, width), "key_bias": (inner,), "value": (width, inner), "value_bias": (width,), "key_shift": (width,)}
    return {**shapes, **({"receptance": (width, width), "receptance_shift": (width,)} if receptance else {})}


def fitted(layer: Layer, receptance: bool) -> Mapping[str, Tensor]:
    """Return the parameters that come near to the layer's FFN: no shift, receptances of 1/2, and values by ridge regression."""
    import torch

    from effconvert.surgery._ridge import HELD_OUT, Moments, ridge
    from effconvert.surgery.ffn.glu import activation_of

    assert layer.activations
    gate, gate_bias = _rows(layer, "gate" if "gate" in layer else "up")
    if "gate" in layer or activation_of(layer.config) == "relu2":  # whose square is the product of ReLU and what it is of
        up, up_bias = _rows(layer, "up")
    else:
        up, up_bias = torch.zeros_like(gate), torch.ones_like(gate_bias)
    down, shift = _rows(layer, "down")
    run = layer.activations.capture(layer, ("up", "down"), until="down")
    windows = [pair for capture in run for pair in zip(capture.inputs["up"], capture.outputs["down"], strict=True)]  # [T, M] each
    squares = [sum(((rows @ one.to(rows).T + bias.to(rows)).square().sum(0) for rows, _ in windows)) for one, bias in ((gate, gate_bias), (up, up_bias))]
    share = SMOOTH * (squares[0] / squares[1].clamp_min(TINY)).sqrt().clamp_min(TINY).cpu()[:, None]  # [F, 1]
    key, key_bias = torch.cat([gate + share * up, gate - share * up]), torch.cat([gate_bias + share[:, 0] * up_bias, gate_bias - share[:, 0] * up_bias])
    value, moments = torch.cat([down / (4 * share.T), -down / (4 * share.T)], 1), (Moments(), Moments())
    for number, (rows, outputs) in enumerate(windows, 1):
        inner = torch.nn.functional.linear(rows, key.to(rows), key_bias.to(rows)).relu().square()
        moments[number % HELD_OUT == 0].add(inner, outputs - shift.to(rows) - inner @ value.to(rows).T)
    if (change := ridge(*moments)) is not None:
        value = value + change.float().cpu()
    values = {"key": key, "key_bias": key_bias, "value": (2 if receptance else 1) * value, "value_bias": (2 if receptance else 1) * shift}
    return {name: values.get(name, torch.zeros(shape)) for name, shape in parameters(layer.config, receptance).items()}


def mix(weights: Mapping[str, Tensor], call: Call) -> Tensor:
    """Return receptance * (value relu(key x)^2), of x [B, T, M] shifted towards the token before."""
    import torch
    from torch.nn import functional

    from effconvert.surgery.mixing._shift import shifted

    rows, *more = shifted(call, LAST, call.hidden, *(weights[name] for name in ("key_shift", "receptance_shift") if name in weights))
    inner = functional.linear(rows, weights["key"], weights["key_bias"]).relu().square()
    mixed = functional.linear(inner, weights["value"], weights["value_bias"])
    return torch.sigmoid(functional.linear(more[0], weights["receptance"])) * mixed if more else mixed


def _rows(layer: Layer, part: str) -> tuple[Tensor, Tensor]:
    """Return the matrix of a projection [out, in] and its bias, zeros where it has none."""
    weight = layer[part]
    return weight, layer[f"{part}.bias"] if f"{part}.bias" in layer else weight.new_zeros(len(weight))
