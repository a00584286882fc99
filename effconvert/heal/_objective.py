"""The loss of distillation: how far a student's predictions are from a teacher's, with the logits of a few tokens in memory at a time."""
# N = tokens, M = hidden width, V = vocabulary, C = tokens at a time.

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effconvert.errors import ModelError
from effconvert.heal._in_pieces import summed
from effconvert.kernels._divergences import divergence_reference
from effconvert.kernels._kinds import Kind
from effconvert.kernels.choice import runs_triton
from effconvert.modeling.transformers_internals import BaseModelOutput

SAME = 2e-2  # relative difference of logits, which bfloat16 alone may make
SCALING = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # keys of configs: what `scaled` takes


@dataclass(frozen=True)
class Head:
    """The function from last hidden states [C, M] to logits [C, V], and the parameters that it has."""

    logits: Callable[[Tensor], Tensor]
    given: Callable[[], Iterable[Tensor]] = tuple  # asked each time: FSDP puts others in their place, ZeRO-3 gathers what is asked for

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden)

    def parameters(self) -> list[Tensor]:
        """Return them, each once."""
        return [*{id(parameter): parameter for parameter in self.given()}.values()]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of a divergence from the teacher and the cross-entropy of the text, in nats a token."""

    kind: Kind = "kl"
    temperature: float = 1.0
    ce: float = 0.0  # the share of the cross-entropy
    again: bool = False  # compute logits a second time for the gradients: see `summed`

    def __call__(self, hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, labels: Tensor) -> Tensor:
        """Return the mean loss of tokens.

        Args:
            hidden: the student's last hidden states, [N, M].
            head: its logits of some of them.
            teacher_hidden: the teacher's, which may have another width.
            teacher_head: its logits.
            labels: the token that each predicts, [N]; -100 where that is no part of the cross-entropy.
        """
        ce = self.ce_of(labels)

        def loss(own: Tensor, rows: slice) -> Tensor:
            with torch.no_grad():
                teacher = teacher_head(teacher_hidden[rows])
            student = head(own)
            if runs_triton(student.device, "divergence"):
                from effconvert.kernels.divergence import divergence  # imports triton

                teacher = teacher.to(student.dtype)
            else:
                divergence = divergence_reference
            return divergence(student, teacher, labels[rows], self.kind, self.temperature, self.weight, ce).sum()

        return summed(loss, hidden, head.parameters(), self.again) / len(hidden)

    @property
    def weight(self) -> float:
        """What the divergence is multiplied by: its share, and the square of the temperature, which makes up for the smaller gradients."""
        return (1 - self.ce) * self.temperature**2

    def ce_of(self, labels: Tensor) -> float:
        """Return the share of the cross-entropy for each token of a sum that is divided by all: it is a mean over those that have a label."""
        return self.ce * len(labels) / max(1, int((labels >= 0).sum())) if self.ce else 0.0


def scaled(logits: Tensor, cap: float | None, divisor: float | None, factor: float | None) -> Tensor:
    """Return the products of a head's matrix as the model's logits."""
    if factor:
        logits = logits * factor
    if divisor:
        logits = logits / divisor
    return cap * torch.tanh(logits / cap) if cap else logits


def head_of(model: Any) -> Head:
    """Return the function from a language model's last hidden states to its logits.

    Raises:
        ModelError: the model computes its logits in another way.
    """
    config = model.config.get_text_config()
    settings = [getattr(config, key, None) for key in SCALING]

    def by_its_matrix(hidden: Tensor) -> Tensor:
        return scaled(model.get_output_embeddings()(hidden), *settings)

    def by_its_class(hidden: Tensor) -> Tensor:  # heads of masked language models are several modules, each class with its own
        base = model.base_model
        base.forward = lambda *_, **__: BaseModelOutput(last_hidden_state=hidden[None])
        try:
            logits: Tensor = type(model).forward(model, input_ids=ids).logits[0]  # not what wraps the model
        finally:
            del base.forward
        return logits

    ids = torch.arange(1, 9, device=model.device)[None] % config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        for logits in (by_its_matrix, by_its_class):
            if gives(Head(logits), hidden, expected):
                return Head(logits, partial(map, model.get_parameter, _reached(logits, hidden, model)))
    raise ModelError(f"{type(model).__name__} computes its logits in a way that distill does not know; use transfer or refit, and please report it")


def _reached(logits: Callable[[Tensor], Tensor], hidden: Tensor, model: Any) -> list[str]:
    """Return the names of the parameters that logits depend on, wherever in the model they are: a head may be lent the embedding."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        return []
    with torch.enable_grad():
        gradients = torch.autograd.grad(logits(hidden.detach()).sum(), [*trained.values()], allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]


def gives(head: Head, hidden: Tensor, expected: Tensor) -> bool:
    """Whether a head computes these logits from hidden states."""
    try:
        logits = head(hidden)
    except RuntimeError:  # of another width
        return False
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= SAME * expected.abs().max())
