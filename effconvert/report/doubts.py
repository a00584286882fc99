"""What to distrust in a report: one sentence for each reason that its numbers give."""

from collections.abc import Iterator
from pathlib import Path

from effconvert.checkpoint.digest import matters
from effconvert.eval.results import Evaluation, Timing
from effconvert.report.facts import Report, beside_original, better, first_original

FEW_DOCUMENTS = 100  # an accuracy then has a standard error of up to 0.05
FEW_ROUNDS = 5
SPREAD = 0.2  # between the fastest and the slowest round, of the median
MANY = 20  # comparisons, of which one is expected to be significant by chance at the 5 % level


def doubts(report: Report, folder: Path) -> Iterator[str]:
    """Yield what to distrust, the most serious first."""
    yield from _of_the_model(report, folder)
    for name, results in report.results.items():
        yield from (f"{name}: {note}" for note in results.notes)
    yield from _of_models(report)
    yield from _of_quality(report)
    yield from _of_speed(report)
    yield from _of_files(report)


def _of_the_model(report: Report, folder: Path) -> Iterator[str]:
    manifest = report.manifest
    if not report.verified:
        yield report.verdict
    if manifest is None:
        return
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    changed = [name for name, size in manifest.files.items() if matters(name) and sizes.get(name) != size]
    if changed:
        yield f"{changed[0]} changed since effconvert wrote it: the verification may no longer apply."
    verification = manifest.report
    if verification is None:
        return
    if verification.after.parameters != report.subject.parameters:
        yield f"The verification was of a model with {verification.after.parameters} parameters, and this one has {report.subject.parameters}."
    source = manifest.source
    if source.made_by:
        first = first_original(source)
        yield f"The verification compares the last conversion with {source.model}, from which that began, and not with the first original, {first}."
    elif report.original and verification.before.parameters != report.original.parameters:
        yield (
            f"The original in the results, {report.labels[0]}, has {report.original.parameters} parameters, "
            f"and the model that was converted had {verification.before.parameters}: they are not the same."
        )
    if verification.unmeasured:
        yield f"The verification measured no quality: {verification.unmeasured}."
    elif verification.after.quality:
        yield (
            f"The perplexity of the verification is of {verification.after.quality.tokens} tokens ({verification.text}) and has no error bar: "
            "it shows a broken model, and cannot compare two good ones."
        )


def _of_models(report: Report) -> Iterator[str]:
    firsts: dict[int, str] = {}
    for name, results in report.results.items():
        first = report.which(results)[0]
        firsts.setdefault(first, f"{name} with {report.labels[first]}")
    if len(firsts) > 1:
        yield f"The files compare with different originals ({', '.join(firsts.values())}): do not compare differences between files."
    if not report.original:
        return
    for what, values in (
        ("tokens in their vocabularies, so their perplexities cannot be compared", {subject.vocabulary for subject in report.subjects}),
        ("types of weights, which alone can change results", {subject.dtype for subject in report.subjects}),
    ):
        if len(values) > 1:
            yield f"The models have different {what} ({', '.join(map(str, sorted(values, key=str)))})."


def _of_quality(report: Report) -> Iterator[str]:
    rows = list(report.rows())
    if few := [row for row, *_ in rows if row.documents < FEW_DOCUMENTS]:
        least = min(few, key=lambda row: row.documents)
        yield f"Few documents: {len(few)} of {len(rows)} metrics have under {FEW_DOCUMENTS} ({least.task}: {least.documents}), so only large differences show."
    tested = [(row, value) for row, _, value in rows if value and value.significant is not None]
    if unclear := sum(not value.significant for _, value in tested):
        yield f"{unclear} of {len(tested)} differences are not significant at the 5 % level: that is no proof of equality."
    if len(tested) >= MANY:
        yield f"{len(tested)} comparisons at the 5 % level: about {len(tested) * 0.05:.0f} would be significant if nothing had changed."
    if improved := [row.task for row, value in tested if better(row, value)]:
        yield f"Better than the original on {', '.join(dict.fromkeys(improved))}: surprising after a conversion alone; check the training data."
    if bare := [row for row, first, _ in rows if first and first.error is None]:
        yield f"{len(bare)} of {len(rows)} metrics have no error bar (the first is {bare[0].task} {bare[0].metric})."
    if any(any(evaluation.continuations) for evaluation in report.evaluations.values()) or (report.manifest and report.manifest.report):
        yield "The models' texts are greedy continuations of one prompt: an example, not a measurement."


def _of_speed(report: Report) -> Iterator[str]:
    cells = [(name, cell) for name, benchmark in report.benchmarks.items() for cell in benchmark.cells]
    timings = [
        (timing, f"{what}, batch {cell.batch}, context {cell.context}, {name}")
        for name, cell in cells
        for what, timing in (("prefill", cell.prefill), ("first token", cell.first), ("decode", cell.decode))
        if timing
    ]
    spreads = [((timing.high - timing.low) / timing.median, where) for timing, where in timings]
    if noisy := [spread for spread in spreads if spread[0] > SPREAD]:
        widest, where = max(noisy)
        many = f"{len(noisy)} of {len(spreads)} timings spread"
        yield f"{many} over more than {SPREAD:.0%} of their median, up to {widest:.0%} ({where}): the machine was not quiet."
    if few := sorted({len(timing.rounds) for timing, _ in timings if len(timing.rounds) < FEW_ROUNDS}):
        yield f"Timings of {few[0]} rounds: fewer than {FEW_ROUNDS} say little about the spread."
    paired = list(beside_original(report))
    decodes = [(cell.decode, first.decode) for cell, first in paired if cell.decode and first.decode]
    if alike := sum(_overlap(cell, first) for cell, first in decodes):
        yield f"In {alike} of {len(decodes)} settings the ranges of the two models' decode times overlap, so they show no difference."
    for name, cell in cells:
        if cell.failure:
            label = report.labels[report.which(report.benchmarks[name])[cell.subject]]
            yield f"{label} could not be timed with batch {cell.batch} and context {cell.context}: {cell.failure}"
    if report.original and report.benchmarks and not any(cell.prefill and first.prefill for cell, first in paired):
        yield "No timing of this model has a matching timing of the original."


def _overlap(first: Timing, second: Timing) -> bool:
    return first.low <= second.high and second.low <= first.high


def _of_files(report: Report) -> Iterator[str]:
    files = report.results.values()
    for what, values in (
        ("versions of libraries", [sorted(results.versions.items()) for results in files]),
        ("machines", [results.machine for results in files]),
        ("days", [results.date[:10] for results in files]),
    ):
        if any(value != values[0] for value in values):
            yield f"The files are of different {what}: compare within a file, not between them."
    if any(len(results.subjects) > 2 for results in files if isinstance(results, Evaluation)):
        yield "Several models were compared with one original: the best of several is partly luck."
