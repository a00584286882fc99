"""What to distrust in a report: every reason that its numbers themselves give, in a sentence each."""

from collections.abc import Iterator
from pathlib import Path

from effconvert.checkpoint.digest import matters
from effconvert.eval.report.facts import Report, beside_original, better
from effconvert.eval.results import Evaluation, Timing

FEW_DOCUMENTS = 100  # an accuracy then has a standard error of up to 0.05
FEW_ROUNDS = 5
SPREAD = 0.2  # between the fastest and the slowest round, of the median
MANY = 20  # comparisons, of which one is expected to be significant by chance at the 5 % level


def doubts(report: Report, folder: Path) -> Iterator[str]:
    """Yield what to distrust, the gravest first."""
    yield from _of_the_model(report, folder)
    for name, held in report.results.items():
        yield from (f"{name}: {note}" for note in held.notes)
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
    there = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    changed = [name for name, size in manifest.files.items() if matters(name) and there.get(name) != size]
    if changed:
        yield f"{changed[0]} is not as effconvert wrote it: what the verification found may hold no longer."
    measured = manifest.report
    if measured is None:
        return
    if measured.after.parameters != report.subject.parameters:
        yield f"The verification was of a model with {measured.after.parameters} parameters, and this one has {report.subject.parameters}."
    if report.original and measured.before.parameters != report.original.parameters:
        yield (
            f"What was measured as the original, {report.labels[0]}, has {report.original.parameters} parameters, "
            f"and the model that was converted had {measured.before.parameters}: they are not the same."
        )
    if measured.unmeasured:
        yield f"The verification measured no quality: {measured.unmeasured}."
    elif measured.after.quality:
        yield (
            f"The perplexity of the verification is that of {measured.after.quality.tokens} tokens ({measured.text}) and has no error bar: "
            "it shows ruin, and cannot tell two good models apart."
        )


def _of_models(report: Report) -> Iterator[str]:
    firsts: dict[int, str] = {}
    for name, held in report.results.items():
        first = report.which(held)[0]
        firsts.setdefault(first, f"{name} with {report.labels[first]}")
    if len(firsts) > 1:
        yield f"The files compare with different originals ({', '.join(firsts.values())}): differences of one do not belong beside those of the other."
    if not report.original:
        return
    for what, values in (
        ("tokens in their vocabularies, so their perplexities count different things", {subject.vocabulary for subject in report.subjects}),
        ("types of weights, which is a difference of its own", {subject.dtype for subject in report.subjects}),
    ):
        if len(values) > 1:
            yield f"The models have different {what} ({', '.join(map(str, sorted(values, key=str)))})."


def _of_quality(report: Report) -> Iterator[str]:
    rows = list(report.rows())
    if few := [row for row, *_ in rows if row.documents < FEW_DOCUMENTS]:
        least = min(few, key=lambda row: row.documents)
        yield f"Few documents: {len(few)} of {len(rows)} metrics have under {FEW_DOCUMENTS} ({least.task}: {least.documents}), so only large differences show."
    judged = [(row, value) for row, _, value in rows if value and value.significant is not None]
    if unclear := sum(not value.significant for _, value in judged):
        yield f"{unclear} of {len(judged)} differences are not significant at the 5 % level: that is no proof of equality."
    if len(judged) >= MANY:
        yield f"{len(judged)} comparisons at the 5 % level: about {len(judged) * 0.05:.0f} would be significant if nothing had changed."
    if gained := [row.task for row, value in judged if better(row, value)]:
        yield f"Better than the original on {', '.join(dict.fromkeys(gained))}: surprising after a conversion alone; look at what was trained on."
    if bare := [row for row, first, _ in rows if first and first.error is None]:
        yield f"{len(bare)} of {len(rows)} metrics have no error bar (the first is {bare[0].task} {bare[0].metric})."
    if any(any(evaluation.continuations) for evaluation in report.evaluations.values()) or (report.manifest and report.manifest.report):
        yield "What the models write is one prompt, continued with the most likely token each time (greedy decoding): an anecdote, not a measurement."


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
    if alike := sum(_overlap(one, other) for one, other in decodes):
        yield f"In {alike} of {len(decodes)} settings the decode times of the two models overlap, from fastest to slowest: no difference is shown there."
    for name, cell in cells:
        if cell.failure:
            label = report.labels[report.which(report.benchmarks[name])[cell.subject]]
            yield f"{label} could not be timed with batch {cell.batch} and context {cell.context}: {cell.failure}"
    if report.original and report.benchmarks and not any(cell.prefill and first.prefill for cell, first in paired):
        yield "No timing of this model has one of the original's beside it."


def _overlap(one: Timing, other: Timing) -> bool:
    return one.low <= other.high and other.low <= one.high


def _of_files(report: Report) -> Iterator[str]:
    held = report.results
    for what, values in (
        ("versions of libraries", [sorted(results.versions.items()) for results in held.values()]),
        ("machines", [results.machine for results in held.values()]),
        ("days", [results.date[:10] for results in held.values()]),
    ):
        if any(value != values[0] for value in values):
            yield f"The files are of different {what}: compare within a file, not between them."
    if any(len(results.subjects) > 2 for results in held.values() if isinstance(results, Evaluation)):
        yield "Several models were compared with one original: the best of several is partly luck."
