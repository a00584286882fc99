"""Train what stands at a place of one layer towards what the original's gives there on the same inputs."""
# B = windows run at a time, T = tokens, M = hidden width.

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.replaced import OWN

HELD_OUT = 8  # every eighth batch of texts of a length
FASTER = 10  # times the rate, of parameters that a mixer brought with it
TRIES = (1, 0.1, 0.01)  # of the rate, the next where one gained nothing
WARM = 0.1  # of all steps, to the highest rate


def teach(layer: Layer, originals: Sequence[int], place: str, parts: list[str], epochs: int, rate: float) -> dict[str, float]:
    """Train `parts`, and keep of what was passed on the way what predicts held-out batches best; return the errors before and after.

    The error is the squared one of what the place gives, [B, T, M], relative to the size of that. Nothing is returned where nothing can be learnt.
    """
    activations = layer.activations
    assert activations
    wanted = [look.outputs[place] for look in activations.original(originals, (place,), until=place)]
    size = sum(float(want.square().mean()) for want in wanted) / len(wanted)
    held = _held([want.shape[1] for want in wanted])
    fitted = [index for index in range(len(wanted)) if index not in held]
    if not fitted or not size:
        return {}
    fixed = activations.stored(layer)
    learnt: dict[str, nn.Parameter] = {}

    def error(index: int) -> Tensor:
        off: Tensor = (activations.given(layer, place, learnt, fixed, index) - wanted[index]).square().mean() / size
        return off

    def judged() -> float:
        with torch.no_grad():
            return sum(float(error(index)) for index in held) / len(held)

    before = least = judged()
    best = {part: layer[part] for part in parts}
    for highest in [share * rate for share in TRIES]:
        learnt = {part: nn.Parameter(layer[part].clone()) for part in parts}
        rates = [{"params": [value], "lr": highest * (FASTER if f".{OWN}" in part else 1)} for part, value in learnt.items()]
        optimizer = torch.optim.AdamW(rates, betas=(0.9, 0.95), weight_decay=0.0)
        steps, draw = epochs * len(fitted), torch.Generator().manual_seed(layer.index)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_height, steps=steps))
        for _ in range(epochs):
            for batch in torch.randperm(len(fitted), generator=draw).tolist():
                with torch.enable_grad():
                    error(fitted[batch]).backward()
                nn.utils.clip_grad_norm_(learnt.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if (now := judged()) < least:
                least, best = now, {part: value.detach().clone() for part, value in learnt.items()}
        if least < before:
            break
    for part, value in best.items():
        layer[part] = value.cpu()
    return {"before": before, "after": least}


def _held(lengths: list[int]) -> list[int]:
    """Choose the batches to judge by: of each length of texts every eighth, or the last of two and more."""
    held: list[int] = []
    for length in dict.fromkeys(lengths):
        same = [index for index, other in enumerate(lengths) if other == length]
        held += same[HELD_OUT - 1 :: HELD_OUT] or same[1:][-1:]
    return held or [len(lengths) - 1]


def _height(step: int, steps: int) -> float:
    """Warm up, and cool down along a cosine."""
    warm = max(1, round(WARM * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
