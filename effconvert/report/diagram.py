"""Draw one layer of a model from its shape: query heads, the KV heads that they share, the FFN, and which layers have a window."""

from collections import Counter

from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

from effconvert.eval.results import ShapedSubject
from effconvert.quantities import size
from effconvert.report.drawing import GRID, INK, MUTED, SERIES, SURFACE, figure, short, style, svg
from effconvert.report.facts import Report
from effconvert.report.plots import Picture

SLOTS = 16  # boxes of query heads that can be told apart at the width of a phone
LEFT, RIGHT = 16.0, 100.0  # edges of the part drawn to scale


def layers(report: Report) -> list[Picture]:
    """Draw a layer of each model, all to the same scale."""
    subjects = {place: subject for place, subject in report.shaped.items() if place < len(SERIES)}
    widest = max((max(subject.ffn, subject.hidden) for subject in subjects.values()), default=0)
    deepest = max((subject.layers for subject in subjects.values()), default=0)
    return [_layer(subject, report.labels[place], place, widest, deepest) for place, subject in subjects.items()]


def _layer(subject: ShapedSubject, label: str, place: int, widest: int, deepest: int) -> Picture:
    with style():
        canvas = figure(3.5)
        canvas.set_layout_engine("none")  # text may be wider than the part drawn to scale, and must not shrink it
        axes = canvas.add_axes((0.02, 0.02, 0.96, 0.96))
        axes.set_axis_off()
        axes.set_xlim(0, RIGHT)
        axes.set_ylim(100, 0)
        heads = _attention(axes, subject, place)
        _ffn(axes, subject, place, widest)
        layer_windows = _stack(axes, subject, place, deepest)
        description = f"A layer of {label}: {heads}; FFN {subject.hidden} to {subject.ffn} to {subject.hidden}; {layer_windows}"
        stored = f" A layer stores {size(subject.kv_bytes / subject.layers)} a token." if subject.kv_bytes else ""
        return Picture(short(label, 60), f"{subject.architecture}: {layer_windows}.{stored}", svg(canvas, f"layer-{place}", description))


def shown(count: int, limit: int) -> list[int | None]:
    """Return which of `count` items to draw in `limit` places: all, or the first ones, a gap (None), and the last."""
    return [*range(count)] if count <= limit else [*range(max(limit - 2, 1)), None, count - 1]


def _attention(axes: Axes, subject: ShapedSubject, place: int) -> str:
    if not subject.heads:
        axes.text(0, 4, "no attention", va="center", weight="bold")
        return "no attention"
    groups, shared = subject.kv_heads, max(1, subject.heads // subject.kv_heads)
    queries = shown(shared, max(3, SLOTS // min(groups, 4)))
    columns = shown(groups, max(3, SLOTS // len(queries)))
    group_width = len(queries) + 0.6  # places of a group, with the gap to the next
    step = (RIGHT - LEFT) / (sum(group_width if column is not None else 1 for column in columns) - 0.6)
    step = min(step, 9)
    description = f"{subject.heads} query heads of {subject.head_dim}, {groups} KV head{'s' if groups > 1 else ''}"
    axes.text(0, 4, description, va="center", weight="bold")
    axes.text(0, 17, "query", va="center", fontsize=9.5)
    axes.text(0, 39, "KV", va="center", fontsize=9.5)
    x = LEFT
    for column in columns:
        if column is None:
            for y in (17, 39):
                axes.text(x + 0.1 * step, y, "…", va="center", ha="center")
            x += step
            continue
        middle = x + (len(queries) * step - 0.2 * step) / 2
        width = max(min(0.8 * step * len(queries), 14), 0.8 * step)
        for index, query in enumerate(queries):
            left = x + index * step
            if query is None:
                axes.text(left + 0.4 * step, 17, "…", va="center", ha="center")
                continue
            axes.plot([left + 0.4 * step, middle], [21, 34], color=MUTED, linewidth=1, zorder=1)
            axes.add_patch(Rectangle((left, 13), 0.8 * step, 8, facecolor=SURFACE, edgecolor=INK, linewidth=1, zorder=2))
        axes.add_patch(Rectangle((middle - width / 2, 34), width, 10, facecolor=SERIES[place], edgecolor=INK, linewidth=1, zorder=2))
        x += group_width * step
    sharing = f"each KV head serves {shared} query heads" if shared > 1 else "each query head has a KV head of its own"
    axes.text(0, 51, sharing, va="center", fontsize=9.5)
    return description


def _ffn(axes: Axes, subject: ShapedSubject, place: int, widest: int) -> None:
    middle = (LEFT + RIGHT) / 2
    narrow, wide = (width / widest * (RIGHT - LEFT) / 2 for width in (subject.hidden, subject.ffn))
    axes.text(0, 62, f"FFN {subject.hidden} → {subject.ffn} → {subject.hidden}", va="center", weight="bold")
    for top, bottom, above, below in ((67, 72, narrow, wide), (72, 77, wide, narrow)):
        corners = [(middle - above, top), (middle + above, top), (middle + below, bottom), (middle - below, bottom)]
        axes.add_patch(Polygon(corners, facecolor=GRID, edgecolor=INK, linewidth=1))


def _stack(axes: Axes, subject: ShapedSubject, place: int, deepest: int) -> str:
    layer_windows = Counter(subject.windows)
    windows = [f"{layer_windows[window]} see a window of {window} tokens (hatched)" for window in sorted(window for window in layer_windows if window)]
    if windows and layer_windows[None]:
        windows.append(f"{layer_windows[None]} see everything")
    description = f"{subject.layers} layers" + (f": {', '.join(windows)}" if windows else ", alike")
    axes.text(0, 86, f"{subject.layers} layers" + (", windows hatched" if windows else ", alike"), va="center", weight="bold")
    step = (RIGHT - LEFT) / deepest
    for index, window in enumerate(subject.windows):
        face, hatch = (SURFACE, "////") if window else (SERIES[place], None)
        axes.add_patch(Rectangle((LEFT + index * step, 91), 0.82 * step, 8, facecolor=face, edgecolor=INK, linewidth=0.6, hatch=hatch))
    return description
