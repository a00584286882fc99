"""Write one page on the gains and costs of a conversion."""

from pathlib import Path
from typing import Any

import click

from effconvert.commands._click import OptionsCommand, given_options
from effconvert.report.options import ReportOptions


def run(model: str, results: tuple[str, ...], **values: Any) -> None:
    """Write one page on the gains and costs of a conversion.

    MODEL is a folder that effconvert wrote, or another model's. RESULTS are files of `effconvert eval -o` and `effconvert bench -o` that include this
    model; without them the page shows the conversion's own verification. The page is self-contained, and is also written as JSON and Markdown,
    the picture of a training as PNG.

    \b
    Examples:
      effconvert report smol-mqa
      effconvert report smol-mqa eval.json bench.json -o smol-mqa.html
    """
    options = ReportOptions(**given_options(values))

    from effconvert.console import stdout
    from effconvert.paths import expand
    from effconvert.report import default_page, report
    from effconvert.report.page import forms

    page = options.output or default_page(Path(model))
    result = report(expand(model), [expand(file) for file in results], page, options.overwrite)
    out = stdout()
    for doubt in result.doubts:
        out.print(f"distrust: {doubt}", soft_wrap=True, markup=False)
    out.print(f"written to {page}, and beside it as {', '.join(forms(result)[1:])}", soft_wrap=True, markup=False)


command = OptionsCommand(
    "report", [click.Argument(["model"], type=click.Path()), click.Argument(["results"], nargs=-1, type=click.Path())], lambda: (ReportOptions,), run
)
