"""Build the table of results from each model's samples: one row for each metric, every model beside the original."""

import math
from collections.abc import Sequence

from effconvert.eval.quality.paired import Samples, compare, recovery
from effconvert.eval.results import Row, Value


def rows(by_model: Sequence[Sequence[Samples]], names: Sequence[str]) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Return the rows, and notes on doubtful ones."""
    table, notes = [], []
    by_metric = [{(sample.task, sample.metric): sample for sample in samples} for samples in by_model]
    for task, metric in dict.fromkeys(key for samples in sorted(by_metric, key=len, reverse=True) for key in samples):
        row = [samples.get((task, metric)) for samples in by_metric]
        original, some = row[0], next(sample for sample in row if sample)
        values = []
        for sample, name in zip(row, names, strict=True):
            if sample is not None and not math.isfinite(sample.value):
                notes.append(f"{task} {metric} of {name} is {sample.value}")
                sample = None
            values.append(_value(original if sample is not original else None, sample))
        table.append(Row(task, metric, some.better, some.chance, len(some.documents), some.version, tuple(values)))
        if original and original.chance is not None and original.better == "higher" and recovery(original, original) is None:
            guess = f"{original.value:.3g}, chance is {original.chance:.3g}"
            notes.append(f"{task} {metric}: {names[0]} is not above guessing ({guess}), so nothing can be lost or recovered")
    return tuple(table), tuple(notes)


def _value(original: Samples | None, sample: Samples | None) -> Value | None:
    if sample is None:
        return None
    if original is None or not math.isfinite(original.value) or original.documents != sample.documents:
        return Value(sample.value, sample.error)
    return compare(original, sample)
