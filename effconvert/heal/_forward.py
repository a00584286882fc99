"""Run the model before a step that chooses something, on the calibration text and before the plan, with the weights of one layer in memory."""
# B = texts run at a time, T = tokens, M = hidden width, V = vocabulary, C = tokens of it at a time.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Layer, Model
from effconvert.checkpoint.outer import Outer
from effconvert.checkpoint.parts import ROWS
from effconvert.heal._capture import Capture
from effconvert.heal._layerwise import LayerRunner, device
from effconvert.heal._tensors import check_finite, outer_tensors, return_memory, stored_tensors, zero_sublayer
from effconvert.progress import Advance
from effconvert.surgery._placed import table_rows
from effconvert.surgery.projections._factors import product_of

STRIDE = 4  # the prediction after every fourth token is compared: neighbours have nearly the same divergence


class Forward:
    """See `effconvert.surgery._surgery.ForwardProtocol`."""

    def __init__(self, model: Callable[[], Model], batches: Sequence[Tensor], bar: Callable[[int], AbstractContextManager[Advance]]) -> None:
        """Prepare; nothing runs yet.

        Args:
            model: returns the model after the steps before, which reads its tensors lazily.
            batches: token ids, [B, T] each.
            bar: shows progress over a number of steps.
        """
        self._model, self.ids, self.bar = model, batches, bar
        self.config: Config = model().config

    def begin(self, tokens: int, twice: bool = False) -> list[Tensor]:
        """Return the inputs of the first layer for about `tokens` tokens, spread over the text; with `twice` the first half of each text is read twice."""
        count = max(1, min(len(self.ids), round(tokens * len(self.ids) / sum(batch.numel() for batch in self.ids))))
        ids = [self.ids[index * len(self.ids) // count].to(device()) for index in range(count)]
        if twice:
            ids = [batch[:, : batch.shape[1] // 2].repeat(1, 2) for batch in ids]
        self._outer = self._model().outer
        self._runner = LayerRunner(self.config, outer_tensors(self._outer, ids), ids, device(), head=self.config.decoder)
        return self._runner.begin()

    def layer(self, index: int, states: Sequence[Tensor], without: str = "", weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return a layer's outputs for the inputs `states`, whole or without its attention or ffn, or with other `weights` of some parts."""
        layer = self.parts(index)
        layer = zero_sublayer(layer, without) if without else layer.on_top(index, layer.config)
        for part, tensor in (weights or {}).items():
            layer[part] = tensor
        outputs = [capture.out for capture in self._run(layer, states)]
        check_finite(outputs, f"layer {index}")
        return_memory()
        return outputs

    def parts(self, index: int) -> Layer:
        """Return the tensors of a layer."""
        return self._model().layers[index]

    @property
    def outer(self) -> Outer:
        """The tensors outside the layers."""
        return self._model().outer

    def weights(self, index: int, part: str) -> Tensor:
        """Return the matrix of a projection of a layer, [out, in] in float32."""
        return product_of(self.parts(index), part)

    def capture(self, index: int, states: Sequence[Tensor], part: str) -> Iterator[Capture]:
        """Run a layer up to a part, and yield its inputs and outputs for each batch."""
        return self._run(self.parts(index), states, part)

    def _run(self, layer: Layer, states: Sequence[Tensor], until: str = "") -> Iterator[Capture]:
        tensors = {name: numbers.to(device()) for name, (_, numbers, _) in stored_tensors(layer).items()}
        return self._runner.run(layer.index, tensors, states, (until,) if until else (), until)

    @property
    def counts(self) -> Tensor:
        """How often each token occurs in the calibration text, [V]."""
        return torch.cat([batch.flatten() for batch in self.ids]).cpu().bincount(minlength=self.config.vocabulary)

    def table_rows(self, place: str, tokens: Tensor) -> Tensor:
        """Return rows of the table at `embed` or `head`, [N, M] in float32."""
        return table_rows(self._model().outer, place, tokens)

    def head_inputs(self) -> Iterator[Tensor]:
        """Run the model on the whole calibration text, and yield what its head gets, [B, T, M] for each batch."""
        states = self.begin(sum(batch.numel() for batch in self.ids))
        with self.bar(self.config.layers) as advance:
            for index in range(self.config.layers):
                states = self.layer(index, states)
                advance(1)
        for state in states:
            yield self._runner.head_input(state)

    def divergence(self, reference: Sequence[Tensor], states: Sequence[Tensor]) -> float:
        """Return KL(reference || states) in nats a token, of the predictions after every fourth token.

        A slice of the vocabulary at a time: KL = sum p (x - y) - log sum e^x + log sum e^y, with logits x, y and p = e^x / sum e^x.
        """
        total, tokens = 0.0, 0
        for pair in zip(reference, states, strict=True):
            expected, actual = (state[:, STRIDE - 1 :: STRIDE] for state in pair)
            highest = expected.new_full(expected.shape[:2], -torch.inf)  # of x so far, [B, T]
            mass, difference = torch.zeros_like(highest), torch.zeros_like(highest)  # sums of e^(x - highest), and of that times (x - y)
            log_sum = torch.full_like(highest, -torch.inf)  # log sum e^y
            for start in range(0, self.config.vocabulary, ROWS):
                x, y = (self._logits(state, start) for state in (expected, actual))
                rising = torch.maximum(highest, x.amax(-1))
                shrink, weights = (highest - rising).exp(), (x - rising[..., None]).exp()
                mass, difference = mass * shrink + weights.sum(-1), difference * shrink + (weights * (x - y)).sum(-1)
                highest, log_sum = rising, torch.logaddexp(log_sum, y.logsumexp(-1))
            total += float((difference / mass - highest - mass.log() + log_sum).double().sum())
            tokens += highest.numel()
        return total / tokens

    def _logits(self, state: Tensor, start: int) -> Tensor:
        """Return the logits of `ROWS` tokens of the vocabulary, in float32."""
        head = "" if self.config.tied else self._outer.table("head")
        tokens = torch.arange(start, min(start + ROWS, self.config.vocabulary))
        weights = table_rows(self._outer, "head" if head else "embed", tokens).to(state)
        bias = self._outer.rows(f"{head}.bias", tokens).to(state) if f"{head}.bias" in self._outer else None
        return self._runner.predict(state, weights, bias).float()
