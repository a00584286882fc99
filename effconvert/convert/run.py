"""One conversion from end to end: locate, plan, stream, verify, publish."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from effconvert.checkpoint import sources
from effconvert.checkpoint.belonging import text_of
from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.digest import file_hash
from effconvert.checkpoint.manifest import CARD, RECIPE, read_manifest, save_manifest
from effconvert.convert import drafts, output, selftext
from effconvert.convert.calibration import prepare as prepare_calibration
from effconvert.convert.decide import decide
from effconvert.convert.plan import Plan, plan
from effconvert.convert.verify import check_memory, prepare, scratch_bytes, verify
from effconvert.convert.write import left, write
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.text import default_text, read_text
from effconvert.eval.results import versions
from effconvert.eval.verification import Verification
from effconvert.heal._healing import Healing
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.hub.card import render
from effconvert.hub.card_data import verification
from effconvert.modeling.stock import check_writable, open_as_stock
from effconvert.options import RunOptions
from effconvert.paths import expand
from effconvert.progress import NoProgress, Progress
from effconvert.surgery._placed import open_checked
from effconvert.surgery._surgery import Step
from effconvert.version import __version__

CALIBRATING = ("calibrate", "calibration_tokens", "calibration_window")  # options that say what is looked at


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    plan: Plan
    output: Path
    report: Verification | None  # None: nothing was verified, or nothing was written
    resumed: int = 0  # shards that an earlier, interrupted run had finished
    found: bool = False  # whether all of it was there already
    told: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # layer -> held-out error of its attention before and after `transfer`


def convert(model: str, surgeries: tuple[Step, ...], options: RunOptions, progress: Progress | None = None, *, reuse: bool = False) -> Outcome:
    """Convert `model` by `surgeries`, one after the other, as `options` say.

    Args:
        model: a folder, a Hub id or a .gguf file.
        surgeries: what to do to it.
        options: where to write, what to measure on.
        progress: shows the progress; by default nothing is shown.
        reuse: take an output that this very conversion wrote before as it is.

    Raises:
        OptionError: the asker wants something impossible.
        ModelError: the model cannot be converted, or what was written is not sound.
        EffconvertError: the disk or the network failed; the same call goes on from there.
    """
    progress = progress or NoProgress()
    if not surgeries:
        raise OptionError("nothing is to be done to the model; name at least one technique")
    text = None
    if options.verify:
        text = read_text(options.text) if options.text else default_text()
    folder = sources.locate(model, options.revision, progress.step)
    surgeries = (*surgeries, *([Transfer()] if options.transfer else []), *([Refit()] if options.refit else []))
    opening = open_as_stock if options.verify or options.dry_run else open_checked  # the former imports transformers, which takes longer than much of the rest
    checkpoint, teacher, target = opening(folder), _teacher(surgeries, progress), expand(options.output or default_name(model, surgeries))
    if any(step.undecided for step in surgeries):
        if not reuse:
            output.check_free(target, options.overwrite)
        surgeries = decide(checkpoint, surgeries, teacher, options, progress)
    planned = plan(checkpoint, surgeries, teacher)
    if options.verify or options.dry_run:
        check_writable(planned.config, {target.name: (target.dtype, target.shape) for target in planned.targets})
    if planned.needs_calibration:
        planned = replace(planned, calibration=prepare_calibration(planned, options))
    manifest = output.finished(planned, target, options.verify)
    if manifest and "shards" in manifest:  # a run that was killed when all was done but for the last record
        output.complete(target, manifest)
        reuse = True
    if reuse and manifest:
        return Outcome(planned, target, verification(manifest), found=True)
    output.check(planned, target, options.overwrite, max(planned.draft_bytes, scratch_bytes(planned, options) if options.verify else 0))
    memory = check_memory(planned, options) if options.verify else 0
    material = prepare(planned, text, options) if text else None
    progress.plan(model, planned, target, memory)
    if options.dry_run:
        return Outcome(planned, target, None)
    if planned.calibration:
        planned = replace(planned, calibration=selftext.write(planned, planned.calibration, progress))

    with output.workplace(planned, target) as partial:
        if planned.calibration and left(planned, partial):
            from effconvert.convert.calibrate import calibrate  # which imports transformers: what is only copied and pooled does not wait for it

            calibrate(planned, partial, progress)
        told = _told(planned, partial)
        with progress.bar(f"writing {target}", planned.after.bytes, "bytes") as advance:
            resumed = write(planned, partial, advance)
        drafts.discard(planned, partial)
        report = None
        if material:
            try:
                report = verify(planned, partial, material, partial / output.SCRATCH, progress)
            except Exception as error:  # a fault of a technique's author too: what he mends must not find the old shards
                output.forget(partial)
                if not isinstance(error, ModelError):
                    raise
                raise ModelError(f"{error}; nothing was put at {target}, and what was written is in {partial}") from error
        record = {"source": _source(model, options, folder), "verified": report is not None, "report": report and asdict(report), "versions": versions()}
        if planned.calibration:
            record["calibration"] = planned.calibration.record
        if told:
            record["transfer"] = told
        output.describe(partial, _texts(model, planned, options, record))
        if report:  # what was verified is known by its content: `push` holds the folder to it
            record["sha256"] = {name: file_hash(partial / name) for name in planned.written}
        output.publish(planned, partial, target, options.overwrite, record)
    return Outcome(planned, target, report, resumed, told=told)


def _told(planned: Plan, partial: Path) -> dict[str, dict[str, float]]:
    """Return what `transfer` had to tell of layers, now or before an interruption, and keep it: the drafts that hold it are not there much longer."""
    manifest = read_manifest(partial)
    told: dict[str, dict[str, float]] = drafts.notes(planned, partial) or manifest.get("transfer", {})
    if told:
        save_manifest(partial, {**manifest, "transfer": told})
    return told


def _teacher(surgeries: tuple[Step, ...], progress: Progress) -> Checkpoint | None:
    """Open what a step heals towards, where it names a model."""
    named = {surgery.teacher for surgery in surgeries if isinstance(surgery, Healing) and surgery.teacher}
    if len(named) > 1:
        raise OptionError(f"the steps name different teachers ({', '.join(sorted(named))}); heal towards one at a time")
    if not named and isinstance(surgeries[0], Healing):
        raise OptionError("--teacher is needed: the model that this one was made from, towards which it is healed")
    return open_checked(sources.locate(named.pop(), None, progress.step)) if named else None


def _source(model: str, options: RunOptions, folder: Path) -> dict[str, Any]:
    """Say where the model came from, back to what nobody converted; of a folder only its name, for this will be read by others."""
    source = {"model": folder.name if expand(model).exists() else model, "revision": options.revision, "commit": sources.commit(folder)}
    before = read_manifest(folder)
    made_by = {key: before[key] for key in ("effconvert", "recipe", "source", "verified") if key in before}
    return {**source, **({"made_by": made_by} if made_by else {})}


def _texts(model: str, plan: Plan, options: RunOptions, record: dict[str, Any]) -> dict[str, str]:
    """Write what people read: the recipe, which makes the same bytes again, and the model card."""
    source = record["source"]
    revision = None if expand(model).exists() else source["commit"] or source["revision"]
    asked = {name.replace("_", "-"): getattr(options, name) for name in CALIBRATING} if plan.needs_calibration else {}
    recipe = {"model": model, "revision": revision, "steps": plan.recipe, **asked}
    told = f"# Written by effconvert {__version__}. The same bytes again: effconvert run {RECIPE} -o DIR\n"
    before = text_of(plan.checkpoint.folder / CARD) or ""
    manifest = {**output.about(plan), **record, "files": dict.fromkeys(plan.written)}
    told += yaml.safe_dump({key: value for key, value in recipe.items() if value}, sort_keys=False, allow_unicode=True)
    return {RECIPE: told, CARD: render(manifest, plan.config.content, before)}


def default_name(model: str, surgeries: tuple[Step, ...]) -> str:
    """Name the output after what was typed, a link too: SmolLM2-135M by gqa --groups 1 is SmolLM2-135M-gqa-1."""
    stem = Path(os.path.abspath(expand(model))).name.removesuffix(".gguf")
    return "-".join([stem, *(surgery.label for surgery in surgeries)])
