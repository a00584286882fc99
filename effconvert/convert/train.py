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
from effconvert.convert import processes
from effconvert.convert.calibration import DOCSTRINGS, special_ends
from effconvert.convert.plan import Plan, Target
from effconvert.convert.selftext import SELF
from effconvert.convert.teacher_cache import check_cache, filled, most_bytes
from effconvert.convert.teacher_cache import record as cache_record
from effconvert.convert.write import write_others
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.eval.quality.perplexity import beginning, windows
from effconvert.eval.quality.text import MOST, ROWS, Documents, Text, calibration_text, read_calibration, read_documents
from effconvert.eval.training import Point, Training
from effconvert.heal._documents import Filled, predicted_tokens, windows_of_conversations, windows_of_texts
from effconvert.heal._windows import Windows, held_out, masked, next_tokens, repeating, unlabelled
from effconvert.heal.distill import Distill
from effconvert.modeling import loading
from effconvert.modeling.transformers_internals import reporting_integrations
from effconvert.paths import expand
from effconvert.progress import Advance, Progress
from effconvert.quantities import size

MARK = "effconvert-training.json"  # in OUT.training: which conversion it belongs to
LEAST = 4  # windows of a text to train on
TRAINING = 16  # bytes for each weight: itself, its gradient and the two moments of AdamW, in float32


def _options(plan: Plan) -> Distill:
    """Return the options of the last step of a plan, which is a distillation."""
    options = plan.surgeries[-1]
    assert isinstance(options, Distill)
    return options


def training_folder(output: Path) -> Path:
    """Return where a distillation keeps its checkpoints."""
    return output.with_name(output.name + ".training")


def check_training(plan: Plan, output: Path, text: "TrainingText") -> None:
    """Refuse folders that are somebody else's, and models that do not fit memory, before anything is written.

    Raises:
        OptionError: the reason.
    """
    folder = training_folder(output)
    if folder.is_symlink() or (folder.exists() and not (folder / MARK).is_file()):
        raise OptionError(f"{folder} is in the way and effconvert did not write it; move it, or give another --output")
    if processes.count() == 1 and (gpus := torch.cuda.device_count()) > 1:
        raise OptionError(
            f"{gpus} GPUs are visible, and this is one process; start one for each (accelerate launch --num_processes {gpus} -m effconvert ...), "
            "or choose a GPU with CUDA_VISIBLE_DEVICES=0"
        )
    report_to = _options(plan).report_to
    if report_to not in ("none", "all") and report_to not in (installed := reporting_integrations()):
        raise OptionError(f"--report-to {report_to} is not installed, or transformers does not know it; give none, all, or one of: {', '.join(installed)}")
    need, free = training_bytes(plan), psutil.virtual_memory().available
    if not torch.accelerator.is_available() and need > free:
        raise OptionError(f"distill needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; use refit or transfer, or a larger machine")
    if getattr(plan.surgeries[-1], "cache_teacher", None):
        check_cache(plan, output, items(plan, text))


def training_bytes(plan: Plan) -> int:
    """Estimate the bytes of memory of a distillation: the weights being trained, the teacher, and activations of a step."""
    options = _options(plan)
    config, tokens = plan.config, options.windows * options.window
    activations = 4 * tokens * config.layers * (12 * config.hidden + 3 * config.ffn + config.heads * options.window)
    student, teacher = TRAINING * plan.after.parameters + activations, plan.before.bytes
    return max(student + 4 * config.vocabulary * config.hidden, teacher) if options.cache_teacher else student + teacher  # of a cached teacher the head alone


def remarks(plan: Plan, text: "TrainingText") -> tuple[str, ...]:
    """Return what the plan says of memory, and of the disk that a teacher's predictions take."""
    told = f"training takes about {size(training_bytes(plan))} of memory"
    if folder := getattr(plan.surgeries[-1], "cache_teacher", None):
        return told, f"the original's predictions take up to {size(most_bytes(plan, items(plan, text)))} in {folder}; those that are there already are read"
    return (told,)


@dataclass(frozen=True)
class TrainingText:
    """A text to train on, in windows [N, T]."""

    name: str
    ids: Tensor
    predicted: Tensor | None = None  # bool [N, T]: which tokens are predicted, in windows of one document each

    @property
    def sha256(self) -> str:
        """The hash of all windows."""
        parts = [self.ids, *([self.predicted] if self.predicted is not None else [])]
        return hashlib.sha256(f"{[*self.ids.shape]}".encode() + b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def read_text(plan: Plan) -> TrainingText:
    """Read the text of a distillation, before anything is written.

    Raises:
        OptionError: it cannot be read, or is too short; or a window is longer than the models read.
        ModelError: the model has no tokenizer, or another one or another vocabulary than the teacher.
    """
    options, folder, config = _options(plan), plan.checkpoint.folder, plan.checkpoint.config
    if not loading.has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer, so it cannot be trained on a text; put it there")
    if options.data == SELF:
        raise OptionError("--data self is not possible: training needs more text than a model writes in time; give a file, or a dataset")
    if options.windows % processes.count():
        raise OptionError(f"a step has {options.windows} windows, which {processes.count()} processes cannot share evenly; change --batch-tokens")
    if options.cache_teacher and processes.count() > 1:
        raise OptionError("--cache-teacher is for one process; fill the folder with one, or leave it out")
    tokenizer = loading.load_tokenizer(folder)
    _check_tokenizers(plan, tokenizer)
    longest = min(config.longest or MOST, plan.teacher.config.longest or MOST)
    if options.window > longest:
        raise OptionError(f"--window {options.window} is more than the {longest} tokens that the models read; give at most that")
    vocabulary = min(config.vocabulary, plan.teacher.config.vocabulary)
    text = _source(options)
    if isinstance(text, Documents):
        return _windows_of(text, plan, tokenizer, vocabulary)
    before, after = ((), ()) if config.decoder else special_ends(tokenizer)
    body = options.window - len(before) - len(after)
    ids = windows(tokenizer, text, body, MOST, vocabulary)
    if len(ids) < LEAST:
        raise OptionError(f"{text.name} has {ids.numel()} tokens, and --window {options.window} needs {LEAST * options.window}; give a longer --data")
    around = (torch.tensor(end, dtype=ids.dtype).expand(len(ids), -1) for end in (before, after))
    return TrainingText(text.name, torch.cat([next(around), ids, next(around)], 1))


def _source(options: Distill) -> Text | Documents:
    """Read --data: a text, or the documents that have windows of their own.

    Raises:
        OptionError: it cannot be read, or --packing documents has none.
    """
    path = expand(options.data)
    if options.data == DOCSTRINGS or (path.is_file() and not path.name.endswith(ROWS)):
        if options.packing == "documents":
            raise OptionError(f"--packing documents needs documents, and --data {options.data} is one text; give JSON lines, parquet or a dataset")
        return calibration_text() if options.data == DOCSTRINGS else read_calibration(options.data, "--data")
    documents = read_documents(options.data, "--data")
    return documents if options.packing == "documents" or documents.conversations else documents.joined


def _windows_of(documents: Documents, plan: Plan, tokenizer: Any, vocabulary: int) -> TrainingText:
    """Return windows of one document each.

    Raises:
        OptionError: there are too few, or --recall, which would copy what fills windows up.
        ModelError: the model does not predict next tokens, or the tokenizer does not fit it.
    """
    options, config = plan.surgeries[-1], plan.checkpoint.config
    assert isinstance(options, Distill)
    if not (config.decoder and config.predicts):
        raise ModelError(f"windows of one document each are for models that predict the next token, and {config.architecture} does not; give a joined text")
    if options.recall:
        raise OptionError("--recall copies passages within full windows, and windows of one document each are filled up; leave it out, or join the text")
    if documents.conversations:
        found = windows_of_conversations(tokenizer, documents.conversations, options.window)
    else:
        found = windows_of_texts(tokenizer, beginning(tokenizer, documents.texts[0]), documents.texts, options.window)
    if len(found.ids) < LEAST:
        raise OptionError(
            f"{documents.name} makes {len(found.ids)} windows of --window {options.window}, and at least {LEAST} are needed; give a longer --data"
        )
    if found.ids.max() >= vocabulary:
        raise ModelError(f"the tokenizer gives the token {int(found.ids.max())} and the model has {vocabulary}: they do not belong together")
    return TrainingText(documents.name, found.ids, found.predicted)


def _check_tokenizers(plan: Plan, tokenizer: Any) -> None:
    """Refuse a teacher that reads a text as other tokens."""
    if plan.teacher.folder == plan.checkpoint.folder or not loading.has_tokenizer(plan.teacher.folder):
        return
    own, theirs = tokenizer.get_vocab(), loading.load_tokenizer(plan.teacher.folder).get_vocab()
    if own != theirs:
        other = sum(theirs.get(token) != number for token, number in own.items())
        raise ModelError(
            f"the teacher's tokenizer is another one: of {len(own):,} tokens of the student, {other:,} have another number there or none, so predictions "
            "cannot be compared; name a teacher with the same tokenizer"
        )


def items(plan: Plan, text: TrainingText) -> Windows:
    """Return what the model is trained on and what is held out.

    Raises:
        ModelError: it is a masked language model, and its tokenizer has no mask.
    """
    options, config = _options(plan), plan.checkpoint.config
    chosen = held_out(len(text.ids))
    if text.predicted is not None:
        return Windows(*(predicted_tokens(Filled(text.ids[rows], text.predicted[rows])) for rows in (~chosen, chosen)))
    parts = repeating(text.ids[~chosen], options.recall), text.ids[chosen]
    if not config.predicts:
        return Windows(*map(unlabelled, parts))
    if config.decoder:
        return Windows(*map(next_tokens, parts))
    tokenizer = loading.load_tokenizer(plan.checkpoint.folder)
    if tokenizer.mask_token_id is None:
        raise ModelError(f"the tokenizer in {plan.checkpoint.folder} has no mask token, so a masked language model cannot be trained with it; put it there")
    return Windows(*(masked(ids, tokenizer.mask_token_id, tokenizer.all_special_ids, config.vocabulary) for ids in parts))


def train(plan: Plan, student: Path, text: TrainingText, output: Path, progress: Progress) -> tuple[Path, Training]:
    """Distil the model in `student`, and return the folder of the best model on the way, and what happened.

    Raises:
        ModelError: a model computes NaN, or its logits in a way that is not known.
    """
    from effconvert.heal._distilling import Distiller, Report, distill  # imports transformers' Trainer, which is slow

    options, folder, checkpoint = _options(plan), training_folder(output), open_checkpoint(student)
    data, predicts, kind = items(plan, text), checkpoint.config.predicts and plan.teacher.config.predicts, Distiller
    cache: dict[str, Any] | None = None
    if options.cache_teacher:
        from effconvert.heal._cached_distilling import CachedDistiller
        from effconvert.heal._teacher_cache import windows_of

        teacher, kind = filled(plan, data, progress), CachedDistiller
        data, cache = windows_of(teacher), cache_record(teacher)
    else:
        computing = plan.teacher.computing if options.unchanged_rate else torch.float32  # as the student's weights, of which it has some
        teacher = loading.load(plan.teacher.folder, plan.teacher.config, computing).requires_grad_(False)
    model = loading.load(student, checkpoint.config, torch.float32)
    with progress.bar("distilling", options.steps * options.windows * options.window, "tokens") as advance:
        result = distill(model, teacher, options, data, layers_of_the_teacher(plan), predicts, folder / "checkpoints", Report(advance, progress.log), kind)
    curve = tuple(Point(**point) for point in result.curve)
    return result.best or student, Training(text.name, text.sha256, result.measure, result.before, result.after, curve, len(data.held_out), cache)


def layers_of_the_teacher(plan: Plan) -> list[range]:
    """Return for each layer of the converted model the layers of the teacher that it stands for: its own, and those dropped after it."""
    starts = [layer.originals.start for layer in plan.models("meta")[-1].layers]
    stops = [*starts[1:], plan.teacher.config.layers]
    return [range(start, max(start + 1, stop)) for start, stop in zip(starts, stops, strict=True)]


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
