"""The options of `effconvert push`."""

from typing import Annotated

from pydantic import Field, model_validator

from effconvert.options import HomePath, Listed, Options


class PushOptions(Options):
    """The target of a push, and what goes with the model."""

    private: bool = Field(False, description="Create the repository as private, if it does not exist.")
    revision: str | None = Field(
        None, min_length=1, description="Branch to push to, created if it does not exist. Default: main.", json_schema_extra={"metavar": "BRANCH"}
    )
    pr: bool = Field(False, description="Open a pull request, which needs no write access to the repository.")
    message: str | None = Field(None, pattern=r"\S", description="Commit message. Default: the recipe.")
    results: Annotated[tuple[HomePath, ...], Listed] = Field(
        (), description="Results of eval and bench (--output) for the card.", json_schema_extra={"metavar": "FILE,…"}
    )
    dry_run: bool = Field(False, description="List the files to send, with every error that can be found offline; contact no server.")

    @model_validator(mode="after")
    def _one_repository(self) -> "PushOptions":
        if self.private and self.pr:
            raise ValueError("--private is for a new repository, and --pr needs an existing one; give one of them")
        return self
