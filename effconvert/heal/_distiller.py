"""The loss of a training: the distance from a teacher."""
# B = windows in a step, T = tokens in a window, N = tokens that count in a step, M = hidden width.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effconvert.errors import EffconvertError, ModelError
from effconvert.heal._hidden import distance, hidden_states
from effconvert.heal._objective import Head, Objective, head_of
from effconvert.heal._projections import Projections
from effconvert.heal._sharing import unchanged
from effconvert.heal._student_trainer import Scores, StudentTrainer
from effconvert.heal._windows import Item
from effconvert.heal.distill import Distill
from effconvert.modeling.transformers_internals import shard

MOST_KEPT = 2**28  # numbers of the teacher on held-out windows, from one measurement to the next: a gigabyte
NOTHING = 1e-3  # of the loss and gradient of a student that is something else: rounding


@dataclass(frozen=True)
class Predictions:
    """What a model computes for some tokens: hidden states after chosen layers and its last ones, [N, M] each, and the head for the logits of the last."""

    hidden: Sequence[Tensor]
    head: Head | None


class Distiller(StudentTrainer):
    """A Trainer whose loss is the distance from a teacher."""

    def __init__(self, teacher: Any, options: Distill, originals: Sequence[range], predicts: bool, scores: Scores | None, **more: Any) -> None:
        super().__init__(options, scores, **more)
        self.teacher = teacher
        rest = 1 - options.hidden  # of the loss, which divergence and cross-entropy share
        self.objective = Objective(options.objective, options.temperature, min(1.0, options.ce / rest) if rest else 0.0, again=self.is_fsdp_enabled)
        self.head: Head | None = head_of(self.model) if predicts else None
        self.measure = "kl" if predicts else "hidden"
        self.layers = list(range(len(originals) - 1)) if options.hidden else []
        self.teacher_layers = [originals[layer].stop - 1 for layer in self.layers]
        if options.compares_weights:
            self.same = unchanged(self.model, teacher, [layers.start for layers in originals])
            if options.unchanged_rate == 0 and all(name in self.same for name, parameter in self.model.named_parameters() if parameter.requires_grad):
                raise ModelError("every weight is as in the original, so --unchanged-rate 0 leaves nothing to train; leave it out")
        _route(self.model)
        self.teacher_head = self.use(teacher, predicts)
        self.held_out: dict[bytes, Tensor] = {}  # a batch of held-out windows -> the teacher's last hidden states of tokens that count, [N, M]

    def use(self, teacher: Any, predicts: bool) -> Head | None:
        """Get ready to ask the teacher, and return its head."""
        head = head_of(teacher) if predicts else None
        _route(teacher)
        if self.is_fsdp_enabled or self.zero_stage == 3:
            shard(teacher)
        return head

    def teachers(self, inputs: dict[str, Tensor]) -> tuple[Predictions, Tensor]:
        """Return what the teacher computes for all tokens that count, and their labels [N]."""
        with torch.no_grad():
            answer: tuple[Predictions, Tensor] = self.teacher(run=lambda: self.predictions(self.teacher, inputs, self.teacher_head, self.teacher_layers))
        return answer

    def predictions(self, model: Any, inputs: dict[str, Tensor], head: Head | None, layers: Sequence[int]) -> tuple[Predictions, Tensor]:
        """Run a model on windows, and return what it computes for all tokens that count, and their labels [N]."""
        known: dict[str, Tensor] = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
        counts = inputs["counts"]  # [B, T]
        return Predictions([states[counts] for states in hidden_states(model.base_model, known, layers)], head), inputs["labels"][counts]

    def loss(self, own: Predictions, theirs: Predictions, labels: Tensor, objective: Objective, hidden: float) -> Tensor:
        """Return the weighted sum of the distance of predictions and that of hidden states, a share `hidden` of the loss."""
        if not own.head or not theirs.head:
            return self.apart(own, theirs)
        apart = self.apart(own, theirs) if hidden else None
        if hidden == 1 and apart is not None:
            return apart
        loss = objective(own.hidden[-1], own.head, theirs.hidden[-1], theirs.head, labels)
        return loss if apart is None else (1 - hidden) * loss + hidden * apart

    def apart(self, own: Predictions, theirs: Predictions) -> Tensor:
        """Return the distance of hidden states, at the teacher's width."""
        same = own.hidden[-1].shape == theirs.hidden[-1].shape
        return distance(own.hidden if same or not self.projections else self.projections.project(own.hidden), theirs.hidden, self.options.hidden_loss)

    def fit_projections(self, items: Sequence[Item]) -> None:
        """Fit maps to the teacher's widths on some windows, before the first step, where hidden states are compared and have other widths."""
        if self.measure == "kl" and not self.options.hidden:
            return
        inputs = self._prepare_inputs({key: torch.stack([item[key] for item in items]) for key in items[0]})
        with torch.no_grad(), self.accelerator.autocast():
            own, theirs = self.predictions(self.model, inputs, self.head, self.layers)[0], self.teachers(inputs)[0]
        widths = [(mine.shape[-1], other.shape[-1]) for mine, other in zip(own.hidden, theirs.hidden, strict=True)]
        if any(mine != other for mine, other in widths):
            self.projections = Projections(widths).to(self.args.device)
            self.projections.fit(own.hidden, theirs.hidden)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """Return the loss of a batch of windows; what is held out is measured alike whatever is trained on."""
        with self.accelerator.autocast():
            loss = model(run=lambda: self.loss_of(inputs, model.training))
        if not loss.isfinite():
            raise ModelError(f"the loss is {float(loss)} at step {self.state.global_step}; give a lower --rate, or another text")
        return (loss, {"loss": loss}) if return_outputs else loss

    def loss_of(self, inputs: dict[str, Tensor], training: bool) -> Tensor:
        """Compute the loss of a batch, inside the call of the model that is trained."""
        own, labels = self.predictions(self.model, inputs, self.head, self.layers)
        loss = self.compared(own, labels, inputs, training)
        if self.balance and not training:
            self.balance.note(inputs["counts"])
        return loss + self.options.balance * self.balance.loss(inputs["counts"]) if self.balance and training and self.options.balance else loss

    def compared(self, own: Predictions, labels: Tensor, inputs: dict[str, Tensor], training: bool) -> Tensor:
        """Return the loss of what the student computes for a batch of windows."""
        if training:
            return self.loss(own, self.teachers(inputs)[0], labels, self.objective, self.options.hidden)
        return self.loss(own, self.held_out_predictions(inputs), labels, Objective(), 0.0)

    def held_out_predictions(self, inputs: dict[str, Tensor]) -> Predictions:
        """Return what the teacher computes for a batch of held-out windows: once for all measurements, if it can be kept."""
        numbers = len(self.eval_dataset) * self.options.window * self.teacher.config.get_text_config().hidden_size
        if self.teacher_head is None or numbers > MOST_KEPT or self.shares_weights_out:  # processes that share a teacher out must all run it
            return self.teachers(inputs)[0]
        batch = b"".join(inputs[key].cpu().numpy().tobytes() for key in ("input_ids", "counts"))
        if batch not in self.held_out:
            self.held_out[batch] = self.teachers(inputs)[0].hidden[-1].cpu()
        return Predictions([self.held_out[batch].to(self.args.device)], self.teacher_head)

    def check(self, item: Item) -> None:
        """Ask whether the teacher as its own student has neither loss nor gradient: what is minimised must be least there.

        Raises:
            EffconvertError: it has.
        """
        inputs = self._prepare_inputs({key: value[None] for key, value in item.items()})
        values = []
        with self.accelerator.autocast():
            theirs, labels = self.teachers(inputs)
        for shift in (0, 1):  # towards the same hidden states, and towards those with their numbers in other places
            hidden = [states.detach().clone().requires_grad_() for states in theirs.hidden]
            other = Predictions([states.roll(shift, -1) for states in theirs.hidden], theirs.head)
            with self.accelerator.autocast():
                loss = self.loss(Predictions(hidden, theirs.head), other, labels, replace(self.objective, ce=0.0), self.options.hidden)
            gradients = torch.autograd.grad(loss, hidden, allow_unused=True)
            values.append((abs(loss.item()), max((float(gradient.abs().max()) for gradient in gradients if gradient is not None), default=0.0)))
        if any(same > NOTHING * different for same, different in zip(*values, strict=True)):
            raise EffconvertError(f"a student that is its teacher has a loss of {values[0][0]:g}: a fault of effconvert, please report it")


def _route(model: Any) -> None:
    """Let a model run a function within its own call, where what wraps it (DDP, FSDP, ZeRO-3) gathers weights and gradients."""
    forward = model.forward
    model.forward = lambda *given, run=None, **more: run() if run else forward(*given, **more)
