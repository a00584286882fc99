"""The picture of a training: its distance on held-out windows and its scores, against tokens and time."""

from io import BytesIO

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from effconvert.eval.training import Training
from effconvert.report.drawing import LINES, MARKERS, SERIES, figure, plain, style, svg
from effconvert.report.facts import Report
from effconvert.report.plots import Picture

PANEL = 2.5  # inches
TICKS = 5  # of time


def training(report: Report) -> Picture | None:
    """Draw the held-out distance of a training, and the scores that were measured with it, for the page."""
    course = report.manifest and report.manifest.distillation
    if not course or len(course.curve) < 2:
        return None
    with style():
        return Picture("Training", _caption(course), svg(_drawn(course), "training", described(course)))


def png(course: Training) -> bytes:
    """Return the same picture as a file of its own."""
    file = BytesIO()
    with style(**plain()):
        _drawn(course).savefig(file, format="png", dpi=200, metadata={"Software": "effconvert", "Description": described(course)})
    return file.getvalue()


def described(course: Training) -> str:
    """Return the picture in words."""
    best = min(point.held_out for point in course.curve)
    return f"Training: {course.unit} from {course.curve[0].held_out:.4g} to {best:.4g} in {course.curve[-1].tokens:,} tokens"


def _caption(course: Training) -> str:
    left_out = len(course.scores) - len(SERIES)
    omission = f" The first {len(SERIES)} of {len(course.scores)} scores: the table has all." if left_out > 0 else ""
    return f"On {course.held_out_windows} held-out windows, less is better; {course.curve[-1].seconds:,.0f} seconds for all.{omission}"


def _drawn(course: Training) -> Figure:
    """Return the figure; use it in `style`."""
    drawn, muted = course.scores[: len(SERIES)], rcParams["xtick.color"]
    canvas = figure(2 * PANEL if drawn else PANEL)
    first, *rest = canvas.subplots(2 if drawn else 1, sharex=True, squeeze=False)[:, 0]
    values = [point.held_out for point in course.curve]
    _line(first, course, 0, "", values)
    first.set_ylim(0, 1.08 * max(values) or 1)
    first.set_title(course.unit, loc="left", fontsize=10, color=muted)
    _time(first, course)
    for axes in rest:
        for place, name in enumerate(drawn):
            _line(axes, course, place, name, [point.scores.get(name, np.nan) for point in course.curve])
        axes.set_title("scores", loc="left", fontsize=10, color=muted)
        axes.legend(loc="best")
    (rest[-1] if rest else first).set_xlabel("tokens of training")
    return canvas


def _line(axes: Axes, course: Training, series: int, label: str, values: list[float]) -> None:
    tokens = [point.tokens for point in course.curve]
    axes.plot(tokens, values, color=f"C{series}", marker=MARKERS[series], linestyle=LINES[series], label=label, zorder=3)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _time(axes: Axes, course: Training) -> None:
    """Draw a second axis with the minutes that the training took to some of the numbers of tokens."""
    some = course.curve[:: max(1, len(course.curve) // TICKS)]
    upper = axes.secondary_xaxis("top")
    upper.set_xticks([point.tokens for point in some], [f"{point.seconds / 60:.2g}" for point in some])
    upper.set_xlabel("minutes")
