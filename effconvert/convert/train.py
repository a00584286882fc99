"""Distillation as the last step of a conversion: convert by the steps before it, train, and write the best model on the way.

`OUT.training` holds the converted model and the Trainer's checkpoints while that runs. The same command goes on there.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from effconvert import processes
from effconvert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from effconvert.checkpoint.manifest import DRAFT, to_disk
from effconvert.checkpoint.shards import FLOATS, StoredTensor, as_bytes, copy_run, header
from effconvert.convert.files import other_files
from effconvert.convert.output import MARK, remove, trained_for, training_folder
from effconvert.convert.plan import Plan, Target
from effconvert.convert.scores import scores
from effconvert.convert.teacher_cache import check_cache, filled, most_bytes, options_of
from effconvert.convert.teacher_cache import record as cache_record
from effconvert.convert.training_text import TrainingText, items
from effconvert.convert.write import write_others
from effconvert.errors import EffconvertError, OptionError
from effconvert.eval.training import Point, Training
from effconvert.heal._sharing import LAYER
from effconvert.heal._windows import Windows, held_out
from effconvert.modeling import loading
from effconvert.modeling.precision import fast, slow, type_of
from effconvert.paths import real
from effconvert.progress import Advance, Progress
from effconvert.quantities import duration, size

if TYPE_CHECKING:
    from effconvert.heal._distilling import Setting

CHECKPOINTS = 4  # at a time: the last two, the best, and one that is being written
TRAINING = 16  # bytes for each weight: itself, its gradient and the two moments of AdamW, in float32


def check_training(plan: Plan, output: Path, text: TrainingText) -> None:
    """Refuse folders that are somebody else's, and models that do not fit memory, before anything is written.

    Raises:
        OptionError: the reason.
    """
    folder = training_folder(output)
    if folder.is_symlink() or (folder.exists() and not (folder / MARK).is_file() and {path.name for path in folder.iterdir()} - {f"{MARK}{DRAFT}"}):
        raise OptionError(f"{folder} is in the way and effconvert did not write it; move it, or give another --output")
    if processes.count() == 1 and (gpus := torch.cuda.device_count()) > 1:
        raise OptionError(
            f"{gpus} GPUs are visible, and this is one process; start one for each (accelerate launch --num_processes {gpus} -m effconvert ...), "
            "or choose a GPU with CUDA_VISIBLE_DEVICES=0"
        )
    from effconvert.modeling.transformers_internals import reporting_integrations  # imports transformers, for which other conversions need not wait

    report_to = options_of(plan).report_to
    if report_to not in ("none", "all", *(installed := reporting_integrations())):
        others = f"one of: {', '.join(installed)}" if installed else "install it first; no logger is installed"
        raise OptionError(f"--report-to {report_to} is not installed, or transformers does not know it; give none, or {others}")
    need, free = training_bytes(plan), psutil.virtual_memory().available
    if not torch.accelerator.is_available() and need > free:
        raise OptionError(
            f"distill needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; lower --batch-tokens or --window, give --gradient-checkpointing, "
            "--lora or --unchanged-rate 0, or use refit or transfer"
        )
    place = next(parent for parent in real(folder).parents if parent.exists())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0  # from an interrupted run
    if (need := checkpoint_bytes(plan) - there) > (free := shutil.disk_usage(place).free):
        raise OptionError(f"{folder} needs up to {size(need)} for checkpoints, and {place} has {size(free)} free; give an --output on another disk")
    scores(plan)  # also loads the tasks
    if getattr(plan.surgeries[-1], "cache_teacher", None):
        check_cache(plan, output, items(plan, text))


def training_bytes(plan: Plan) -> int:
    """Estimate the bytes of memory of a distillation: the weights being trained, the teacher, and activations of a step."""
    options = options_of(plan)
    config, activations = plan.config, _activation_bytes(plan)
    if options.keeps_unchanged:  # at least: what an earlier conversion changed is known when the models are loaded
        trained = sum(_trained(target, options.lora) for target in plan.targets)
        both = plan.after.parameters + plan.before.parameters  # before the weights that they share are there once
        return max(4 * both, 4 * plan.after.parameters + TRAINING * trained + activations)
    student, teacher = TRAINING * plan.after.parameters + activations, type_of(plan.teacher).itemsize * plan.before.parameters
    return max(student + 4 * config.vocabulary * config.hidden, teacher) if options.cache_teacher else student + teacher  # of a cached teacher the head alone


def _activation_bytes(plan: Plan) -> int:
    """Estimate the bytes of the activations of a step."""
    options, config = options_of(plan), plan.config
    layer = 12 * config.hidden + 3 * config.ffn + config.heads * options.window
    return 4 * options.windows * options.window * (config.layers * config.hidden + layer if options.gradient_checkpointing else config.layers * layer)


def _trained(target: Target, rank: int) -> int:
    """Return how many numbers are trained for a tensor: all that the conversion computes, and for a layer's matrix that stays those of its adapter."""
    if target.unit is not None:
        return math.prod(target.shape)
    return rank * sum(target.shape) if len(target.shape) == 2 and LAYER.fullmatch(target.name) else 0


def checkpoint_bytes(plan: Plan) -> int:
    """Estimate the bytes of disk of checkpoints: weights and the optimiser's two moments, in float32."""
    return CHECKPOINTS * 12 * plan.after.parameters


def remarks(plan: Plan, text: TrainingText, output: Path) -> tuple[str, ...]:
    """Return what the plan says of memory, of text that is too short, and of the disk that a teacher's predictions take."""
    options, fresh = options_of(plan), int((~held_out(len(text.ids))).sum()) * text.ids.shape[1]
    about = "at least" if options.keeps_unchanged else "about"
    lines = [f"training takes {about} {size(training_bytes(plan))} of memory, and until it is done {size(checkpoint_bytes(plan))} of disk"]
    if remark := {"bfloat16": slow(None, torch.bfloat16, "--precision"), "auto": fast(None, "--precision")}.get(options.precision):
        lines.append(remark)
    if not options.minutes and (asked := options.steps * options.windows * options.window) > fresh:
        lines.append(f"the text has {fresh:,} tokens to train on, and {asked:,} are read, some of them again; more text teaches more than the same again")
    if is_of_another(plan, output):
        lines.append(
            f"{training_folder(output)} has checkpoints of a run with other options, another text or another version of effconvert, which will be removed"
        )
    if folder := getattr(plan.surgeries[-1], "cache_teacher", None):
        most = size(most_bytes(plan, items(plan, text)))
        lines.append(f"the original's predictions take up to {most} in {folder}; those that are there already are read")
    return tuple(lines)


def time_remark(plan: Plan, text: TrainingText, progress: Progress) -> tuple[str, ...]:
    """Return what the plan says of the time, after a few steps.

    Nothing where the user limits it, where several processes would share it, or where both models may not fit memory.
    """
    options = options_of(plan)
    if options.minutes or options.cache_teacher or processes.count() > 1:
        return ()
    converted = len(plan.surgeries) == 1
    need = training_bytes(plan) if converted else (TRAINING + 4) * plan.before.parameters + _activation_bytes(plan)
    if not torch.accelerator.is_available() and need > psutil.virtual_memory().available:
        return (f"how long training takes is not known: a step of the original, which stands in for the model, needs {size(need)} of memory",)
    progress.step("doing a few steps of the training")
    stand_in = "" if converted else ", with the original in the place of the model"
    stand_in += ", without --tasks and --passkey" if options.tasks or options.passkey else ""
    return (f"training takes about {duration(seconds(plan, text))} here, from a few of its steps{stand_in}",)


def train(plan: Plan, student: Path, text: TrainingText, output: Path, progress: Progress) -> tuple[Path, Training]:
    """Distil the model in `student`, and return the folder of the best model on the way, and what happened.

    Raises:
        ModelError: a model computes NaN, or its logits in a way that is not known.
    """
    from effconvert.heal._distilling import distill  # imports transformers' Trainer, which is slow
    from effconvert.heal._training_log import Report

    options, data, cache = options_of(plan), items(plan, text), None
    if options.cache_teacher:
        from effconvert.heal._cached_distilling import CachedDistiller
        from effconvert.heal._teacher_cache import windows_of

        teacher = filled(plan, data, progress)
        data, cache = windows_of(teacher), cache_record(teacher)
        setting = _setting(plan, student, data, output, teacher=teacher, kind=CachedDistiller, scores=scores(plan))
    else:
        setting = _setting(plan, student, data, output, scores=scores(plan))
    tokens = options.steps * options.windows * options.window
    with progress.bar("distilling", *((round(60 * options.minutes), "seconds") if options.minutes else (tokens, "tokens"))) as advance:
        result = distill(setting, Report(advance, progress.log))
    curve = tuple(Point(**point) for point in result.curve)
    return result.best or student, Training(text.name, text.sha256, result.measure, result.before, result.after, curve, len(data.held_out), cache)


def seconds(plan: Plan, text: TrainingText) -> float:
    """Return how long a training takes, from a few of its steps; where other steps precede, with the model as it is before them."""
    from effconvert.heal._distilling import seconds_of

    converted = len(plan.surgeries) == 1
    originals = layers_of_the_teacher(plan) if converted else [range(layer, layer + 1) for layer in range(plan.checkpoint.config.layers)]
    with TemporaryDirectory(prefix="effconvert-time-") as scratch:
        setting = _setting(plan, plan.checkpoint.folder, items(plan, text), Path(scratch) / "none", originals=originals)
        if not converted:  # all weights are as in the original, and a share of the rate takes no less time
            setting = replace(setting, options=setting.options.model_copy(update={"unchanged_rate": 1.0}))
        return seconds_of(setting)


def _setting(plan: Plan, student: Path, data: Windows, output: Path, teacher: Any = None, originals: Sequence[range] = (), **more: Any) -> "Setting":
    """Load the models of a training."""
    from effconvert.heal._distilling import Setting

    options, checkpoint = options_of(plan), open_checkpoint(student)
    if teacher is None:
        computing = torch.float32 if options.keeps_unchanged else type_of(plan.teacher)  # as the student's weights, of which it has some
        teacher = loading.load(plan.teacher.folder, plan.teacher.config, computing).requires_grad_(False)
    model, predicts = loading.load(student, checkpoint.config, torch.float32), checkpoint.config.predicts and plan.teacher.config.predicts
    originals = originals or layers_of_the_teacher(plan)
    others = other_files(checkpoint, checkpoint.config)
    files = {name: others.edits[name].encode() if name in others.edits else (student / name).read_bytes() for name in others.files}
    return Setting(model, teacher, options, data, originals, predicts, training_folder(output) / "checkpoints", files, **more)


def layers_of_the_teacher(plan: Plan) -> list[range]:
    """Return for each layer of the converted model the layers of the teacher that it stands for: its own, and those dropped after it."""
    starts = [layer.originals.start for layer in plan.models("meta")[-1].layers]
    stops = [*starts[1:], plan.teacher.config.layers]
    return [range(start, max(start + 1, stop)) for start, stop in zip(starts, stops, strict=True)]


def begin(plan: Plan, output: Path) -> Path:
    """Make the folder for checkpoints; one of another conversion is emptied."""
    folder = training_folder(output)
    if is_of_another(plan, output):
        remove(folder, MARK)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{MARK}{DRAFT}"
    draft.write_text(json.dumps({"fingerprint": plan.fingerprint}), encoding="utf-8")
    draft.replace(folder / MARK)
    return folder


def is_of_another(plan: Plan, output: Path) -> bool:
    """Whether there are checkpoints of another conversion, or of other options."""
    return trained_for(output) not in (None, plan.fingerprint)


def write_trained(plan: Plan, trained: Checkpoint, partial: Path, advance: Advance) -> None:
    """Write the shards of `plan` with the tensors of `trained`, in the types of the original's."""
    stored, buffers = {tensor.name: tensor for tensor in trained.stored}, tuple(f".{buffer}" for buffer in plan.config.family.buffers)
    for name, targets in plan.shards.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(header({target.name: (target.dtype, target.shape) for target in targets}))
            for target in targets:
                if target.dtype not in FLOATS or target.name.endswith(buffers):  # no parameter: it is as it was
                    origin = stored.get(target.name, target.origin)
                    with origin.file.open("rb", buffering=0) as original:
                        copy_run(original, file, origin.start, origin.stop, advance)
                    continue
                file.write(as_bytes(_numbers(plan, target, stored), target.dtype, target.name))
                advance(target.bytes)
        to_disk(path)
    write_others(plan, partial)


def _numbers(plan: Plan, target: Target, stored: Mapping[str, StoredTensor]) -> Tensor:
    """Return a trained tensor; a head that is the embedding is stored once."""
    if target.name in stored:
        return stored[target.name].read("cpu")
    embedding = next((tensor for name, tensor in stored.items() if name.endswith(f"{plan.config.family.outer['embed']}.weight")), None)
    if plan.config.tied and embedding is not None and tuple(embedding.shape) == target.shape:
        return embedding.read("cpu")
    raise EffconvertError(f"the trained model has no {target.name}: a fault of effconvert, please report it")
