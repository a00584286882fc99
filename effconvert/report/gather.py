"""Build a report from a model's folder, its manifest, and results files."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from effconvert.checkpoint.belonging import text_of
from effconvert.checkpoint.manifest import RECIPE
from effconvert.errors import OptionError
from effconvert.eval.results import Benchmark, Evaluation, Row, ShapedSubject, Subject, Value
from effconvert.eval.subject import open_model
from effconvert.eval.verification import Side
from effconvert.paths import real
from effconvert.publishable import without_paths
from effconvert.quantities import count, perplexity, size
from effconvert.report.doubts import doubts
from effconvert.report.facts import Card, Report, began_from, beside_original, better, command_line, first_original, lineage
from effconvert.report.inputs import Manifest, names, read_manifest, read_results
from effconvert.report.tables import number, score
from effconvert.steps import arguments


def gather(folder: Path, files: Sequence[Path]) -> Report:
    """Build the report on the model in `folder`, with its results in `files`.

    Raises:
        OptionError: a folder or file does not exist, or a file is about other models.
        ModelError: the model or its manifest is damaged.
    """
    if not folder.is_dir():
        raise OptionError(f"there is no folder {folder}; give the folder of a model, such as one that effconvert wrote")
    if twice := [path for number, path in enumerate(files) if real(path) in map(real, files[:number])]:
        raise OptionError(f"{twice[0]} is given twice, and would count twice; give each file of results once")
    results = {name: read_results(path) for name, path in zip(names(files), files, strict=True)}
    manifest = read_manifest(folder)
    subject = open_model(str(folder)).subject
    for name, content in results.items():
        if subject.digest not in {other.digest for other in content.subjects}:
            others = ", ".join(other.name for other in content.subjects)
            raise OptionError(f"{name} is about other models ({others}), or {subject.name} has changed since; measure it, and give the new file")
    subjects = _subjects(subject, results)
    report = Report(
        model=subject.name,
        summary=_summary(subject, manifest),
        verdict=_verdict(manifest),
        verified=manifest.verified if manifest else None,
        cards=(),
        doubts=(),
        missing={},
        subjects=subjects,
        labels=_labels(subjects),
        this=[other.digest for other in subjects].index(subject.digest),
        manifest=manifest,
        evaluations={name: content for name, content in results.items() if isinstance(content, Evaluation)},
        benchmarks={name: content for name, content in results.items() if isinstance(content, Benchmark)},
    )
    if manifest:
        written = _written_recipe(folder)
        report = replace(report, recipe=_yaml(written or _recipe(manifest)), commands=tuple(_conversion(report, manifest, bool(written))))
    report = replace(report, cards=tuple(_cards(report)), missing=_missing(report), commands=(*report.commands, *_measurements(report)))
    return replace(report, doubts=tuple(doubts(report, folder)))


def _subjects(this: Subject, results: dict[str, Evaluation | Benchmark]) -> tuple[Subject, ...]:
    subjects = [subject for content in results.values() for subject in content.subjects]
    originals = [content.subjects[0] for content in results.values() if content.subjects[0].digest != this.digest]
    unique = {subject.digest: subject for subject in [*originals[:1], this, *subjects]}
    return tuple(this if digest == this.digest else subject for digest, subject in unique.items())


def _labels(subjects: Sequence[Subject]) -> tuple[str, ...]:
    names = [subject.name for subject in subjects]
    return tuple(f"{name} ({subject.digest[:6]})" if names.count(name) > 1 else name for name, subject in zip(names, subjects, strict=True))


def _summary(subject: Subject, manifest: Manifest | None) -> str:
    if manifest is None:
        return f"{subject.kind}, {subject.architecture}; not written by effconvert, so its conversion is unknown"
    return f"{command_line(manifest.recipe) or 'no surgery'}, from {lineage(manifest.source)}"


def _verdict(manifest: Manifest | None) -> str:
    if manifest is None:
        return "Not verified by effconvert, which did not write this model."
    if not manifest.verified:
        return "NOT VERIFIED: this model was written and never loaded. Convert it again without --no-verify."
    return f"Verified: reloaded from disk in transformers, run, and compared with {began_from(manifest.source)}."


def _cards(report: Report) -> Iterator[Card]:
    this, original, verified = report.subject, report.original, report.manifest.report if report.manifest else None
    before = original or (verified.before if verified else None)
    source = report.manifest.source if report.manifest else None
    note = f"before: {began_from(source)}" if source and source.made_by and not original else ""
    yield _card("parameters", before.parameters if before else None, this.parameters, count, note)
    yield _card("on disk", original.bytes if original else None, this.bytes, size)
    if isinstance(this, ShapedSubject) and (this.kv_bytes or this.state_bytes):
        yield _card("KV cache a token", before.kv_bytes if isinstance(before, ShapedSubject | Side) else None, this.kv_bytes, size, note)
    rows = list(report.rows())
    tested = [(row, value) for row, _, value in rows if value and value.difference is not None and value.significant is not None]
    if tested:
        worse = sum(better(row, value) is False for row, value in tested)
        improved = sum(better(row, value) is True for row, value in tested)
        yield Card("significantly worse", "", f"{worse} of {len(tested)}", note=f"measured differences; {improved} significantly better, at the 5 % level")
    yield from _distance(rows, report.manifest)
    if cells := [cell for cell, _ in beside_original(report) if cell.decode and "decode" in cell.ratios]:
        cell = max(cells, key=lambda cell: (-cell.batch, cell.context))
        yield Card("decode time", "", f"{cell.ratios['decode']:.3g} x", note=f"of the original's, batch {cell.batch}, context {cell.context}")


def _distance(rows: Sequence[tuple[Row, Value | None, Value | None]], manifest: Manifest | None) -> Iterator[Card]:
    """Yield the distance of the model from the original on text: from the evaluation with error bars, or from the verification."""
    texts = {}
    for row, original, value in rows:
        if row.task == "text" and value:
            texts[row.metric] = (score(original) if original else "", *_with_note(value, row.documents))
    verified = manifest.report if manifest else None
    if manifest and verified and verified.before.quality and (last := verified.after.quality):
        model = began_from(manifest.source)
        texts.setdefault("perplexity", (perplexity(verified.before.quality.perplexity), perplexity(last.perplexity), f"in the verification; before: {model}"))
        if last.agreement is not None:
            texts.setdefault("same_top_token", ("", f"{last.agreement:.1%}", f"as {model}, in the verification"))
    for metric, name in (("perplexity", "perplexity"), ("same_top_token", "same top token")):
        if metric in texts:
            before, after, note = texts[metric]
            yield Card(name, before, after, note=note)


def _with_note(value: Value, documents: int) -> tuple[str, str]:
    error = f"± {number(value.error, value.error)}, one standard error, " if value.error else ""
    return number(value.value, value.error), f"{error}{documents} documents"


def _card(what: str, before: int | None, after: int, show: Callable[[int], str], note: str = "") -> Card:
    return Card(what, show(before) if before else "", show(after), f"{after / before:.3g} x" if before else "", note)


def _missing(report: Report) -> dict[str, str]:
    original = report.original.name if report.original else first_original(report.manifest.source) if report.manifest else "ORIGINAL"
    models = shlex.join([original, report.model])
    from_hub = "/" in original or (report.manifest and report.manifest.source.commit)
    missing, where = {}, "" if from_hub else "  # in a folder that has both models"
    if not report.evaluations:
        missing["quality on tasks, with error bars"] = f"effconvert eval {models} -o eval.json{where}"
    if not report.benchmarks:
        missing["speed and memory against context"] = f"effconvert bench {models} -o bench.json{where}"
    if missing:
        files = [*report.results, *([] if report.evaluations else ["eval.json"]), *([] if report.benchmarks else ["bench.json"])]
        missing["this report with them"] = shlex.join(["effconvert", "report", report.model, *files, "--overwrite"])
    return missing


def _written_recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe beside the weights, which names what the model was calibrated on, without folders of this machine; empty if there is none."""
    try:
        recipe = yaml.safe_load(text_of(folder / RECIPE) or "")
    except Exception:  # PyYAML raises many types over dates and numbers
        return {}
    return without_paths(recipe) if isinstance(recipe, dict) and recipe.get("steps") else {}


def _recipe(manifest: Manifest) -> dict[str, Any]:
    source = manifest.source
    return {"model": source.model, "revision": source.commit or source.revision, "steps": list(manifest.recipe)}


def _yaml(recipe: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump({key: value for key, value in recipe.items() if value}, sort_keys=False, allow_unicode=True))


def _conversion(report: Report, manifest: Manifest, written: bool) -> Iterator[str]:
    """Yield the command that converts the model again."""
    source, steps = manifest.source, [item for step in manifest.recipe for item in step.items()]
    if written:
        yield shlex.join(["effconvert", "run", f"{report.model}/{RECIPE}", "-o", f"{report.model}-again"]) + f"  # in the folder that has {report.model}"
    elif len(steps) == 1:
        name, options = steps[0]
        revision = ["--revision", source.commit or source.revision or ""] if source.commit or source.revision else []
        yield shlex.join(["effconvert", name, *arguments(name, options), source.model, *revision, "-o", report.model])
    else:
        yield shlex.join(["effconvert", "run", "recipe.yaml", "-o", report.model]) + "  # the recipe above"


def _measurements(report: Report) -> Iterator[str]:
    """Yield the commands that measure and report."""
    for name, content in report.results.items():
        models = shlex.join([subject.name for subject in content.subjects])
        yield f"effconvert {'eval' if isinstance(content, Evaluation) else 'bench'} {models} -o {shlex.quote(name)}  # with the settings below"
    yield shlex.join(["effconvert", "report", report.model, *report.results, "--overwrite"])
