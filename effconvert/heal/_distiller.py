"""A Trainer whose loss is the distance from a teacher."""
# B = windows in a step, T = tokens in a window, N = tokens that count in a step, M = hidden width.

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from effconvert.errors import EffconvertError, ModelError
from effconvert.heal._deadline import rate
from effconvert.heal._hidden import distance, hidden_states
from effconvert.heal._objective import Head, Objective, head_of
from effconvert.heal._projections import Projections
from effconvert.heal._sharing import unchanged
from effconvert.heal._training_log import SCORE
from effconvert.heal._windows import Item
from effconvert.heal.distill import Distill
from effconvert.modeling.transformers_internals import shard

Scores = Callable[[Any], Mapping[str, float]]  # model -> its scores by name
WARMUP = 0.05  # of a training
NOTHING = 1e-3  # of the loss and gradient of a student that is something else: rounding


@dataclass(frozen=True)
class Predictions:
    """What a model computes for some tokens: hidden states after chosen layers and its last ones, [N, M] each, and the head for the logits of the last."""

    hidden: Sequence[Tensor]
    head: Head | None


class Distiller(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is the distance from a teacher."""

    def __init__(self, teacher: Any, options: Distill, originals: Sequence[range], predicts: bool, scores: Scores | None, **more: Any) -> None:
        super().__init__(**more)
        self.teacher, self.options, self.scores = teacher, options, scores
        rest = 1 - options.hidden  # of the loss, which divergence and cross-entropy share
        self.objective = Objective(options.objective, options.temperature, min(1.0, options.ce / rest) if rest else 0.0)
        self.head: Head | None = head_of(self.model) if predicts else None
        self.measure = "kl" if predicts else "hidden"
        self.layers = list(range(len(originals) - 1)) if options.hidden else []
        self.teacher_layers = [originals[layer].stop - 1 for layer in self.layers]
        own_width, width = (some.config.get_text_config().hidden_size for some in (self.model, teacher)) if options.hidden or not predicts else (0, 0)
        self.projections = Projections(len(self.layers) + 1, own_width, width).to(self.args.device) if own_width != width else None
        self.same: dict[str, str] = {}
        if options.unchanged_rate < 1:
            self.same = unchanged(self.model, teacher, [layers.start for layers in originals])
            if not options.unchanged_rate and all(name in self.same for name, parameter in self.model.named_parameters() if parameter.requires_grad):
                raise ModelError("every weight is as in the original, so --unchanged-rate 0 leaves nothing to train; leave it out")
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which accumulation averages
        self.began = time.monotonic()
        _route(self.model)
        self.teacher_head = self.use(teacher, predicts)

    def use(self, teacher: Any, predicts: bool) -> Head | None:
        """Get ready to ask the teacher, and return its head."""
        head = head_of(teacher) if predicts else None
        _route(teacher)
        if self.is_fsdp_enabled:
            shard(teacher)
        return head

    def teachers(self, inputs: dict[str, Tensor]) -> tuple[Predictions, Tensor]:
        """Return what the teacher computes for all tokens that count, and their labels [N]."""
        with torch.no_grad():
            answer: tuple[Predictions, Tensor] = self.teacher(run=lambda: self.predictions(self.teacher, inputs, self.teacher_head, self.teacher_layers))
        return answer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights as any model is loaded: the Trainer would skip tensors that have other names on disk, such as those of experts."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        (model or self.model).load_state_dict(type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict())
        if self.projections:
            self.projections.load(Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.projections and output_dir:
            self.projections.save(Path(output_dir))

    def create_optimizer(self, model: Any = None) -> Any:
        """Give weights that are as in the teacher a rate of their own, or none."""
        if self.same:
            trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            new, old = ([parameter for name, parameter in trained if (name in self.same) == same] for same in (False, True))
            rate, betas = self.args.learning_rate, (self.args.adam_beta1, self.args.adam_beta2)
            groups = [{"params": new}, *([{"params": old, "lr": rate * self.options.unchanged_rate}] if old else [])]
            self.optimizer: Any = torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=0.0)
        else:
            super().create_optimizer(model)
        if self.projections:
            self.optimizer.add_param_group({"params": [*self.projections.parameters()]})
            self.optimizer.register_step_post_hook(lambda *_: self.projections.zero_grad())  # the Trainer does so for the model alone
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate fall with the steps, or with the time if that is limited."""
        if not self.options.minutes:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler: Any = LambdaLR(self.optimizer if optimizer is None else optimizer, lambda _: rate(self.progress(), WARMUP))
        return self.lr_scheduler

    @property
    def seconds(self) -> float:
        """The time that training has taken until now, with that of the runs that this one goes on with."""
        before: float = next((entry["seconds"] for entry in reversed(self.state.log_history) if "seconds" in entry), 0.0)
        seconds: float = before + time.monotonic() - self.began
        return seconds

    def progress(self) -> float:
        """Return the share of the training that is over, by the first process's clock if minutes are limited."""
        steps: float = self.state.global_step / self.options.steps
        if not self.options.minutes:
            return steps
        clock = torch.tensor(self.seconds / 60 / self.options.minutes, device=self.args.device)
        return max(steps, float(broadcast(clock)))

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
        """Fit the maps to the teacher's width on some windows, before the first step."""
        if not self.projections:
            return
        inputs = self._prepare_inputs({key: torch.stack([item[key] for item in items]) for key in items[0]})
        with torch.no_grad(), self.accelerator.autocast():
            own, theirs = self.predictions(self.model, inputs, self.head, self.layers)[0], self.teachers(inputs)[0]
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
        return self.compared(own, labels, inputs, training)

    def compared(self, own: Predictions, labels: Tensor, inputs: dict[str, Tensor], training: bool) -> Tensor:
        """Return the loss of what the student computes for a batch of windows."""
        objective, hidden = (self.objective, self.options.hidden) if training else (Objective(), 0.0)
        return self.loss(own, self.teachers(inputs)[0], labels, objective, hidden)

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

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Add the time that training took until now, and the scores of the model to a measurement."""
        if "eval_loss" in logs and self.scores:
            with torch.no_grad(), self.accelerator.autocast():
                logs |= {f"{SCORE}{name}": value for name, value in self.scores(self.model).items()}
        logs["seconds"], self.began = round(self.seconds, 1), time.monotonic()
        super().log(logs, *more, **named)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Return the loss alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


def _route(model: Any) -> None:
    """Let a model run a function within its own call, where what wraps it (DDP, FSDP) gathers weights and gradients."""
    forward = model.forward
    model.forward = lambda *given, run=None, **more: run() if run else forward(*given, **more)
