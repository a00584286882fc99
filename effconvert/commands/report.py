"""Write one page that says what a conversion won and what it cost."""

from pathlib import Path
from typing import Any

import click

from effconvert.commands._click import OptionsCommand, given
from effconvert.eval.report.options import ReportOptions


def run(model: str, results: tuple[str, ...], **values: Any) -> None:
    """Write one page that says what a conversion won and what it cost.

    MODEL is a folder that effconvert wrote, or another model's. RESULTS are files that `effconvert eval -o` and `effconvert bench -o` wrote, in which
    this model is measured; without any, the page holds what the conversion's own verification found. It needs no network to be read, and the same
    comes beside it as JSON and as Markdown.

    \b
    Examples:
      effconvert report smol-mqa
      effconvert report smol-mqa eval.json bench.json -o smol-mqa.html
    """
    options = ReportOptions(**given(values))

    from effconvert.console import stdout
    from effconvert.eval.report import default_page, report
    from effconvert.paths import expand

    page = options.output or default_page(Path(model))
    made = report(expand(model), [expand(file) for file in results], page, options.overwrite)
    out = stdout()
    for doubt in made.doubts:
        out.print(f"distrust: {doubt}", soft_wrap=True, markup=False)
    out.print(f"{page}, and beside it the same as .json and .md", soft_wrap=True, markup=False)


command = OptionsCommand("report", [click.Argument(["model"]), click.Argument(["results"], nargs=-1)], lambda: (ReportOptions,), run)
