"""Distillation on transformers' Trainer: checkpoints, schedules and resuming are the Trainer's."""
# B = windows in a step, T = tokens in a window, N = tokens that count in a step, M = hidden width.

import errno
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainingArguments

from effconvert import processes
from effconvert.checkpoint.shards import read_header
from effconvert.errors import EffconvertError, ModelError
from effconvert.heal._allocator import freed_memory_is_kept
from effconvert.heal._deadline import Deadline
from effconvert.heal._distiller import Distiller
from effconvert.heal._sharing import share
from effconvert.heal._student_trainer import WARMUP, Scores
from effconvert.heal._training_log import Clock, Report, Reporter, points
from effconvert.heal._windows import Windows
from effconvert.heal.distill import Distill
from effconvert.modeling.transformers_internals import checkpoint_activations
from effconvert.quiet import quiet_transformers

EVALUATIONS = 10  # on held-out windows, in a run
NEVER = 10**12  # steps
TIMED = 3  # steps that are done to say how long a training takes
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Distilled:
    """What became of a distillation: the distance from the teacher on the held-out windows."""

    measure: str  # `kl`, KL(teacher || student) in nats a token; or `hidden`, the distance of hidden states
    before: float
    after: float  # the least on the way; `before` where nothing was less
    best: Path | None  # the folder of the checkpoint that has it; None: the student as it was
    curve: Sequence[dict[str, Any]]  # tokens, seconds, the distance after these, and the mean loss since the point before


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
        if isinstance(error, OSError) and error.errno not in FULL:
            raise EffconvertError(f"training stopped ({error}); the same command goes on from the last checkpoint in {place}") from error
        raise EffconvertError(f"the checkpoints in {place} cannot be written ({error}); make room on that disk, and the same command goes on") from error
    except RuntimeError as error:  # torch.OutOfMemoryError, and what its allocator for CPUs raises
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            raise EffconvertError(
                "the memory is too small for a step; lower --batch-tokens or --window, or give --gradient-checkpointing, --lora or --unchanged-rate 0 "
                "(--dry-run says how much is needed), and the same command begins again"
            ) from error
        raise


def _memory(setting: "Setting") -> AbstractContextManager[None]:
    return freed_memory_is_kept() if setting.student.device.type == "cpu" else nullcontext()


@dataclass(frozen=True)
class Setting:
    """What is trained, towards what, on what, and where its checkpoints are.

    Args:
        student: a model in float32.
        teacher: another with the same tokens, in evaluation mode; or what a `kind` of its own takes for one.
        options: of the training.
        windows: of the text.
        originals: for each layer of the student, the layers of the teacher that it stands for.
        predicts: whether both have a head that predicts tokens.
        place: folder for the Trainer's checkpoints; what is there from a run with the same options is gone on with.
        files: what each checkpoint has beside weights and configuration, such as a tokenizer: names and contents.
        scores: what else is measured of the student, beside the distance on held-out windows.
        kind: of Distiller.
    """

    student: Any
    teacher: Any
    options: Distill
    windows: Windows
    originals: Sequence[range]
    predicts: bool
    place: Path
    files: Mapping[str, bytes]
    scores: Scores | None = None
    kind: type[Distiller] = Distiller

    def trainer(self, **arguments: Any) -> Distiller:
        """Return the Trainer, with some arguments in place of the usual ones."""
        if self.options.gradient_checkpointing:
            checkpoint_activations(self.student)
        trainer = self.kind(
            self.teacher,
            self.options,
            self.originals,
            self.predicts,
            self.scores,
            model=self.student,
            args=TrainingArguments(**{**_arguments(self.options, self.place, self.student.device.type), **arguments}),
            train_dataset=self.windows.train,
            eval_dataset=self.windows.held_out,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.files = self.files
        if self.options.keeps_unchanged:
            share(self.student, None if trainer.shares_weights_out else self.teacher, trainer.same)
        if self.options.lora:
            trainer.adapt()
        return trainer


def _arguments(options: Distill, place: Path, device: str) -> dict[str, Any]:
    """Return the arguments of the Trainer: AdamW with a cosine, checkpoints in `place`, and a measurement with each."""
    count = processes.count()
    every = NEVER if options.minutes else max(1, options.steps // EVALUATIONS)  # then the clock decides: see Deadline
    return {
        "output_dir": str(place),
        "per_device_train_batch_size": options.windows // count,
        "per_device_eval_batch_size": options.windows if count == 1 else 1,  # a batch that others fill up would be a mean of more windows
        "max_steps": options.steps,
        "learning_rate": options.rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(WARMUP * options.steps),
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "eval_strategy": "steps",
        "eval_steps": every,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": every,
        "report_to": [options.report_to],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "bf16": options.in_bfloat16(device),
        "use_cpu": device == "cpu",
        "seed": 0,
    }


def distill(setting: Setting, report: Report) -> Distilled:
    """Train the student, and return which of the models on the way is best on held-out windows."""
    options, windows, tokens = setting.options, setting.windows, setting.options.windows * setting.options.window
    trainer = setting.trainer()
    if options.minutes:
        trainer.add_callback(Deadline(trainer.progress, trainer.measured, EVALUATIONS))
    trainer.add_callback(Reporter(report, lambda: int(trainer.seconds) if options.minutes else trainer.state.global_step * tokens, tokens))
    trainer.check(windows.held_out[0])
    trainer.fit_projections(windows.held_out[: options.windows])
    with quiet_transformers(), _plain_errors(setting.place), _memory(setting):
        with trainer.accelerator.main_process_first():  # which removes what a kill left
            checkpoint = last_whole_checkpoint(setting.place)
        if not checkpoint or not trainer.was_done(Path(checkpoint)):
            trainer.train(resume_from_checkpoint=checkpoint)
    curve = points(trainer.state.log_history, tokens)
    before, after = curve[0]["held_out"], min(point["held_out"] for point in curve)
    best = trainer.state.best_model_checkpoint if after < before else None
    if best is None:
        report.tell("no model on the way was better on the held-out windows, so the model stays as it was; try a lower --rate, or more --train-tokens")
    return Distilled(trainer.measure, before, after, setting.place / Path(best).name if best else None, curve)  # the folder may have moved since


def seconds_of(setting: Setting) -> float:
    """Return the seconds that a training would take, from those of a step and of a measurement of one batch; the student is changed by it."""
    clock = Clock()
    trainer = setting.trainer(max_steps=TIMED, eval_strategy="no", eval_on_start=False, save_strategy="no", logging_steps=10**6, report_to=[])
    trainer.add_callback(clock)
    trainer.fit_projections(setting.windows.held_out[: setting.options.windows])
    batch = setting.windows.held_out[: trainer.args.per_device_eval_batch_size]
    with quiet_transformers(), _plain_errors(setting.place), _memory(setting):
        trainer.train()
        trainer.evaluate(batch)  # the first one runs the teacher too
        began = time.monotonic()
        trainer.evaluate(batch)
    measurement = (time.monotonic() - began) * len(setting.windows.held_out) / len(batch)
    return clock.seconds * setting.options.steps + measurement * (EVALUATIONS + 1)
