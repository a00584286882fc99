"""What `effconvert push` can be asked for."""

from typing import Annotated

from pydantic import Field, model_validator

from effconvert.options import HomePath, Listed, Options


class PushOptions(Options):
    """Where a model goes on the Hub, and what goes with it."""

    private: bool = Field(False, description="Make the repository private, if it has to be made.")
    revision: str | None = Field(
        None, min_length=1, description="Branch to push to, made where there is none. Default: main.", json_schema_extra={"metavar": "BRANCH"}
    )
    pr: bool = Field(False, description="Open a pull request, which needs no write access to the repository.")
    message: str | None = Field(None, pattern=r"\S", description="Message of the commit. Default: the recipe.")
    results: Annotated[tuple[HomePath, ...], Listed] = Field(
        (), description="Results of eval and bench (--output) for the card.", json_schema_extra={"metavar": "FILE,…"}
    )
    dry_run: bool = Field(False, description="List what would be sent, with every error that can be found without the Hub; ask it nothing.")

    @model_validator(mode="after")
    def _one_repository(self) -> "PushOptions":
        if self.private and self.pr:
            raise ValueError("--private is for a repository that push makes, and --pr needs one that is there; give one of them")
        return self
