"""Distillation on transformers' Trainer: checkpoints, schedules and resuming are the Trainer's."""
# B = windows in a step, T = tokens in a window, N = tokens that count in a step, M = hidden width.

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from effconvert.checkpoint.shards import read_header
from effconvert.errors import EffconvertError, ModelError
from effconvert.heal._hidden import distance, hidden_states
from effconvert.heal._objective import Head, Objective, head_of
from effconvert.heal._sharing import share, unchanged
from effconvert.heal._windows import Item, Windows
from effconvert.heal.distill import Distill
from effconvert.modeling.transformers_internals import checkpoint_activations, shard
from effconvert.progress import Advance
from effconvert.quiet import quiet_transformers

EVALUATIONS = 10  # on held-out windows, in a run
WARMUP = 0.05  # of all steps
NOTHING = 1e-3  # of the loss and gradient of a student that is something else: rounding


@dataclass(frozen=True)
class Report:
    """What shows the progress of a training: told the number of tokens done, and lines of its log."""

    advance: Advance
    tell: Callable[[str], None]


@dataclass(frozen=True)
class Distilled:
    """What became of a distillation: the distance from the teacher on the held-out windows."""

    measure: str  # `kl`, KL(teacher || student) in nats a token; or `hidden`, the distance of hidden states
    before: float
    after: float  # the least on the way; `before` where nothing was less
    best: Path | None  # the folder of the checkpoint that has it; None: the student as it was
    curve: Sequence[dict[str, Any]]  # tokens, seconds, the distance after these, and the mean loss since the point before


@dataclass(frozen=True)
class Predictions:
    """What a model computes for some tokens: hidden states after chosen layers and its last ones, [N, M] each, and the head for the logits of the last."""

    hidden: Sequence[Tensor]
    head: Head | None


class Distiller(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is the distance from a teacher."""

    def __init__(self, teacher: Any, options: Distill, originals: Sequence[range], predicts: bool, **more: Any) -> None:
        super().__init__(**more)
        self.teacher, self.options = teacher, options
        self.objective = Objective(options.objective, options.temperature, options.ce)
        self.head: Head | None = head_of(self.model) if predicts else None
        self.measure = "kl" if predicts else "hidden"
        self.layers = list(range(len(originals) - 1)) if options.hidden else []
        self.teacher_layers = [originals[layer].stop - 1 for layer in self.layers]
        self.same: dict[str, str] = {}
        if options.unchanged_rate < 1:
            self.same = unchanged(self.model, teacher, [layers.start for layers in originals])
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

    def create_optimizer(self, model: Any = None) -> Any:
        """Give weights that are as in the teacher a rate of their own, or none."""
        if self.same:
            trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            new, old = ([parameter for name, parameter in trained if (name in self.same) == same] for same in (False, True))
            rate, betas = self.args.learning_rate, (self.args.adam_beta1, self.args.adam_beta2)
            groups = [{"params": new}, *([{"params": old, "lr": rate * self.options.unchanged_rate}] if old else [])]
            self.optimizer: Any = torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=0.0)
            return self.optimizer
        return super().create_optimizer(model)

    def predictions(self, model: Any, inputs: dict[str, Tensor], head: Head | None, layers: Sequence[int]) -> tuple[Predictions, Tensor]:
        """Run a model on windows, and return what it computes for all tokens that count, and their labels [N]."""
        known: dict[str, Tensor] = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
        counts = inputs["counts"]  # [B, T]
        return Predictions([states[counts] for states in hidden_states(model.base_model, known, layers)], head), inputs["labels"][counts]

    def loss(self, own: Predictions, theirs: Predictions, labels: Tensor, objective: Objective, hidden: float) -> Tensor:
        """Return the weighted sum of the distance of predictions and that of hidden states, a share `hidden` of the loss."""
        if not own.head or not theirs.head:
            return distance(own.hidden, theirs.hidden, self.options.hidden_loss)
        loss = objective(own.hidden[-1], own.head, theirs.hidden[-1], theirs.head, labels)
        return (1 - hidden) * loss + hidden * distance(own.hidden, theirs.hidden, self.options.hidden_loss) if hidden else loss

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
        for shift in (0, 1):  # each token towards itself, and towards the one before it
            hidden = [states.detach().clone().requires_grad_() for states in theirs.hidden]
            other = Predictions([states.roll(shift, 0) for states in theirs.hidden], theirs.head)
            with self.accelerator.autocast():
                loss = self.loss(Predictions(hidden, theirs.head), other, labels, replace(self.objective, ce=0.0), self.options.hidden)
            gradients = torch.autograd.grad(loss, hidden, allow_unused=True)
            values.append((abs(loss.item()), max((float(gradient.abs().max()) for gradient in gradients if gradient is not None), default=0.0)))
        if any(same > NOTHING * different for same, different in zip(*values, strict=True)):
            raise EffconvertError(f"a student that is its teacher has a loss of {values[0][0]:g}: a fault of effconvert, please report it")

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Note the time that training took until now, with that of the runs that this one goes on with."""
        before = next((entry["seconds"] for entry in reversed(self.state.log_history) if "seconds" in entry), 0.0)
        now = time.monotonic()
        logs["seconds"], self.began = round(before + now - self.began, 1), now
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


class _Report(TrainerCallback):  # type: ignore[misc]
    """Tells a progress bar how many tokens are done, and how far the student is after each evaluation."""

    def __init__(self, advance: Advance, tell: Callable[[str], None], tokens: int) -> None:
        self.advance, self.tell, self.tokens, self.done = advance, tell, tokens, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar; a run that goes on begins with what was done before."""
        self.advance((state.global_step - self.done) * self.tokens)
        self.done = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what was measured."""
        self.tell(line(points(state.log_history, self.tokens)[-1]))


def points(history: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return the curve of a Trainer's log, for steps of so many tokens."""
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    found: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "eval_loss" in entry:  # a run that goes on measures its checkpoint again
            step = entry["step"]
            point = {"tokens": step * tokens, "seconds": entry["seconds"], "held_out": entry["eval_loss"]}
            found.setdefault(step, {**point, **({"loss": losses[step]} if step in losses else {})})
    return list(found.values())


def line(point: dict[str, Any]) -> str:
    """Write a point of a curve for people."""
    loss = f", loss {point['loss']:.4f}" if "loss" in point else ""
    return f"{point['tokens']:>12,.0f} tokens, {point['seconds']:.0f} s: held-out {point['held_out']:.4f}{loss}"


def last_whole_checkpoint(place: Path) -> str | None:
    """Return the newest checkpoint in a folder; those that a kill left unfinished are removed."""
    for folder in sorted(place.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            for file in folder.glob("*.safetensors"):
                read_header(file)
            return str(folder)
        except (OSError, ValueError, ModelError):
            shutil.rmtree(folder)
    return None


@contextmanager
def _plain_errors(place: Path) -> Iterator[None]:
    """Say what to do about a device that is too small and a disk that is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise EffconvertError(f"the checkpoints in {place} cannot be written ({error}); make room on that disk, and the same command goes on") from error
    except RuntimeError as error:  # torch.OutOfMemoryError, and what its allocator for CPUs raises
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            raise EffconvertError(
                "the memory is too small for a step; lower --batch-tokens or --window, or give --gradient-checkpointing or --unchanged-rate 0 "
                "(--dry-run says how much is needed), and the same command begins again"
            ) from error
        raise


def distill(
    student: Any,
    teacher: Any,
    options: Distill,
    windows: Windows,
    originals: Sequence[range],
    predicts: bool,
    place: Path,
    report: Report,
    kind: type[Distiller] = Distiller,
) -> Distilled:
    """Train `student`, and return which of the models on the way is best on held-out windows.

    Args:
        student: a model in float32.
        teacher: another with the same tokens, in evaluation mode; or what a `kind` of its own takes for one.
        options: of the training.
        windows: of the text.
        originals: for each layer of the student, the layers of the teacher that it stands for.
        predicts: whether both have a head that predicts tokens.
        place: folder for the Trainer's checkpoints; what is there from a run with the same options is gone on with.
        report: what shows the progress.
        kind: of Distiller.
    """
    if options.gradient_checkpointing:
        checkpoint_activations(student)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    every = max(1, options.steps // EVALUATIONS)
    arguments = TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=options.windows // processes,
        per_device_eval_batch_size=options.windows if processes == 1 else 1,  # a batch that others fill up would be a mean of more windows
        max_steps=options.steps,
        learning_rate=options.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(WARMUP * options.steps)),
        adam_beta2=0.95,
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=every,
        report_to=[options.report_to],
        disable_tqdm=True,
        remove_unused_columns=False,
        bf16=options.in_bfloat16(student.device.type),
        use_cpu=student.device.type == "cpu",
        seed=0,
    )
    trainer = kind(
        teacher,
        options,
        originals,
        predicts,
        model=student,
        args=arguments,
        train_dataset=windows.train,
        eval_dataset=windows.held_out,
        callbacks=[_Report(report.advance, report.tell, options.windows * options.window)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.check(windows.held_out[0])
    if not options.unchanged_rate:
        share(student, None if trainer.is_fsdp_enabled else teacher, trainer.same)
    with quiet_transformers(), _plain_errors(place):
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(place))
    curve = points(trainer.state.log_history, options.windows * options.window)
    before, after = curve[0]["held_out"], min(point["held_out"] for point in curve)
    best = trainer.state.best_model_checkpoint if after < before else None
    return Distilled(trainer.measure, before, after, Path(best) if best else None, curve)
