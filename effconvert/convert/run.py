"""One conversion from end to end: locate, plan, stream, verify, publish."""

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch

from effconvert import processes
from effconvert.checkpoint import sources
from effconvert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.digest import file_hash
from effconvert.checkpoint.manifest import read_manifest, save_manifest
from effconvert.convert import drafts, output, selftext, training_text, written
from effconvert.convert import train as training
from effconvert.convert.calibration import check_caches, check_memory
from effconvert.convert.calibration import prepare as prepare_calibration
from effconvert.convert.decide import decide
from effconvert.convert.plan import Plan, plan
from effconvert.convert.survey import surveyed
from effconvert.convert.transplant import transplanted
from effconvert.convert.verify import Material, prepare, scratch_bytes, verify
from effconvert.convert.write import is_unfinished, write
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.text import default_text, read_text
from effconvert.eval.subject import check_kernels
from effconvert.eval.verification import Verification
from effconvert.heal._healing import Healing
from effconvert.heal.distill import Distill
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.heal.transplant import Transplant
from effconvert.hub.card_data import verification
from effconvert.modeling.stock import check_writable, open_as_stock
from effconvert.options import RunOptions
from effconvert.paths import expand
from effconvert.progress import NoProgress, Progress
from effconvert.surgery._placed import open_checked
from effconvert.surgery._surgery import Step

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """The result of a conversion."""

    plan: Plan
    output: Path
    report: Verification | None  # None where nothing was verified or written
    resumed: int = 0  # shards that an interrupted run had finished
    already_there: bool = False  # whether this very conversion had been written before
    layer_errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # layer -> errors that steps noted, by the names of `console.LAYER_ERRORS`


def convert(model: str, surgeries: tuple[Step, ...], options: RunOptions, progress: Progress | None = None, *, reuse: bool = False) -> Outcome:
    """Convert `model` by `surgeries`, one after the other.

    Args:
        model: a folder, a Hub id or a .gguf file.
        surgeries: the steps, in order.
        options: where to write, what to measure on, and more.
        progress: shows the progress; by default nothing is shown.
        reuse: return an output that this very conversion wrote before.

    Raises:
        OptionError: the options are impossible for this model.
        ModelError: the model cannot be converted, or the result failed verification.
        EffconvertError: the disk or the network failed; the same call resumes.
    """
    with processes.leading() as tell:
        return _convert(model, surgeries, options, progress or NoProgress(), reuse, tell)


def _convert(model: str, surgeries: tuple[Step, ...], options: RunOptions, progress: Progress, reuse: bool, tell: processes.Tell) -> Outcome:
    if not surgeries:
        raise OptionError("there is no step to do; name at least one technique")
    check_kernels("auto", "cuda" if torch.cuda.is_available() else "cpu")  # for calibration, training and verification
    text = (read_text(options.text) if options.text else default_text()) if options.verify else None
    folder = sources.locate(model, options.revision, progress.step, to_convert=True)
    surgeries = _with_healing(surgeries, options)
    if processes.count() > 1 and not isinstance(surgeries[-1], Distill):
        raise OptionError(f"{processes.count()} processes were started, and only distill uses more than one; run the same command by itself")
    opening = open_as_stock if options.verify or options.dry_run else open_checked  # the former imports transformers, which is slow
    checkpoint = opening(folder)
    target = expand(options.output or default_name(model, surgeries))
    surgeries = _taken_apart(surgeries, checkpoint.config)
    teacher = _teacher(surgeries, progress)
    if not reuse and any(step.undecided for step in surgeries):
        output.check_free(target, options.overwrite)
    with _running_a_model():
        surgeries, choices = decide(checkpoint, surgeries, teacher, options, progress)
    conversion = _plan(checkpoint, surgeries, teacher, options, choices)
    to_train = training_text.read_text(conversion) if isinstance(surgeries[-1], Distill) else None
    conversion, moved = replace(conversion, trained_on=to_train.sha256 if to_train else ""), dict[str, Any]()
    if to_train and not processes.is_first():
        return _follow(conversion, to_train, target)
    if isinstance(surgeries[0], Transplant):
        conversion, moved = transplanted(conversion, progress)
    manifest = output.matching_manifest(conversion, target, options.verify)
    if manifest and "shards" in manifest and not options.dry_run:  # a run that was killed before it wrote the final manifest
        _say_kept(output.complete(target, manifest), progress)
        reuse = True
    if reuse and manifest:
        return Outcome(conversion, target, verification(manifest), already_there=True)
    material = prepare(conversion, text, options) if text else None
    conversion = _checked(conversion, material, to_train, target, options, progress)
    progress.plan(model, conversion, target, material.memory if material else 0)
    if options.dry_run:
        return Outcome(conversion, target, None)
    if conversion.calibration and not to_train:
        conversion = replace(conversion, calibration=selftext.write(conversion, conversion.calibration, progress))

    resumed, distillation = 0, dict[str, Any]()
    with output.workplace(conversion, target) as partial:
        if to_train:
            distillation = _distill(conversion, to_train, partial, target, options, progress, tell)
        else:
            resumed = _write(conversion, partial, target, progress)
        layer_errors = _layer_errors(conversion, partial)
        drafts.discard(conversion, partial)
        report = _verify(conversion, target, partial, material, progress) if material else None
        record = {**written.record(conversion, written.source(model, options, folder), report, layer_errors, choices), **distillation, **moved}
        output.write_texts(partial, written.texts(model, conversion, target, options, record))
        if report:  # `push` checks that the folder is what was verified
            record["sha256"] = {name: file_hash(partial / name) for name in conversion.output_files}
        kept = output.publish(conversion, partial, target, options.overwrite, record)
    _say_kept(kept, progress)
    return Outcome(conversion, target, report, resumed, layer_errors=layer_errors)


def _say_kept(folders: Sequence[Path], progress: Progress) -> None:
    for folder in folders:
        progress.log(f"{folder} is of no more use, and could not be removed or has files of somebody else; remove it")


def _checked(
    conversion: Plan, material: Material | None, to_train: training_text.TrainingText | None, target: Path, options: RunOptions, progress: Progress
) -> Plan:
    """Check that disk and memory are enough, before anything is written, and return the plan with what is to be said of a training."""
    output.check(conversion, target, options.overwrite, scratch_bytes(conversion, material) if material else 0)
    if conversion.calibration and (options.dry_run or not to_train) and is_unfinished(conversion, output.partial_folder(target)):
        check_memory(conversion)  # the steps before a distillation are a conversion of their own
    if not to_train:
        return conversion
    training.check_training(conversion, target, to_train)
    remarks = training.remarks(conversion, to_train, target)
    if options.dry_run:
        remarks += training.time_remark(conversion, to_train, progress)
    return replace(conversion, remarks=(*conversion.remarks, *remarks))


def _with_healing(surgeries: tuple[Step, ...], options: RunOptions) -> tuple[Step, ...]:
    """Return the steps with those that --transfer, --refit and --distill add."""
    transfer, refit = ([Transfer()] if options.transfer else []), ([Refit()] if options.refit else [])
    healing = [*transfer, *refit] if any(step.transfer_first for step in surgeries) else [*refit, *transfer]
    surgeries = (*surgeries, *healing, *([Distill()] if options.distill else []))
    if any(isinstance(step, Distill) for step in surgeries[:-1]):
        raise OptionError("distill trains the finished model, so it comes last; convert the distilled model in a conversion of its own")
    if len(surgeries) > 1 and any(isinstance(step, Transplant) for step in surgeries):
        raise OptionError("transplant compares a written model with its base, so it is a conversion of its own; do the other steps before or after it")
    return surgeries


def _taken_apart(surgeries: tuple[Step, ...], config: Config) -> tuple[Step, ...]:
    """Return the steps with those that some of them stand for in their place."""
    if len(surgeries) > 1 and isinstance(surgeries[-1], Distill) and surgeries[-1].makes_student:
        raise OptionError("--student-layers and --student-ffn make the student of a model as it is; put prune-layers, narrow and refit before distill instead")
    return tuple(step for surgery in surgeries for step in surgery.stands_for(config))


def _plan(checkpoint: Checkpoint, surgeries: tuple[Step, ...], teacher: Checkpoint | None, options: RunOptions, choices: tuple[str, ...]) -> Plan:
    """Plan the conversion and its calibration, with a remark on each choice, and ask transformers whether it could open the output."""
    conversion = plan(checkpoint, surgeries, teacher)
    kept = (f"{choice}; the choice is kept in {sources.cache()} for the next run" for choice in choices)
    conversion = replace(conversion, remarks=(*conversion.remarks, *kept))
    if options.verify or options.dry_run:
        check_writable(conversion.config, {target.name: (target.dtype, target.shape) for target in conversion.targets})
    for number in conversion.surveying:
        check_caches(conversion.configs[number], "the model", f"do {conversion.surgeries[number].name} before the cache is shared")
    if conversion.needs_text:
        conversion = replace(conversion, calibration=prepare_calibration(conversion, options))
    return replace(conversion, remarks=(*conversion.remarks, *_unheeded(conversion, options, bool(choices))))


def _unheeded(conversion: Plan, options: RunOptions, has_chosen: bool) -> Iterator[str]:
    """Yield what is said of options that do nothing, or not all that they say. A choice of a step's options reads the text before there is a plan."""
    if options.calibrate and not conversion.needs_text and not has_chosen:
        yield f"--calibrate {options.calibrate} is not read, as no step looks at a text"
    longest = conversion.checkpoint.config.longest
    if options.verify and longest and options.context > longest and "context" in options.model_fields_set:
        yield f"--context {options.context} is more than the model reads; the verification's windows have {longest} tokens"


def _write(conversion: Plan, partial: Path, target: Path, progress: Progress) -> int:
    """Compute what the steps need of a text, write the model, and return how many shards were there already."""
    with _running_a_model():
        if conversion.surveying and is_unfinished(conversion, partial):
            conversion = surveyed(conversion, progress)
        if conversion.needs_calibration and is_unfinished(conversion, partial):
            from effconvert.convert.calibrate import calibrate  # imports transformers, so only where it is needed

            calibrate(conversion, partial, progress)
    with progress.bar(f"writing {target}", conversion.after.bytes, "bytes") as advance:
        return write(conversion, partial, advance)


def _distill(
    conversion: Plan, text: training_text.TrainingText, partial: Path, target: Path, options: RunOptions, progress: Progress, tell: processes.Tell
) -> dict[str, Any]:
    """Convert by the steps before the last, distil the result, write the best model on the way, and return what the manifest says of that."""
    place, student, record = training.begin(conversion, target), conversion.checkpoint.folder, dict[str, Any]()
    if before := conversion.surgeries[:-1]:
        teacher = getattr(conversion.surgeries[-1], "teacher", None)  # healing before it goes towards the same model
        before = tuple(step.model_copy(update={"teacher": teacher}) if teacher and isinstance(step, Healing) else step for step in before)
        switches = dict.fromkeys(("verify", "refit", "transfer", "distill", "dry_run"), False)
        inner = options.model_copy(update={**switches, "revision": None, "output": place / "student", "overwrite": True})  # the model is a folder by now
        with processes.alone():
            student = convert(str(student), before, inner, progress, reuse=True).output
        record = {key: value for key, value in read_manifest(student).items() if key in ("calibration", "layer_errors")}
    tell(str(student))
    best, distilled = training.train(conversion, student, text, target, progress)
    with progress.bar(f"writing {target}", conversion.after.bytes, "bytes") as advance:
        training.write_trained(conversion, open_checkpoint(best), partial, advance)
    return {**record, "distillation": asdict(distilled)}


def _follow(conversion: Plan, text: training_text.TrainingText, target: Path) -> Outcome:
    """Train beside the first process, which converts, reports and writes."""
    if student := processes.received():
        training.train(conversion, Path(student), text, target, NoProgress())
    return Outcome(conversion, target, None)


def _verify(conversion: Plan, target: Path, partial: Path, material: Material, progress: Progress) -> Verification:
    """Verify what is in `partial`; where that fails, its shards are not used again."""
    try:
        return verify(conversion, partial, material, partial / output.SCRATCH, progress)
    except Exception as error:  # also a bug of a technique: its next version must not find the old shards
        output.forget_shards(partial)
        if not (why := str(error) if isinstance(error, ModelError) else _refusal(error)):
            raise
        raise ModelError(f"{why}; {target} was not written, and the unsound result is in {partial}") from error


@contextmanager
def _running_a_model() -> Iterator[None]:
    """Say in a sentence that transformers cannot run a model, where nothing of a technique was in the way, nor the memory too small."""
    try:
        yield
    except Exception as error:
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        inside = dropwhile(lambda file: "transformers" not in file.parts, files)  # of the model
        if any(PACKAGE in file.parents for file in inside) or "allocate" in str(error) or not (reason := _refusal(error)):
            raise
        raise ModelError(f"calibration failed: {reason}; give a model that transformers runs") from error


def _refusal(error: Exception) -> str:
    """Say which library refused to run a model, and why; empty where the error is another."""
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if not isinstance(error, RuntimeError | ValueError) or isinstance(error, torch.OutOfMemoryError) or PACKAGE in raised.parents:
        return ""
    return f"{'/'.join(raised.parts[-3:])} cannot run it ({type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')})"


def _layer_errors(conversion: Plan, partial: Path) -> dict[str, dict[str, float]]:
    """Return the errors that steps noted in drafts, and copy them to the manifest: drafts are removed before the end."""
    manifest = read_manifest(partial)
    errors: dict[str, dict[str, float]] = drafts.notes(conversion, partial) or manifest.get("layer_errors", {})
    if errors:
        save_manifest(partial, {**manifest, "layer_errors": errors})
    return errors


def _teacher(surgeries: tuple[Step, ...], progress: Progress) -> Checkpoint | None:
    """Open the model that a step names as its teacher."""
    names = {surgery.teacher for surgery in surgeries if isinstance(surgery, Healing) and surgery.teacher}
    if len(names) > 1:
        raise OptionError(f"the steps name different teachers ({', '.join(sorted(names))}); heal towards one at a time")
    if not names and isinstance(surgeries[0], Healing):
        raise OptionError("--teacher is needed: the model that this one was made from; or begin with a technique, and heal after it")
    return open_checked(sources.locate(names.pop(), None, progress.step, to_convert=True)) if names else None


def default_name(model: str, surgeries: tuple[Step, ...]) -> str:
    """Name the output after what was typed, a link too: SmolLM2-135M by gqa --groups 1 is SmolLM2-135M-gqa-1."""
    stem = Path(os.path.abspath(expand(model))).name.removesuffix(".gguf")
    return "-".join([stem, *(surgery.label for surgery in surgeries)])
