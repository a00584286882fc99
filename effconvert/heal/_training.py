"""Train the parameters at one place of a layer to reproduce the original's output on the same inputs."""
# B = windows run at a time, T = tokens, M = hidden width.

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.replaced import OWN

HELD_OUT = 8  # every eighth batch of each text length
OWN_RATE = 10  # learning rate of a mixer's own parameters, in multiples of the rate
EQUAL = 1e-12  # relative error that is rounding: nothing is to be learnt
RATES = (1, 0.1, 0.01)  # multiples of the rate; the next is tried where one gained nothing
WIDTH = 256  # inputs of matrices that are trained at the rate itself; with more it falls (maximal update parametrisation, Yang et al. 2022, arXiv 2203.03466)
WARMUP = 0.1  # of all steps


def train(layer: Layer, originals: Sequence[int], place: str, parts: list[str], epochs: int, rate: float) -> dict[str, float]:
    """Train `parts`, keep the epoch that is best on held-out batches, and return the errors before and after.

    `rate` is for matrices of up to `WIDTH` inputs at a place that computes nothing right; it falls with more inputs, and with the root of the error.

    The error is the mean square of the difference at the place's output, [B, T, M], relative to the mean square of the target. Empty where there is
    nothing to learn.
    """
    activations = layer.activations
    assert activations
    targets = [capture.outputs[place] for capture in activations.original(originals, (place,), until=place)]
    size = sum(float(target.square().mean()) for target in targets) / len(targets)
    held_out = _held_out_batches([target.shape[1] for target in targets])
    batches = [index for index in range(len(targets)) if index not in held_out]
    if not batches or not size:
        return {}
    stored = activations.stored(layer)
    trainable: dict[str, nn.Parameter] = {}

    def error(index: int) -> Tensor:
        loss: Tensor = (activations.place_output(layer, place, trainable, stored, index) - targets[index]).square().mean() / size
        return loss

    def held_out_error() -> float:
        with torch.no_grad():
            return sum(float(error(index)) for index in held_out) / len(held_out)

    before = least = held_out_error()
    best = {part: layer[part] for part in parts}
    rate *= min(1, math.sqrt(before))  # AdamW's steps are as long as the rate, whatever the gradient: where little is wrong, long ones lead past it
    for highest in [share * rate for share in RATES if before > EQUAL]:
        trainable = {part: nn.Parameter(layer[part].clone()) for part in parts}
        groups = [{"params": [value], "lr": highest * _share(part, value)} for part, value in trainable.items()]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        steps, generator = epochs * len(batches), torch.Generator().manual_seed(layer.index)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate_factor, steps=steps))
        for _ in range(epochs):
            for batch in torch.randperm(len(batches), generator=generator).tolist():
                with torch.enable_grad():
                    error(batches[batch]).backward()
                nn.utils.clip_grad_norm_(trainable.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if (now := held_out_error()) < least:
                least, best = now, {part: value.detach().clone() for part, value in trainable.items()}
        if least < before:
            break
    for part, value in best.items():
        layer[part] = value.cpu()
    return {"before": before, "after": least}


def _held_out_batches(lengths: list[int]) -> list[int]:
    """Choose the batches to hold out: every eighth of each text length, or the last of two and more."""
    held_out: list[int] = []
    for length in dict.fromkeys(lengths):
        same = [index for index, value in enumerate(lengths) if value == length]
        held_out += same[HELD_OUT - 1 :: HELD_OUT] or same[1:][-1:]
    return held_out or [len(lengths) - 1]


def _share(part: str, value: Tensor) -> float:
    """Return the learning rate of a part, [inputs] or [..., inputs], in multiples of the rate."""
    width = min(1, WIDTH / value.shape[-1]) if value.ndim > 1 else 1
    return width * (OWN_RATE if f".{OWN}" in part else 1)


def _rate_factor(step: int, steps: int) -> float:
    """Warm up linearly, then cool down along a cosine."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
