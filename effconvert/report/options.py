"""The options of `effconvert report`."""

from pathlib import Path

from pydantic import Field, field_validator

from effconvert.options import HomePath, Options


class ReportOptions(Options):
    """The output of a report."""

    output: HomePath | None = Field(
        None,
        description="Page to write, ending in .html; .json and .md come beside it. Default: the model's name and -report.html, here.",
        json_schema_extra={"short": "-o", "metavar": "FILE"},
    )
    overwrite: bool = Field(False, description="Replace the files if they exist.")

    @field_validator("output")
    @classmethod
    def _page(cls, output: Path | None) -> Path | None:
        if output is not None and output.suffix != ".html":
            raise ValueError("it should end in .html, such as report.html")
        return output
