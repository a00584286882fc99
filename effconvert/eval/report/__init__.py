"""One page about a converted model: what was done, what it cost in quality, what it won, and what to distrust.

`gather` reads everything into a `Report` of `facts`, and `doubts` says what to distrust. The JSON is that dataclass; `page` makes Markdown and HTML of the
same `tables` of it, so that the three cannot disagree. `plots` and `diagram` draw for the HTML.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effconvert.paths import real

if TYPE_CHECKING:
    from effconvert.eval.report.facts import Report


def default_page(folder: Path) -> Path:
    """Return where the page on the model in `folder` goes by itself."""
    return Path(f"{real(folder).name}-report.html")


def report(folder: Path, results: Sequence[Path] = (), output: Path | None = None, overwrite: bool = False) -> "Report":
    """Write a report on the model in `folder` as HTML, and beside it as JSON and Markdown.

    Args:
        folder: a model that effconvert wrote, or any other.
        results: files that `effconvert eval -o` and `effconvert bench -o` wrote, in which this model is measured.
        output: the page, ending in .html; by default the model's name and -report.html, here.
        overwrite: replace the three files if they exist.

    Raises:
        OptionError: there is no such folder or file, a file is about other models, or the output exists.
        ModelError: the model, or what effconvert recorded in its folder, is damaged.
        EffconvertError: matplotlib is not installed.
    """
    from effconvert.eval.report.gather import gather  # imports torch, and `--help` must not wait for it
    from effconvert.eval.report.page import check_drawing, check_output, write

    check_drawing()
    page = output or default_page(folder)
    check_output(folder, results, page, overwrite)
    gathered = gather(folder, results)
    write(gathered, page)
    return gathered
