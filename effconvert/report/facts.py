"""The content of a report as plain data, from which all forms are rendered."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from effconvert.eval.results import Benchmark, Cell, Evaluation, Row, ShapedSubject, Subject, Value
from effconvert.report.inputs import Manifest, Source
from effconvert.steps import arguments


@dataclass(frozen=True)
class Card:
    """One number of the report's overview; unknown parts are empty."""

    what: str
    before: str
    after: str
    change: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that is known of a model."""

    model: str  # folder name
    summary: str  # one sentence on the conversion
    verdict: str  # one sentence on the verification
    verified: bool | None  # None: effconvert did not write it
    cards: tuple[Card, ...]
    doubts: tuple[str, ...]  # what to distrust
    missing: dict[str, str]  # missing result -> command that adds it
    subjects: tuple[Subject, ...]  # the original first, where it was measured; then this model; then others measured with them
    labels: tuple[str, ...]  # the name of each in the report
    this: int  # index of the report's model
    manifest: Manifest | None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # file name -> its content
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    recipe: str = ""  # YAML
    commands: tuple[str, ...] = ()  # that reproduce everything

    @property
    def subject(self) -> Subject:
        """The report's model."""
        return self.subjects[self.this]

    @property
    def original(self) -> Subject | None:
        """The original, where that was measured."""
        return self.subjects[0] if self.this else None

    @property
    def shaped(self) -> dict[int, ShapedSubject]:
        """The models whose shape is known, by their index in `subjects`."""
        return {index: subject for index, subject in enumerate(self.subjects) if isinstance(subject, ShapedSubject)}

    @property
    def results(self) -> dict[str, Evaluation | Benchmark]:
        """Map each results file to its content."""
        return {**self.evaluations, **self.benchmarks}

    def which(self, results: Evaluation | Benchmark) -> list[int]:
        """Return the index in `subjects` of each model of `results`."""
        places = {subject.digest: index for index, subject in enumerate(self.subjects)}
        return [places[subject.digest] for subject in results.subjects]

    def rows(self) -> Iterator[tuple[Row, Value | None, Value | None]]:
        """Yield each row of each evaluation, with the scores of the file's first model and of this one (None where this is the first)."""
        for evaluation in self.evaluations.values():
            at = self.which(evaluation).index(self.this)
            for row in evaluation.rows:
                yield row, row.values[0], row.values[at] if at else None


def command_line(recipe: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Write a recipe as options on the command line, those that differ from the defaults."""
    return ", then ".join(" ".join([name, *arguments(name, options, defaults=False)]) for step in recipe for name, options in step.items())


def lineage(source: Source) -> str:
    """Name the source of a model, back to the first that effconvert did not write."""
    conversion = source.made_by
    return source.model + (f" (which is {command_line(conversion.recipe)}, from {lineage(conversion.source)})" if conversion and conversion.source else "")


def first_original(source: Source) -> str:
    """Name the first model that led to one, which effconvert did not write."""
    return first_original(source.made_by.source) if source.made_by and source.made_by.source else source.model


def began_from(source: Source) -> str:
    """Name what the last conversion began from, and was compared with: the original, or a model that effconvert had written."""
    return source.model if source.made_by else "the original"


def beside_original(report: Report) -> Iterator[tuple[Cell, Cell]]:
    """Yield each cell of this model with that of the file's first model at the same batch size and context."""
    for benchmark in report.benchmarks.values():
        at = report.which(benchmark).index(report.this)
        firsts = {(cell.batch, cell.context): cell for cell in benchmark.cells if cell.subject == 0}
        yield from ((cell, firsts[cell.batch, cell.context]) for cell in benchmark.cells if cell.subject == at and at and (cell.batch, cell.context) in firsts)


def better(row: Row, value: Value) -> bool | None:
    """Whether a significant difference is an improvement; None where it is not significant, or neither direction is better."""
    if not value.significant or not value.difference or row.better is None:
        return None
    return (value.difference > 0) == (row.better == "higher")
