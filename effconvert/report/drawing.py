"""The style of a report's pictures: colours that the page chooses, and SVG that can be embedded several times.

matplotlib writes sentinel colours, which become CSS custom properties, so that one picture serves light and dark pages. Text stays text, in the page's
font. matplotlib's global state stays as it was, and pictures contain no dates or random ids.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# Okabe & Ito (2008), https://jfly.uni-koeln.de/color/: the four that differ most to protanopes and deuteranopes, of those with
# enough contrast to the background; tests/eval/test_report.py computes both.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#000000")
DARK = ("#56B4E9", "#D55E00", "#009E73", "#F0E442")
MARKERS = ("o", "s", "^", "D")
LINES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))

# Sentinel -> its name in the page.
INK, MUTED, GRID, SURFACE = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010207", "#010208", "#010209", "#01020a")
NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"} | {colour: f"series-{i}" for i, colour in enumerate(SERIES)}

PLAIN = {INK: "#1f2328", MUTED: "#59636e", GRID: "#d1d9e0", SURFACE: "#ffffff"} | dict(zip(SERIES, LIGHT, strict=True))  # for a file of its own

WIDTH = 4.0  # inches, of 72 units each: 288, shown at 350 to 420 pixels
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "effconvert",
    "text.parse_math": False,  # a name may hold dollars
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a picture is laid out alike everywhere; the page has its own
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.labelspacing": 0.25,
    "legend.borderpad": 0.1,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.handlelength": 2.6,
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.07,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.8,
}


@contextmanager
def style(**changes: Any) -> Iterator[None]:
    """Draw in our style, with changes to it, whatever matplotlib's global style is."""
    with matplotlib.style.context(["default", STYLE | changes]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has its own fonts
        yield


def figure(height: float) -> Figure:
    """Return a new figure of `height` inches; use it in `style`."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def svg(canvas: Figure, name: str, description: str) -> str:
    """Return a figure as an SVG element to embed in a page.

    Args:
        drawn: the figure.
        name: prefix of its ids, which makes them unique in the page.
        description: text for screen readers.
    """
    buffer = StringIO()
    canvas.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub("|".join(NAMES), lambda match: f"var(--{NAMES[match[0]]})", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    body = text[text.index(">") + 1 :]
    label = escape(description)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} {box[0]} role="img" aria-label="{label}"><title>{label}</title>{body}'


def plain() -> dict[str, Any]:
    """Return the changes of style for a picture that is a file of its own: colours on white in place of the page's."""
    colours = {key: PLAIN[value] for key, value in STYLE.items() if isinstance(value, str) and value in PLAIN}
    return colours | {"axes.prop_cycle": cycler(color=LIGHT), "figure.facecolor": PLAIN[SURFACE]}


def short(name: str, letters: int = 30) -> str:
    """Cut the middle out of a name that is too long for a picture."""
    return name if len(name) <= letters else f"{name[: letters // 2]}…{name[-(letters - letters // 2 - 1) :]}"
