"""The numbers of a report as tables of text, for HTML and Markdown."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from effconvert.eval.results import Cell, Evaluation, Row, ShapedSubject, Subject, Timing, Value
from effconvert.eval.training import Training
from effconvert.eval.verification import Verification
from effconvert.families import ENCODER_DECODERS
from effconvert.quantities import count, perplexity, size
from effconvert.report.facts import Report, began_from, better, lineage

CONTEXTS = (1024, 4096, 8192, 32768, 131072)


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def number(value: float, error: float | None = None, sign: bool = False) -> str:
    """Write a number to two digits of its error, or to four digits."""
    plus = "+" if sign else ""
    if not error or max(abs(value), error) >= 1e7:
        return f"{value:{plus}.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:{plus}.4g}"
    return f"{value:{plus}.{min(max(0, 1 - math.floor(math.log10(error))), 8)}f}"


def score(value: Value | None) -> str:
    """Write a score with its standard error."""
    if value is None:
        return "-"
    return number(value.value, value.error) + (f" ± {number(value.error, value.error)}" if value.error else "")


def difference(value: Value | None) -> str:
    """Write a paired difference with its standard error."""
    if value is None or value.difference is None:
        return "-"
    error = value.difference_error
    return number(value.difference, error, sign=True) + (f" ± {number(error, error)}" if error else "")


def mark(row: Row, value: Value | None) -> str:
    """Mark a difference as significant or not, by a sign and a word."""
    if value is None or value.difference is None:
        return "-"
    if value.significant is None:
        return "? unknown"
    if not value.significant:
        return f"○ not significant (p {chance_of(value.p)})"
    good = better(row, value)
    return f"{'◆ changed' if good is None else '▲ better' if good else '▼ worse'} (p {chance_of(value.p)})"


def mixer_summary(subject: ShapedSubject) -> str:
    """Summarise which layers have a mixer in place of softmax attention."""
    layers_by_mixer = Counter(mixer for mixer in subject.mixers if mixer)
    return ", ".join(f"{mixer} in {number} of {subject.layers} layers" for mixer, number in layers_by_mixer.items()) or "softmax attention"


def chance_of(p: float | None) -> str:
    """Write a p-value."""
    return "?" if p is None else "< 0.001" if p < 0.001 else f"= {p:.2g}"


def _cache(subject: ShapedSubject) -> str:
    """Say how much a model caches for a token. Of the decoder behind an encoder that is not counted."""
    return size(subject.kv_bytes) if subject.kv_bytes else "not counted" if subject.kind in ENCODER_DECODERS else "none"


def shapes(report: Report) -> Table:
    """Return the table of the models' shapes."""

    def shape(show: Callable[[ShapedSubject], str]) -> list[str]:
        return [show(subject) if isinstance(subject, ShapedSubject) else "not known" for subject in report.subjects]

    rows = [
        ("", [subject.architecture for subject in report.subjects]),
        ("layers", shape(lambda subject: str(subject.layers))),
        ("query heads", shape(lambda subject: f"{subject.heads} of {subject.head_dim}" if subject.heads else "none")),
        ("KV heads", shape(lambda subject: str(subject.kv_heads or "none"))),
        ("width", shape(lambda subject: str(subject.hidden))),
        ("width inside the FFN", shape(lambda subject: str(subject.ffn))),
        ("vocabulary", [str(subject.vocabulary) for subject in report.subjects]),
        ("longest context", [str(subject.longest or "no limit known") for subject in report.subjects]),
        ("weights", [subject.dtype for subject in report.subjects]),
        ("parameters", [count(subject.parameters) for subject in report.subjects]),
        ("on disk", [size(subject.bytes) for subject in report.subjects]),
        ("KV cache a token", shape(_cache)),
    ]
    if any(subject.mixers for subject in report.shaped.values()):
        rows.insert(4, ("mixers", shape(mixer_summary)))
        rows.append(("state of mixers", shape(lambda subject: size(subject.state_bytes) if subject.state_bytes else "none")))
    body = tuple((what or "class", *values) for what, values in rows)
    unknown = [label for index, label in enumerate(report.labels) if index not in report.shaped]
    note = f"effconvert does not know the layout of {', '.join(unknown)}, and so neither its layers nor its cache by formula." if unknown else ""
    return Table("What the models are", ("", *report.labels), body, note)


def training(curve: Training) -> Table:
    """Return the course of a training."""
    rows = tuple(
        (
            f"{point.tokens:,}",
            f"{point.seconds:,.0f}",
            number(point.held_out),
            "-" if point.loss is None else number(point.loss),
            *(number(point.scores[name]) if name in point.scores else "-" for name in curve.scores),
        )
        for point in curve.curve
    )
    closed = "" if curve.closed is None else f", {curve.closed:.0%} of the distance before closed"
    note = f"Trained on {curve.text}; {curve.held_out_windows} windows of it were held out. The model that was written has {number(curve.after)}{closed}."
    return Table("Training", ("tokens", "seconds", f"held out: {curve.unit}", "loss", *curve.scores), rows, note)


def verification(report: Verification) -> Table | None:
    """Return the table of the verification's results: of the last conversion, and what that began from."""
    before, after = report.before.quality, report.after.quality
    rows = []
    if before and after:
        rows += [("perplexity", perplexity(before.perplexity), perplexity(after.perplexity))]
        rows += [("KL(before || after), nats a token", "-", number(after.kl))] if after.kl is not None else []
        rows += [("same most likely token", "-", f"{after.agreement:.1%}")] if after.agreement is not None else []
    rows += [("largest change of a logit (none may change)", "-", f"{report.difference:.2g}")] if report.difference is not None else []
    note = f"{report.text}: {before.tokens} tokens in windows of {before.context}, {report.dtype}, {report.device}" if before else report.unmeasured
    return Table("Measured by the verification", ("", "before", "after"), tuple(rows), note) if rows else None


def quality(report: Report) -> Iterator[Table]:
    """Yield a table for each evaluation."""
    for name, evaluation in report.evaluations.items():
        labels = [report.labels[index] for index in report.which(evaluation)]
        header = ["task", "metric", labels[0]]
        for label in labels[1:]:
            header += [label, "difference", "significant?", "kept"]
        rows = []
        for row in evaluation.rows:
            line = [row.task, row.metric + {"higher": " ↑", "lower": " ↓", None: ""}[row.better], score(row.values[0])]
            for value in row.values[1:]:
                kept = f"{value.recovery:.1%}" if value and value.recovery is not None else "-"
                line += [score(value), difference(value), mark(row, value), kept]
            rows.append((*line, "-" if row.chance is None else number(row.chance), str(row.documents)))
        header += ["guessing", "documents"]
        note = (
            "± is a standard error. Differences are taken document by document and have an error of their own. ↑ higher is better, ↓ lower is better. "
            "▼ ▲ significant at the 5 % level, each by itself; ○ not. "
            "Kept: what is left of the original's lead over guessing, (score - guessing) / (original - guessing)."
        )
        yield Table(f"{name}, {evaluation.date[:10]}", tuple(header), tuple(rows), note)


def speed(report: Report) -> Iterator[Table]:
    """Yield a table for each batch size of each benchmark."""
    header = ("context", "model", "prefill tokens/s", "prefill ms", "first token ms", "decode ms/step", "memory alone ms/step", "cache", "peak memory")
    for name, benchmark in report.benchmarks.items():
        places = report.which(benchmark)
        for batch in sorted({cell.batch for cell in benchmark.cells}):
            cells = sorted((cell for cell in benchmark.cells if cell.batch == batch), key=lambda cell: (cell.context, cell.subject))
            note = (
                "Medians, with the fastest and the slowest round in brackets, and in parentheses the ratio to the first model. "
                f"Memory alone: a step that only reads weights and cache, at the measured {size(benchmark.bandwidth)} a second."
            )
            note += "".join(f" Failed: {report.labels[places[cell.subject]]} at {cell.context}: {cell.failure}." for cell in cells if cell.failure)
            yield Table(f"{name}, batch {batch}", header, tuple(_cell(cell, report.labels[places[cell.subject]]) for cell in cells), note)


def _cell(cell: Cell, label: str) -> tuple[str, ...]:
    if cell.failure:
        return (str(cell.context), label, "failed", *["-"] * 6)

    def ratio(what: str) -> str:
        return f" ({cell.ratios[what]:.3g} x)" if cell.subject and what in cell.ratios else ""

    def memory(amount: int | None, what: str) -> str:
        return "-" if amount is None else size(amount) + ratio(what)

    return (
        str(cell.context),
        label,
        number(cell.prefill_rate) if cell.prefill_rate else "-",
        _milliseconds(cell.prefill) + ratio("prefill"),
        _milliseconds(cell.first) + ratio("first"),
        _milliseconds(cell.decode) + ratio("decode"),
        "-" if cell.predicted is None else number(1e3 * cell.predicted),
        memory(cell.cache_bytes, "cache"),
        memory(cell.peak_bytes, "peak"),
    )


def _milliseconds(timing: Timing | None) -> str:
    return "-" if timing is None else f"{number(1e3 * timing.median)} [{number(1e3 * timing.low)} to {number(1e3 * timing.high)}]"


def cache_bytes(subject: ShapedSubject, context: int) -> float:
    """Return the bytes of the cache of one sequence of `context` tokens; a window of W keeps W - 1, as in transformers' cache."""
    tokens = [context if window is None else min(context, window - 1) for window in subject.windows]
    keys = sum(width * count for width, count in zip(subject.cached or _mean_cached(subject), tokens, strict=True))
    return subject.state_bytes + subject.growth_bytes * context + keys


def _mean_cached(subject: ShapedSubject) -> list[float]:
    """Return the bytes of a token in each layer, for results that do not say: the same in all layers with softmax attention."""
    softmax = [not mixer for mixer in subject.mixers] if "" in subject.mixers else [True] * subject.layers
    return [has * (subject.kv_bytes - subject.growth_bytes) / sum(softmax) for has in softmax]


def longest(subjects: Sequence[Subject]) -> int:
    """Return the longest context that all models read, at most 128k."""
    return min([subject.longest for subject in subjects if subject.longest] + [CONTEXTS[-1]])


def has_cache(report: Report) -> bool:
    """Whether the report's model is known to have a cache, of keys and values or of states."""
    subject = report.subject
    return isinstance(subject, ShapedSubject) and bool(subject.kv_bytes or subject.state_bytes)


def cache(report: Report) -> Table | None:
    """Return the table of the KV cache at a few contexts."""
    if not has_cache(report):
        return None
    end = longest(report.subjects)
    contexts = sorted({context for context in CONTEXTS if context <= end} | {end})
    rows = tuple((str(context), *(size(cache_bytes(subject, context)) for subject in report.shaped.values())) for context in contexts)
    return Table("KV cache of one sequence", ("context", *(report.labels[index] for index in report.shaped)), rows)


def writes(report: Report) -> Iterator[Table]:
    """Yield the tables of the models' continuations of the same prompt."""
    manifest = report.manifest
    verified = manifest and manifest.report
    if manifest and verified and (verified.before.continuation or verified.after.continuation):
        both = ((began_from(manifest.source), repr(verified.before.continuation)), ("converted", repr(verified.after.continuation)))
        yield Table("What they write, in the verification", ("", "continuation"), both)
    for name, evaluation in report.evaluations.items():
        if any(evaluation.continuations):
            labels = [report.labels[index] for index in report.which(evaluation)]
            rows = tuple((label, repr(text)) for label, text in zip(labels, evaluation.continuations, strict=False))
            yield Table(f"What they write, {name}", ("", "continuation"), rows, f"after {evaluation.prompt!r}")


def provenance(report: Report) -> Iterator[Table]:
    """Yield the tables of sources, versions and settings."""
    rows: list[tuple[str, str]] = []
    if report.manifest:
        source = report.manifest.source
        versions = _pairs(report.manifest.versions)
        rows += [("effconvert that converted it", report.manifest.effconvert), ("converted from", lineage(source))]
        rows += [(what, value) for what, value in (("revision", source.revision), ("commit", source.commit), ("versions", versions)) if value]
    rows += [(f"SHA-256 of {label}", subject.digest) for label, subject in zip(report.labels, report.subjects, strict=True)]
    rows += [(f"commit of {label}", subject.commit) for label, subject in zip(report.labels, report.subjects, strict=True) if subject.commit]
    yield Table("The models", ("", "value"), tuple(rows))
    for name, results in report.results.items():
        rows = [("measured", results.date), ("machine", results.machine)]
        rows += [("versions", _pairs(results.versions))]
        if isinstance(results, Evaluation):
            rows += [("versions of tasks", _pairs({row.task: row.version for row in results.rows}))]
        rows += [(what, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for what, value in results.settings.items()]
        yield Table(name, ("", "value"), tuple(rows))


def _pairs(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
