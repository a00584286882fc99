"""Distillation on transformers' Trainer: checkpoints, schedules and resuming are the Trainer's."""
# N = tokens in a step, M = hidden width.

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from effconvert.checkpoint.shards import read_header
from effconvert.errors import ModelError
from effconvert.heal._objective import Objective, head_of
from effconvert.heal._windows import Windows
from effconvert.heal.distill import Distill

EVALUATIONS = 10  # on held-out windows, in a run
WARMUP = 0.05  # of all steps


@dataclass(frozen=True)
class Distilled:
    """What became of a distillation: KL(teacher || student) on the held-out windows, in nats a token."""

    before: float
    after: float  # the least on the way; `before` where nothing was less
    best: Path | None  # the folder of the checkpoint that has it; None: the student as it was
    curve: Sequence[dict[str, float]]  # the number of tokens, and the KL after these


class Distiller(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is the distance from a teacher; on held-out windows it is KL(teacher || student)."""

    def __init__(self, teacher: Any, objective: Objective, **more: Any) -> None:
        super().__init__(**more)
        self.teacher, self.objective = teacher, objective
        self.head, self.teacher_head = head_of(self.model), head_of(teacher)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which accumulation averages

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights as any model is loaded: the Trainer would skip tensors that have other names on disk, such as those of experts."""
        (model or self.model).load_state_dict(type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict())

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """Return the loss of a batch of windows."""
        ids = inputs["input_ids"]
        with self.accelerator.autocast():  # the Trainer's own is around the model's `forward`, which is not called here
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)  # [N, M]
            with torch.no_grad():
                theirs = self.teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            objective = self.objective if model.training else Objective()
            loss = objective(hidden, self.head, theirs, self.teacher_head, ids[:, 1:].flatten())
        if not loss.isfinite():
            raise ModelError(f"the loss is {float(loss)} at step {self.state.global_step}; give a lower --rate, or another text")
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Return the loss alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


class _Advance(TrainerCallback):  # type: ignore[misc]
    """Tells a progress bar how many tokens are done."""

    def __init__(self, advance: Callable[[int], None], tokens: int) -> None:
        self.advance, self.tokens, self.done = advance, tokens, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar; a run that goes on begins with what was done before."""
        self.advance((state.global_step - self.done) * self.tokens)
        self.done = state.global_step


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


def distill(student: Any, teacher: Any, options: Distill, windows: Windows, place: Path, advance: Callable[[int], None]) -> Distilled:
    """Train `student`, and return which of the models on the way is best on held-out windows.

    Args:
        student: a language model in float32.
        teacher: another with the same tokens, in evaluation mode.
        options: of the training.
        windows: of the text.
        place: folder for the Trainer's checkpoints; what is there from a run with the same options is gone on with.
        advance: called with the number of tokens done.
    """
    teacher.requires_grad_(False)
    every = max(1, options.steps // EVALUATIONS)
    arguments = TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=options.windows,
        per_device_eval_batch_size=options.windows,
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
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        bf16=options.in_bfloat16(student.device.type),
        use_cpu=student.device.type == "cpu",
        seed=0,
    )
    bar = _Advance(advance, options.windows * options.window)
    train, held_out = ([{"input_ids": ids} for ids in rows] for rows in (windows.train, windows.held_out))
    trainer = Distiller(
        teacher,
        Objective(options.objective, options.temperature, options.ce),
        model=student,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[bar],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(place))
    found: dict[int, float] = {}
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            found.setdefault(entry["step"], entry["eval_loss"])  # a run that goes on measures its checkpoint again
    before, after = found[0], min(found.values())
    curve = [{"tokens": step * options.windows * options.window, "kl": kl} for step, kl in found.items()]
    best = trainer.state.best_model_checkpoint if after < before else None
    return Distilled(before, after, Path(best) if best else None, curve)
