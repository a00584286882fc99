"""What a report tells, as plain data: the three forms are made of this, and of nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from effconvert.eval.report.inputs import Manifest, Source
from effconvert.eval.results import Benchmark, Cell, Evaluation, Row, Subject, Value


@dataclass(frozen=True)
class Card:
    """One thing worth knowing at a glance; what is unknown is empty."""

    what: str
    before: str
    after: str
    change: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What is known of a model."""

    model: str  # folder name
    summary: str  # what was done, in a sentence
    verdict: str  # whether it was verified, in a sentence
    verified: bool | None  # None: effconvert did not write it
    cards: tuple[Card, ...]
    doubts: tuple[str, ...]  # what to distrust
    missing: dict[str, str]  # what is not known -> what would add it
    subjects: tuple[Subject, ...]  # the original first, where it was measured; then this model; then others measured with them
    labels: tuple[str, ...]  # what each is called here
    this: int  # which of them the report is about
    manifest: Manifest | None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # file name -> what is in it
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    commands: tuple[str, ...] = ()  # that give the same again

    @property
    def subject(self) -> Subject:
        """The model that this is about."""
        return self.subjects[self.this]

    @property
    def original(self) -> Subject | None:
        """What it was made from, where that was measured."""
        return self.subjects[0] if self.this else None

    @property
    def results(self) -> dict[str, Evaluation | Benchmark]:
        """Map each results file to what is in it."""
        return {**self.evaluations, **self.benchmarks}

    def which(self, results: Evaluation | Benchmark) -> list[int]:
        """Return which of `subjects` each model of `results` is."""
        places = {subject.digest: index for index, subject in enumerate(self.subjects)}
        return [places[subject.digest] for subject in results.subjects]

    def rows(self) -> Iterator[tuple[Row, Value | None, Value | None]]:
        """Yield each row of each evaluation, with what the file's first model and this one scored (None where it is the first)."""
        for evaluation in self.evaluations.values():
            at = self.which(evaluation).index(self.this)
            for row in evaluation.rows:
                yield row, row.values[0], row.values[at] if at else None


def spelt(recipe: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Write a recipe as it would be typed."""
    steps = [
        " ".join([name, *(f"--{key} {value}" for key, value in options.items() if value is not None)]) for step in recipe for name, options in step.items()
    ]
    return ", then ".join(steps)


def lineage(source: Source) -> str:
    """Say what a model was made from, back to what effconvert did not make."""
    made = source.made_by
    return source.model + (f" (which is {spelt(made.recipe)}, from {lineage(made.source)})" if made and made.source else "")


def beside_original(report: Report) -> Iterator[tuple[Cell, Cell]]:
    """Yield what was timed of this model, and beside it the first model of the same file at the same batch size and context."""
    for benchmark in report.benchmarks.values():
        at = report.which(benchmark).index(report.this)
        firsts = {(cell.batch, cell.context): cell for cell in benchmark.cells if cell.subject == 0}
        yield from ((cell, firsts[cell.batch, cell.context]) for cell in benchmark.cells if cell.subject == at and at and (cell.batch, cell.context) in firsts)


def better(row: Row, value: Value) -> bool | None:
    """Whether a significant difference is for the better; None where it is not significant, or nobody knows which way is better."""
    if not value.significant or not value.difference or row.better is None:
        return None
    return (value.difference > 0) == (row.better == "higher")
