"""The model before a step that has to choose something: run on the calibration text before anything is planned, with the weights of one layer in memory."""
# B = texts run at a time, T = tokens, M = hidden width, V = vocabulary, C = tokens of it at a time.

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Model
from effconvert.checkpoint.outer import Outer
from effconvert.heal._layerwise import LayerRunner, check_finite, device, inside, return_memory, silenced, stored_tensors
from effconvert.progress import Advance

EACH = 4  # of so many tokens in a row the prediction after one is compared: neighbours tell much the same
ROWS = 8192  # of the head, which are in memory at a time


class Forward:
    """See `effconvert.surgery._surgery.Forward`."""

    def __init__(self, model: Callable[[], Model], batches: Sequence[Tensor], bar: Callable[[int], AbstractContextManager[Advance]]) -> None:
        """Run nothing yet.

        Args:
            model: gives the model as the steps before leave it, which reads nothing before it is asked.
            batches: token ids, [B, T] each.
            bar: shows how many of a number of steps are done.
        """
        self._model, self._batches, self.bar = model, batches, bar
        self.config: Config = model().config

    def begin(self, tokens: int) -> list[Tensor]:
        """Return what arrives at the first layer, for about so many tokens from all over the text."""
        count = max(1, min(len(self._batches), round(tokens * len(self._batches) / sum(batch.numel() for batch in self._batches))))
        ids = [self._batches[index * len(self._batches) // count].to(device()) for index in range(count)]
        self._outer = self._model().outer
        self._stage = LayerRunner(self.config, inside(self._outer, ids), ids, device(), head=self.config.family.decoder)
        return self._stage.begin()

    def layer(self, index: int, states: Sequence[Tensor], without: str = "") -> list[Tensor]:
        """Return what a layer makes of `states`, as it is or without its attention or ffn."""
        layer = self._model().layers[index]
        tensors = {name: numbers.to(device()) for name, (_, numbers, _) in stored_tensors(silenced(layer, without) if without else layer).items()}
        made = [look.out for look in self._stage.run(index, tensors, states)]
        check_finite(made, f"layer {index}")
        return_memory()
        return made

    def divergence(self, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        """Return KL(wanted || found) in nats a token, of the predictions after every fourth token.

        A slice of the vocabulary at a time: KL = sum p (x - y) - log sum e^x + log sum e^y, with logits x, y and p = e^x / sum e^x.
        """
        total, tokens = 0.0, 0
        for pair in zip(wanted, found, strict=True):
            expected, given = (state[:, EACH - 1 :: EACH] for state in pair)
            highest = expected.new_full(expected.shape[:2], -torch.inf)  # of x so far, [B, T]
            mass, apart = torch.zeros_like(highest), torch.zeros_like(highest)  # sums of e^(x - highest), and of that times (x - y)
            other = torch.full_like(highest, -torch.inf)  # log sum e^y
            for start in range(0, self.config.vocabulary, ROWS):
                x, y = (self._logits(state, start) for state in (expected, given))
                rising = torch.maximum(highest, x.amax(-1))
                shrink, weights = (highest - rising).exp(), (x - rising[..., None]).exp()
                mass, apart = mass * shrink + weights.sum(-1), apart * shrink + (weights * (x - y)).sum(-1)
                highest, other = rising, torch.logaddexp(other, y.logsumexp(-1))
            total += float((apart / mass - highest - mass.log() + other).double().sum())
            tokens += highest.numel()
        return total / tokens

    def _logits(self, state: Tensor, start: int) -> Tensor:
        """Return the logits of `ROWS` tokens of the vocabulary, in float32."""
        part = _head(self._outer, self.config)
        rows = (self._outer.rows(name, start, start + ROWS).to(state) if name in self._outer else None for name in (part, f"{part}.bias"))
        weights, bias = rows
        assert weights is not None
        return self._stage.predict(state, weights, bias).float()


def _head(outer: Outer, config: Config) -> str:
    """Return the part whose rows make logits."""
    heads = () if config.tied else config.family.head
    return next((part for part in heads if part in outer), "embed")
