"""Option classes: one field is an option on the command line, a key in a recipe and a keyword in Python.

They are frozen pydantic models, and the same error gives the same message everywhere.
"""

import re
import reprlib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from effconvert.errors import OptionError
from effconvert.paths import expand


# Several values: `1,4` on the command line, a list in a recipe, a tuple in Python.
def _listed(values: Any) -> Any:
    if isinstance(values, str):
        return [part.strip() for part in values.split(",") if part.strip()]
    return values if values is None or isinstance(values, list | tuple) else [values]


Listed = BeforeValidator(_listed)
Names = Annotated[tuple[str, ...], Listed]
HomePath = Annotated[Path, AfterValidator(expand)]  # `~` is the home folder


LAYERS, LAYER_RANGE = "LAYERS", r"-?\d+(-\d+(/\d+)?)?"  # the metavar of options that name layers, and what they consist of

CALIBRATION_WORDS = ("self", "docstrings")  # values of --calibrate that are no file and no dataset

ELSEWHERE = {"teacher": "--refit and --transfer heal towards MODEL itself; for a model converted before: effconvert refit MODEL --teacher ORIGINAL"}

SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist, SHORT.maxtuple, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 2, 3, 3, 3, 80, 80, 40


def shown(value: Any) -> str:
    """Write a value into a message: on one line, and cut where it is long."""
    return SHORT.repr(value)


def as_typed(value: Any) -> str:
    """Write the value of an option as a user types it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class Options(BaseModel):
    """A frozen set of options that refuses unknown ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **values: Any) -> None:
        """Build the options from keywords.

        Raises:
            OptionError: options are unknown, missing or out of bounds; the message names all of them.
        """
        if errors := [message for name, value in values.items() if (message := self._value_error(name, value))]:
            raise OptionError("; ".join(errors))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OptionError("; ".join(self._message(dict(detail)) for detail in error.errors())) from None

    def changed(self, *names: str) -> list[str]:
        """Return those of these options that have another value than the default, as a user types them."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return the message for an unknown option `name`, with the nearest known one."""
        flag, known = name.replace("_", "-"), [field.replace("_", "-") for field in cls.model_fields]
        if flag in ELSEWHERE:
            return f"there is no option --{flag} here; {ELSEWHERE[flag]}"
        switch = flag.removeprefix("no-")
        if switch != flag and switch in known and cls.model_fields[switch.replace("-", "_")].default is True:  # the command line has that option
            return f"there is no option {flag} here; write `{switch}: false` in a recipe, and {switch.replace('-', '_')}=False in Python"
        if near := get_close_matches(flag, known, n=1):
            return f"there is no option --{flag}; did you mean --{near[0]}?"
        return f"there is no option --{flag}; there are {', '.join('--' + field for field in known)}, and --help shows all"

    @classmethod
    def _value_error(cls, name: str, value: Any) -> str:
        """Return the error of a value that pydantic would accept: yes or no for a number, or a character that no name can have."""
        field = cls.model_fields.get(name)
        parts = value if isinstance(value, list | tuple) else [value]
        if field and field.annotation is not bool and any(isinstance(part, bool) for part in parts):
            return f"--{name.replace('_', '-')} is {shown(value)}, and it should be a value, not yes or no"
        if any(isinstance(part, str | Path) and ("\0" in str(part) or not _encodable(str(part))) for part in parts):
            return f"--{name.replace('_', '-')} is {shown(value)}, which has a character that no name can have; leave it out"
        if field and isinstance(value, str | list | tuple) and _metavar(field) == LAYERS:
            return _layers_error(f"--{name.replace('_', '-')}", as_typed(value))
        return ""

    @classmethod
    def _message(cls, error: dict[str, Any]) -> str:
        if not error["loc"]:  # a rule about several options
            return str(error["msg"]).removeprefix("Value error, ")
        name = str(error["loc"][0])
        option = f"--{name.replace('_', '-')}"
        if error["type"] == "missing":
            return f"{option} is needed: {(cls.model_fields[name].description or '').rstrip('.')}"
        if error["type"] == "extra_forbidden":
            return cls.unknown(name)
        if error["type"].startswith("int_"):
            return f"{option} is {shown(error['input'])}, and it should be a whole number"
        if error["type"] == "string_pattern_mismatch":  # whose message is the pattern itself
            description = cls.model_fields[name].description or ""
            return f"{option} is {shown(error['input'])}, and it should be as in its description: {description.rstrip('.')}"
        if error["type"].endswith("too_short"):  # at least one is asked for everywhere
            return f"{option} is empty, and something is needed there: {(cls.model_fields[name].description or '').rstrip('.')}"
        requirement = error["msg"].removeprefix("Value error, ").replace("Input should be", "it should be").removesuffix(".")
        if requirement.startswith(option):  # one of ours that says it all
            return str(requirement)
        return f"{option} is {shown(error['input'])}, and {requirement[0].lower()}{requirement[1:]}"


def _metavar(field: FieldInfo) -> Any:
    return field.json_schema_extra.get("metavar") if isinstance(field.json_schema_extra, dict) else None


def _layers_error(option: str, value: str) -> str:
    """Return the error of a list of layers that no model could have: it is spelt wrongly, or a range runs backwards."""
    if not re.fullmatch(rf"{LAYER_RANGE}(,{LAYER_RANGE})*", value):
        return f"{option} is {shown(value)}, and it should be numbers and ranges with a comma between them: 0,2,-1, or 0-11, or 1-29/2 for every second layer"
    for part in value.split(","):
        ends = re.fullmatch(r"(\d+)-(\d+)(/\d+)?", part)
        if ends and int(ends[1]) > int(ends[2]):
            return f"{option} {part} runs backwards; write the lower number first: {ends[2]}-{ends[1]}{ends[3] or ''}"
    return ""


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# The text to measure on: the same options for every command that measures.
TEXT: Any = Field(
    None,
    description="Text to measure on: a file, of JSON and parquet the `text` in each row. Default: docstrings of the standard library.",
    json_schema_extra={"metavar": "FILE"},
)
TOKENS: Any = Field(4096, ge=2, le=10**9, description="Tokens of the text to measure on.")
CONTEXT: Any = Field(512, ge=2, le=10**9, description="Tokens in each window; compare perplexities only at the same context.")


class Conversion(Options):
    """The options of every conversion, in recipes and on the command line."""

    output: HomePath | None = Field(
        None, description="Folder to write. Default: the names of model and technique, here.", json_schema_extra={"short": "-o", "metavar": "DIR"}
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the Hub.")
    overwrite: bool = Field(False, description="Replace the output folder if effconvert wrote it.")
    verify: bool = Field(
        True,
        description="Reload the result, run it and measure; otherwise only write, and do not even ask transformers whether it opens source and result "
        "(--dry-run asks that in any case).",
    )
    text: HomePath | None = TEXT
    tokens: int = TOKENS
    context: int = CONTEXT
    calibrate: str | None = Field(
        None,
        description="Text to run the model on, for steps that need to see what it computes: a text file, JSON or parquet with a `text` in each row, a dataset "
        "on the Hub (owner/name, or owner/name:config), `self` (the model writes it, which loads the model whole, once), or `docstrings` (of the standard "
        "library, other modules than --text has). Default: self; docstrings for models that write no text, such as encoders.",
        json_schema_extra={"metavar": "FILE|DATASET|self|docstrings"},
    )
    calibration_tokens: int = Field(16384, ge=64, le=10**9, description="Tokens of the calibration text; more are better and slower.")
    calibration_window: int | None = Field(
        None,
        ge=16,
        le=10**9,
        description="Tokens in each calibration window; healing is best for texts of this length. Default: 512, or fewer if the model reads fewer or there "
        "would be fewer than 8 windows.",
        json_schema_extra={"metavar": "N"},
    )


class RunOptions(Conversion):
    """The options of a technique's command, beside its own."""

    refit: bool = Field(False, description="Add `effconvert refit` as the last step: least squares towards the original's outputs.")
    transfer: bool = Field(
        False, description="Add `effconvert transfer` as a step: train layers one by one; before a refit what a technique put in, after it other matrices."
    )
    distill: bool = Field(False, description="Add `effconvert distill` as the very last step: training towards the original's predictions.")
    dry_run: bool = Field(False, description="Check everything and print the plan; write nothing but the cache.")
