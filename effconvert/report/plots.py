"""The charts of a report: paired differences, speed and memory against context."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from effconvert.eval.results import Benchmark, Cell, Evaluation, Row, Value
from effconvert.report.drawing import INK, LINES, MARKERS, MUTED, SERIES, SURFACE, figure, short, style, svg
from effconvert.report.facts import Report
from effconvert.report.tables import cache_bytes, difference, has_cache, longest

INTERVAL = 1.96  # standard errors on either side: 95 %
ROWS = 40  # of differences in a picture; the table has all
PANELS = 8
LARGE = 1e9  # larger differences of perplexities fit no axis
TICKS = 6
LEGEND = 0.2  # inches of a line


@dataclass(frozen=True)
class Picture:
    """An SVG element with title and caption."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Line:
    """One model's curve: y at each x, with the lowest, the highest and the predicted value."""

    series: int
    label: str
    x: list[int]
    y: list[float]
    low: list[float]
    high: list[float]
    predicted: list[float]


def differences(report: Report) -> Iterator[Picture]:
    """Yield the paired differences of each evaluation: shares on one axis, metrics with other units on their own."""
    for place, (name, evaluation) in enumerate(report.evaluations.items()):
        rows = [row for row in evaluation.rows if any(value and value.difference is not None and value.difference_error for value in row.values[1:])]
        shares = [row for row in rows if row.better == "higher" and all(0 <= value.value <= 1 for value in row.values if value)]
        others = [row for row in rows if row not in shares and all(abs(value.difference or 0) < LARGE for value in row.values if value)]
        if shares:
            omission = f" The first {ROWS} of {len(shares)}: the table has all." if len(shares) > ROWS else ""
            yield _forest(report, evaluation, shares[:ROWS], f"forest-{place}", f"Difference to {evaluation.subjects[0].name}", f"{name}.{omission}")
        if others:
            omission = f" The first {PANELS} of {len(others)}: the table has all." if len(others) > PANELS else ""
            yield _panels(report, evaluation, others[:PANELS], f"panels-{place}", "Differences in other units", f"{name}.{omission}")


def _forest(report: Report, evaluation: Evaluation, rows: list[Row], name: str, title: str, origin: str) -> Picture:
    with style():
        models = min(len(evaluation.subjects), len(SERIES)) - 1
        canvas = figure((0.36 + 0.1 * models) * len(rows) + 0.6 + LEGEND * models)
        axes = canvas.add_subplot()
        for at, row in enumerate(rows):
            _intervals(axes, report, evaluation, row, at)
        axes.set_ylim(len(rows) - 0.4, -0.7)
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(TICKS))
        axes.set_xlabel("← worse · difference · better →")
        _legend(canvas, axes)
        description = f"{title}: {len(rows)} metrics, each a difference with its 95 % interval; the table has the numbers"
        caption = (
            f"Paired difference ± {INTERVAL} standard errors (95 %), in the units of the table. Filled: significant at the 5 % level; hollow: not. {origin}"
        )
        return Picture(title, caption, svg(canvas, name, description))


def _panels(report: Report, evaluation: Evaluation, rows: list[Row], name: str, title: str, origin: str) -> Picture:
    with style():
        models = min(len(evaluation.subjects), len(SERIES)) - 1
        canvas = figure((0.9 + 0.1 * models) * len(rows) + LEGEND * models)
        for at, axes in enumerate(canvas.subplots(len(rows), 1, squeeze=False)[:, 0]):
            _intervals(axes, report, evaluation, rows[at], 0)
            axes.set_ylim(0.6, -0.7)
            axes.yaxis.set_major_locator(NullLocator())
            axes.spines["left"].set_visible(False)
            axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
            axes.xaxis.set_major_locator(MaxNLocator(TICKS))
            axes.set_xlabel({"higher": "better →", "lower": "← better", None: ""}[rows[at].better], loc="right" if rows[at].better == "higher" else "left")
            if at == 0:
                _legend(canvas, axes)
        description = f"{title}: {len(rows)} metrics, each on its own axis; the table has the numbers"
        caption = f"Each has its own axis and unit: do not compare lengths between rows. ± {INTERVAL} standard errors; filled: significant. {origin}"
        return Picture(title, caption, svg(canvas, name, description))


def _intervals(axes: Axes, report: Report, evaluation: Evaluation, row: Row, at: int) -> None:
    """Draw the differences of one metric, its name above them."""
    places = report.which(evaluation)
    points = [(place, value) for place, value in list(zip(places, row.values, strict=True))[1:] if value and _can_draw(place, value)]
    behind = {"facecolor": SURFACE, "edgecolor": "none", "pad": 1.5}  # so that the line at zero does not cross the words
    above: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "bbox": behind, "zorder": 1.5}
    axes.annotate(short(f"{row.task} {row.metric}", 32), (0, at - 0.38), **above)
    if len(points) == 1:
        axes.annotate(difference(points[0][1]), (1, at - 0.38), ha="right", **above)
    for offset, (place, value) in enumerate(points):
        y = at + 0.12 + (offset - (len(points) - 1) / 2) * 0.5 / max(len(points), 2)
        axes.errorbar(
            [value.difference or 0],
            [y],
            xerr=[INTERVAL * (value.difference_error or 0)],
            color=SERIES[place],
            marker=MARKERS[place],
            markerfacecolor=SERIES[place] if value.significant else SURFACE,
            linestyle="none",
            capsize=3,
            elinewidth=1.6,
            label=short(report.labels[place]),
        )


def _can_draw(place: int, value: Value) -> bool:
    return place < len(SERIES) and value.difference is not None and bool(value.difference_error)


def speed(report: Report) -> dict[str, list[Picture]]:
    """Return the curves against context of each benchmark and batch size."""
    pictures: dict[str, list[Picture]] = {}
    for place, (name, benchmark) in enumerate(report.benchmarks.items()):
        for batch in sorted({cell.batch for cell in benchmark.cells}):
            canvas = [_curve(report, benchmark, batch, f"speed-{place}-{batch}-{at}", *what) for at, what in enumerate(MEASURES)]
            pictures[f"{name}, batch {batch}"] = [picture for picture in canvas if picture]
    return pictures


def _rate(cell: Cell) -> tuple[float, float, float] | None:
    tokens, timing = cell.batch * cell.context, cell.prefill
    return (tokens / timing.median, tokens / timing.high, tokens / timing.low) if timing else None


def _step(cell: Cell) -> tuple[float, float, float] | None:
    return (1e3 * cell.decode.median, 1e3 * cell.decode.low, 1e3 * cell.decode.high) if cell.decode else None


def _exact(value: int | None) -> tuple[float, float, float] | None:
    return None if value is None else (float(value), float(value), float(value))


Measure = Callable[[Cell], tuple[float, float, float] | None]  # y, lowest, highest

# Title, unit, caption, and the function from a cell to a point.
MEASURES: tuple[tuple[str, str, str, Measure], ...] = (
    ("Prefill", "tokens/s", "Tokens of the prompt read a second, more is better: median of the rounds, the band from the slowest to the fastest.", _rate),
    (
        "Decode",
        "ms a step",
        "Time of a step, which gives each sequence a token, less is better: median, fastest to slowest. Dotted: reading weights and cache from memory alone.",
        _step,
    ),
    ("Peak memory", "B", "Peak memory above that before the model was loaded, less is better.", lambda cell: _exact(cell.peak_bytes)),
    ("Cache", "B", "Measured on the cache object, for the whole batch, less is better.", lambda cell: _exact(cell.cache_bytes)),
)


def _curve(report: Report, benchmark: Benchmark, batch: int, name: str, title: str, unit: str, caption: str, measure: Measure) -> Picture | None:
    lines = []
    for at, place in enumerate(report.which(benchmark)):
        cells = sorted((cell for cell in benchmark.cells if (cell.subject, cell.batch) == (at, batch)), key=lambda cell: cell.context)
        points = [(cell, point) for cell in cells if (point := measure(cell))]
        if points and place < len(SERIES):
            y, low, high = (list(values) for values in zip(*(point for _, point in points), strict=True))
            predicted = [1e3 * cell.predicted for cell, _ in points if cell.predicted is not None] if measure is _step else []
            lines.append(Line(place, short(report.labels[place]), [cell.context for cell, _ in points], y, low, high, predicted))
    return _lines(lines, name, title, unit, caption) if lines else None


def _lines(lines: Sequence[Line], name: str, title: str, unit: str, caption: str, marked: bool = True) -> Picture:
    with style():
        canvas = figure(2.5 + LEGEND * len(lines))
        axes = canvas.add_subplot()
        for line in lines:
            colour, marker = SERIES[line.series], MARKERS[line.series] if marked else ""
            axes.plot(line.x, line.y, color=colour, marker=marker, linestyle=LINES[line.series], label=line.label, zorder=3)
            if line.low != line.high:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
                axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1.2)
            if len(line.predicted) == len(line.x):
                axes.plot(line.x, line.predicted, color=colour, linestyle=":", linewidth=1.5)
        _contexts(axes, sorted({x for line in lines for x in line.x}), marked)
        axes.set_ylim(0, 1.08 * max(max(line.high + line.predicted) for line in lines) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(EngFormatter(unit="B", sep=" ") if unit == "B" else EngFormatter(sep=""))
        axes.set_title("" if unit == "B" else unit, loc="left", fontsize=10, color=MUTED)
        _legend(canvas, axes)
        ends = "; ".join(f"{line.label} {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines)
        return Picture(title, caption, svg(canvas, name, f"{title} against context, {unit}: {ends}"))


def _contexts(axes: Axes, contexts: list[int], marked: bool) -> None:
    """Label the axis with the measured contexts, on a logarithmic scale where they are far apart."""
    if marked:
        if contexts[-1] >= 8 * contexts[0]:
            axes.set_xscale("log", base=2)
        step = -(-len(contexts) // TICKS)
        ticks = contexts[::-step][::-1]
        axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        ticks = [contexts[-1] * part // 4 for part in range(5)]
        axes.set_xticks(ticks, [f"{tick / 1024:.3g}k" if tick >= 1024 else str(tick) for tick in ticks])
        axes.set_xlim(0, contexts[-1])
    axes.set_xlabel("context, tokens")


def cache(report: Report) -> Picture | None:
    """Draw the KV cache of one sequence against context, computed from the shapes."""
    if not has_cache(report):
        return None
    end = longest(report.subjects)
    bends = {window - 1 for subject in report.shaped.values() for window in subject.windows if window and window <= end}
    contexts = sorted({0, end, *bends})
    lines = []
    for place, subject in [(place, subject) for place, subject in report.shaped.items() if place < len(SERIES)]:
        sizes = [cache_bytes(subject, context) for context in contexts]
        lines.append(Line(place, short(report.labels[place]), contexts, sizes, sizes, sizes, []))
    caption = "Bytes of one sequence, computed from heads, head width, type and windows; less is better."
    return _lines(lines, "cache", "KV cache", "B", caption, marked=False)


def _legend(canvas: Figure, axes: Axes) -> None:
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    canvas.legend(handles.values(), handles.keys(), loc="outside upper left")
