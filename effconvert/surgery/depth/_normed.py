"""Fit an output projection that several layers share to the stream of the original, where a LayerNorm stands behind it.

What comes out of such a norm is y = gain * z + bias, where z is its input with mean 0 and deviation 1. So the wanted z is (target - bias) / gain, and a
change of the projection moves z by what it adds, divided by the deviation: least squares again.
"""
# B = windows run at a time, T = tokens, M = hidden width, F = inputs of the projection.

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.surgery._ridge import HELD_OUT, TINY, Moments, ridge

NORMS: Mapping[str, str] = {"o": "attn_post_norm", "down": "mlp_post_norm"}  # output projection -> the norm behind it
LEAST = 1e-2  # of the mean gain: channels with less say nothing of their input


def has_norm_behind(layer: Layer, part: str) -> bool:
    """Whether a LayerNorm of the residual stream stands behind an output projection."""
    return layer.config.norms_stream and NORMS[part] in layer and f"{NORMS[part]}.bias" in layer


def follow_normed(layer: Layer, members: Sequence[Layer], part: str, shared: Sequence[str]) -> None:
    """Fit an output projection of `layer`, and its norm if that is shared too, on the path through layers with its parts.

    Args:
        layer: the first of a group, with the parts that the group shares.
        members: the layers of the group as they were.
        part: "o" or "down".
        shared: the parts that `layer` gives to all members.
    """
    gains = torch.stack([(layer if NORMS[part] in shared else member)[NORMS[part]] for member in members]).mean(0)
    moments, window = (Moments(), Moments()), 0
    for trial, target, whole in _path(layer, members, part, shared):
        normed, deviation = standardised(whole.inputs[NORMS[part]].view_as(target))
        residual = gains.to(target) * (_undone(target, trial[NORMS[part]], trial[f"{NORMS[part]}.bias"]) - normed)
        inputs = whole.inputs[part].reshape(*target.shape[:2], -1)
        features = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1) / deviation  # the last is for the bias
        for feature, missing in zip(features, residual, strict=True):
            window += 1
            moments[int(window % HELD_OUT == 0)].add(feature, missing)
    if (change := ridge(*moments)) is not None:
        change = change.cpu() * _inverse(gains)[:, None]
        layer[part] = layer[part] + change[:, :-1].float()
        if f"{part}.bias" in layer:
            layer[f"{part}.bias"] = layer[f"{part}.bias"] + change[:, -1].float()
    if NORMS[part] in shared:
        _fit_norm(layer, members, part, shared)


def standardised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [..., M] with mean 0 and deviation 1, and their deviations [..., 1]."""
    centred = rows - rows.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt().clamp_min(TINY)
    return centred / deviation, deviation


def _fit_norm(layer: Layer, members: Sequence[Layer], part: str, shared: Sequence[str]) -> None:
    """Fit gain and bias of each channel by least squares."""
    count, sums = 0, torch.zeros(4, layer.config.hidden, dtype=torch.double)  # of z, y, z z and z y
    for _, target, whole in _path(layer, members, part, shared):
        z, y = (rows.flatten(0, 1).double() for rows in (standardised(whole.inputs[NORMS[part]].view_as(target))[0], target))
        sums += torch.stack([z.sum(0), y.sum(0), (z * z).sum(0), (z * y).sum(0)]).cpu()
        count += len(z)
    z, y, zz, zy = sums / max(1, count)
    gain = (zy - z * y) / (zz - z * z).clamp_min(TINY)
    layer[NORMS[part]], layer[f"{NORMS[part]}.bias"] = gain.float(), (y - gain * z).float()


def _path(layer: Layer, members: Sequence[Layer], part: str, shared: Sequence[str]) -> Iterator[tuple[Layer, Tensor, Any]]:
    """Run the members with the shared parts, each on what the one before gives; yield the layer, what the norm gives in the original, and the capture."""
    assert layer.activations
    states, norm = layer.activations.states, NORMS[part]
    for member in members:
        trial = member.on_top(member.index, member.config)
        for name in shared:
            trial[name] = layer[name]
        after = []
        targets = _targets(member, part)
        for target, whole in zip(targets, layer.activations.capture(trial, (part, norm), states=states), strict=True):
            after.append(whole.out)
            yield trial, target, whole
        states = after


def _targets(member: Layer, part: str) -> Iterator[Tensor]:
    """Yield what the norm behind a part gives in the original, on the original's own stream, [B, T, M]."""
    assert member.activations
    index = member.originals[-1]
    if part == "down":
        yield from member.activations.original_stream(2 * index + 2)
        return
    before = member.activations.original_stream(2 * index)
    for capture in member.activations.capture(member, (NORMS[part],), NORMS[part], before):
        yield capture.outputs[NORMS[part]].view_as(capture.state)


def _undone(target: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    rows: Tensor = (target - bias.to(target)) * _inverse(gain).to(target)
    return rows


def _inverse(gain: Tensor) -> Tensor:
    """Return one over each gain, and 0 for those near 0."""
    return torch.where(gain.abs() > LEAST * gain.abs().mean(), 1 / gain, torch.zeros_like(gain))
