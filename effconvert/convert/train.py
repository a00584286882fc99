"""Distillation as the last step of a conversion: convert by the steps before it, train, and write the best model on the way.

`OUT.training` holds the converted model and the Trainer's checkpoints while that runs. The same command goes on there.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from effconvert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from effconvert.checkpoint.manifest import to_disk
from effconvert.checkpoint.shards import FLOATS, StoredTensor, as_bytes, copy_run, header
from effconvert.convert.calibration import DOCSTRINGS
from effconvert.convert.plan import Plan, Target
from effconvert.convert.selftext import SELF
from effconvert.convert.write import write_others
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.eval.quality.perplexity import windows
from effconvert.eval.quality.text import MOST, calibration_text, read_calibration
from effconvert.heal._windows import Windows
from effconvert.heal.distill import Distill
from effconvert.modeling import loading
from effconvert.progress import Advance, Progress

MARK = "effconvert-training.json"  # in OUT.training: which conversion it belongs to
LEAST = 4  # windows of a text to train on
TRAINING = 16  # bytes for each weight: itself, its gradient and the two moments of AdamW, in float32


def training_folder(output: Path) -> Path:
    """Return where a distillation keeps its checkpoints."""
    return output.with_name(output.name + ".training")


def check_training(plan: Plan, output: Path) -> None:
    """Refuse a folder for checkpoints that is somebody else's, and models that do not fit memory, before anything is written.

    Raises:
        OptionError: the reason.
    """
    folder = training_folder(output)
    if folder.is_symlink() or (folder.exists() and not (folder / MARK).is_file()):
        raise OptionError(f"{folder} is in the way and effconvert did not write it; move it, or give another --output")
    if torch.cuda.device_count() > 1:
        raise OptionError(f"{torch.cuda.device_count()} GPUs are visible, and distill trains on one; choose it with CUDA_VISIBLE_DEVICES=0")
    need, free = training_bytes(plan), psutil.virtual_memory().available
    if not torch.accelerator.is_available() and need > free:
        raise OptionError(f"distill needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; use refit or transfer, or a larger machine")


def training_bytes(plan: Plan) -> int:
    """Estimate the bytes of memory of a distillation: the weights being trained, the teacher, and activations of a step."""
    options = plan.surgeries[-1]
    assert isinstance(options, Distill)
    config, tokens = plan.config, options.windows * options.window
    activations = 4 * tokens * config.layers * (12 * config.hidden + 3 * config.ffn + config.heads * options.window)
    return TRAINING * plan.after.parameters + plan.before.bytes + activations


@dataclass(frozen=True)
class TrainingText:
    """A text to train on, in windows [N, T]."""

    name: str
    ids: Tensor

    @property
    def sha256(self) -> str:
        """The hash of all windows."""
        return hashlib.sha256(f"{[*self.ids.shape]}".encode() + self.ids.numpy().tobytes()).hexdigest()


def read_text(plan: Plan) -> TrainingText:
    """Read the text of a distillation, before anything is written.

    Raises:
        OptionError: it cannot be read, or is too short.
        ModelError: the model has no tokenizer, or another vocabulary than the teacher.
    """
    options, folder = plan.surgeries[-1], plan.checkpoint.folder
    assert isinstance(options, Distill)
    if not loading.has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer, so it cannot be trained on a text; put it there")
    if options.data == SELF:
        raise OptionError("--data self is not possible: training needs more text than a model writes in time; give a file, or a dataset")
    text = calibration_text() if options.data == DOCSTRINGS else read_calibration(options.data, "--data")
    vocabulary = min(plan.checkpoint.config.vocabulary, plan.teacher.config.vocabulary)
    ids = windows(loading.load_tokenizer(folder), text, options.window, MOST, vocabulary)
    if len(ids) < LEAST:
        raise OptionError(f"{text.name} has {ids.numel()} tokens, and --window {options.window} needs {LEAST * options.window}; give a longer --data")
    return TrainingText(text.name, ids)


def train(plan: Plan, student: Path, text: TrainingText, output: Path, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Distil the model in `student`, and return the folder of the best model on the way, and what happened.

    Raises:
        ModelError: a model computes NaN, or its logits in a way that is not known.
    """
    from effconvert.heal._distilling import distill  # imports transformers' Trainer, which is slow

    options, folder, checkpoint = plan.surgeries[-1], training_folder(output), open_checkpoint(student)
    assert isinstance(options, Distill)
    model = loading.load(student, checkpoint.config, torch.float32)
    teacher = loading.load(plan.teacher.folder, plan.teacher.config, plan.teacher.computing)
    split = Windows.split(text.ids, options.recall)
    with progress.bar("distilling", options.steps * options.windows * options.window, "tokens") as advance:
        result = distill(model, teacher, options, split, folder / "checkpoints", advance)
    record = {
        "text": text.name,
        "sha256": text.sha256,
        "kl_before": result.before,
        "kl_after": result.after,
        "curve": list(result.curve),
        "held_out_windows": len(split.held_out),
    }
    return result.best or student, record


def begin(plan: Plan, output: Path) -> Path:
    """Make the folder for checkpoints; one of another conversion is emptied."""
    folder = training_folder(output)
    mark = folder / MARK
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")).get("fingerprint") != plan.fingerprint:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"fingerprint": plan.fingerprint}), encoding="utf-8")
    return folder


def discard(output: Path) -> None:
    """Remove the checkpoints, when everything is written."""
    folder = training_folder(output)
    if (folder / MARK).is_file():
        shutil.rmtree(folder)


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
