"""One page about a converted model: its conversion, its cost in quality, its gains in speed and memory, and what to distrust.

`gather` reads everything into a `Report` (`facts`), and `doubts` lists what to distrust. The JSON is that dataclass. `page` renders its `tables` as
Markdown and HTML, so the forms always agree. `plots`, `diagram` and `course` draw the pictures of the HTML; that of a training is a PNG too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effconvert.paths import real

if TYPE_CHECKING:
    from effconvert.report.facts import Report


def default_page(folder: Path) -> Path:
    """Return the default path of the page on the model in `folder`."""
    return Path(f"{real(folder).name}-report.html")


def report(folder: Path, results: Sequence[Path] = (), output: Path | None = None, overwrite: bool = False) -> "Report":
    """Write a report on the model in `folder` as HTML, JSON and Markdown, and the picture of its training as PNG.

    Args:
        folder: a model that effconvert wrote, or any other.
        results: files of `effconvert eval -o` and `effconvert bench -o` that include this model.
        output: the page, ending in .html; by default the model's name and -report.html, here.
        overwrite: replace the files if they exist.

    Raises:
        OptionError: a folder or file does not exist, a file is about other models, or the output exists.
        ModelError: the model or its manifest is damaged.
        EffconvertError: matplotlib is not installed.
    """
    from effconvert.report.gather import gather  # imports torch, which `--help` must not load
    from effconvert.report.page import check_drawing, check_output, forms, write

    check_drawing()
    page = output or default_page(folder)
    check_output(folder, results, page, overwrite)
    result = gather(folder, results)
    check_output(folder, results, page, overwrite, forms(result))
    write(result, page)
    return result
