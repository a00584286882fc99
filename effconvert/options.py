"""One definition of an option, whatever door it comes through: a field is an option on the command line, a key in a recipe and a keyword in Python.

A set of options is a frozen pydantic model, and the same mistake gives the same sentence at every door.
"""

import reprlib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from effconvert.errors import OptionError
from effconvert.paths import expand


# Several values: `1,4` on the command line, a list in a recipe, a tuple in Python.
def _listed(given: Any) -> Any:
    if isinstance(given, str):
        return [part.strip() for part in given.split(",") if part.strip()]
    return given if given is None or isinstance(given, list | tuple) else [given]


Listed = BeforeValidator(_listed)
Names = Annotated[tuple[str, ...], Listed]
HomePath = Annotated[Path, AfterValidator(expand)]  # in which `~` is somebody's home folder


SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist, SHORT.maxtuple, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 2, 3, 3, 3, 80, 80, 40


def shown(value: Any) -> str:
    """Write somebody's value into a message: on one line, and cut where it is long."""
    return SHORT.repr(value)


class Options(BaseModel):
    """A frozen set of options that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **given: Any) -> None:
        """Make the options from keywords.

        Raises:
            OptionError: something is unknown, missing or out of bounds; all of it is named.
        """
        if strange := [sentence for name, value in given.items() if (sentence := self._strange(name, value))]:
            raise OptionError("; ".join(strange))
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise OptionError("; ".join(self._sentence(dict(mistake)) for mistake in error.errors())) from None

    @classmethod
    def unknown(cls, name: str) -> str:
        """Say that there is no option `name`, and which one may be meant."""
        spelt, known = name.replace("_", "-"), [field.replace("_", "-") for field in cls.model_fields]
        near = get_close_matches(spelt, known, n=1)
        return f"there is no option --{spelt}; " + (f"did you mean --{near[0]}?" if near else f"there are {', '.join('--' + field for field in known)}")

    @classmethod
    def _strange(cls, name: str, value: Any) -> str:
        """Say what is wrong with a value that pydantic would take: yes for a number, a character that no file or model can have in its name."""
        field = cls.model_fields.get(name)
        parts = value if isinstance(value, list | tuple) else [value]
        if field and field.annotation is not bool and any(isinstance(part, bool) for part in parts):
            return f"--{name.replace('_', '-')} is {shown(value)}, and it should be a value, not yes or no"
        if any(isinstance(part, str | Path) and ("\0" in str(part) or not _encodable(str(part))) for part in parts):
            return f"--{name.replace('_', '-')} is {shown(value)}, which holds a character that no name can have"
        return ""

    @classmethod
    def _sentence(cls, mistake: dict[str, Any]) -> str:
        if not mistake["loc"]:  # a rule about several options
            return str(mistake["msg"]).removeprefix("Value error, ")
        name = str(mistake["loc"][0])
        option = f"--{name.replace('_', '-')}"
        if mistake["type"] == "missing":
            return f"{option} is needed: {(cls.model_fields[name].description or '').rstrip('.')}"
        if mistake["type"] == "extra_forbidden":
            return cls.unknown(name)
        if mistake["type"].startswith("int_"):
            return f"{option} is {shown(mistake['input'])}, and it should be a whole number"
        needed = mistake["msg"].replace("Input should be", "it should be").removesuffix(".")
        return f"{option} is {shown(mistake['input'])}, and {needed[0].lower()}{needed[1:]}"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# What text to measure on, wherever something is measured.
TEXT: Any = Field(None, description="Text file to measure on. Default: docstrings of the standard library.", json_schema_extra={"metavar": "FILE"})
TOKENS: Any = Field(4096, ge=2, le=10**9, description="Tokens of it to measure on.")
CONTEXT: Any = Field(512, ge=2, le=10**9, description="Tokens in each window: a perplexity counts only beside one with the same context.")


class Conversion(Options):
    """What every conversion understands, whatever its surgeries."""

    output: HomePath | None = Field(
        None, description="Folder to write. Default: the model's name and the technique's, here.", json_schema_extra={"short": "-o", "metavar": "DIR"}
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the Hub.")
    overwrite: bool = Field(False, description="Replace the output folder if effconvert wrote it.")
    verify: bool = Field(True, description="Reload from disk, run, measure; otherwise only write.")
    text: HomePath | None = TEXT
    tokens: int = TOKENS
    context: int = CONTEXT
    calibrate: str | None = Field(
        None,
        description="Text to run the model on, for steps that need to see what it computes: a text file, a file of JSON lines with a `text`, a dataset on the "
        "Hub (owner/name, or owner/name:config), `self` (the model writes it, which loads the model whole, once), or `docstrings` (of the standard library, "
        "other modules than --text has). Default: self; docstrings for models that write no text, such as encoders.",
        json_schema_extra={"metavar": "FILE|DATASET|self|docstrings"},
    )
    calibration_tokens: int = Field(16384, ge=64, le=10**9, description="Tokens of it: more are better and take longer.")
    calibration_window: int | None = Field(
        None,
        ge=16,
        le=10**9,
        description="Tokens of it that are read together: what is taught or refitted is so for texts of that length. Default: 512, or fewer where the model "
        "reads fewer or there are not 8 windows.",
        json_schema_extra={"metavar": "N"},
    )


class RunOptions(Conversion):
    """What a conversion understands that is asked for by name."""

    refit: bool = Field(False, description="Afterwards refit what changed towards what the model computed before: `effconvert refit` as the last step.")
    transfer: bool = Field(False, description="Afterwards teach mixers what attention did: `effconvert transfer` as a step, before a refit.")
    dry_run: bool = Field(False, description="Print the plan, with every error that can be foreseen; write nothing.")
