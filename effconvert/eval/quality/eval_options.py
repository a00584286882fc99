"""The options of `effconvert eval`. Their names are lm-eval's where lm-eval has one."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from effconvert.errors import OptionError
from effconvert.options import CONTEXT, TEXT, TOKENS, HomePath, Listed, Names, Options
from effconvert.paths import expand

FOR_TASKS = ("num_fewshot", "limit", "samples", "apply_chat_template", "max_length", "batch_size", "include_path")  # without effect on other measurements
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _samples(value: Any) -> Any:
    """Read `--samples` as lm-eval does: JSON, or the name of a JSON file."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value if value.lstrip().startswith("{") else expand(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f'--samples is neither JSON like {{"piqa": [0, 2]}} nor a JSON file ({error}); give one of them') from None


class EvalOptions(Options):
    """What is measured, on what, and how."""

    tasks: Names = Field((), description="Tasks, groups or tags of lm-eval, separated by commas.", json_schema_extra={"metavar": "TASK,…"})
    include_path: HomePath | None = Field(None, description="Folder with task files of your own.", json_schema_extra={"metavar": "DIR"})
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question. Default: the task's own number.")
    limit: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Only the first N documents of each task, or a fraction below 1.", json_schema_extra={"metavar": "N"}
    )
    samples: Annotated[dict[str, tuple[int, ...]] | None, BeforeValidator(_samples)] = Field(
        None, description='Only these documents: JSON like {"piqa": [0, 2]}, or a JSON file.', json_schema_extra={"metavar": "JSON"}
    )
    apply_chat_template: bool = Field(False, description="Use the tokenizer's chat template for prompts.")
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="Sequences at a time; auto: as many as fit on an accelerator, 1 on a CPU.", json_schema_extra={"metavar": "N|auto"}
    )
    max_length: int | None = Field(None, ge=2, description="Longest input of a task in tokens. Default: the shortest limit of all models.")
    text: HomePath | None = TEXT
    tokens: int = TOKENS
    context: int = CONTEXT
    generation: bool = Field(True, description="Let the models write, and measure repetition.")
    passkey: Annotated[tuple[Annotated[int, Field(ge=64)], ...], Listed] = Field(
        (256, 1024), description="Lengths in tokens at which to hide a passkey and ask for it.", json_schema_extra={"metavar": "N,…"}
    )
    pairs: HomePath | None = Field(
        None, description="For encoders: sentence pairs with scores, .jsonl or .csv with sentence1, sentence2, score.", json_schema_extra={"metavar": "FILE"}
    )
    device: str | None = Field(None, description="Device. Default: this machine's accelerator, or cpu.")
    dtype: Dtype = Field("auto", description="Type to compute in; auto: that of each model's weights.")
    confirm_run_unsafe_code: bool = Field(False, description="Run tasks that execute code written by a model.")
    cache: bool = Field(True, description="Reuse earlier results from the cache; otherwise measure again.")
    output: HomePath | None = Field(None, description="Write the results to this JSON file.", json_schema_extra={"short": "-o", "metavar": "FILE"})

    @model_validator(mode="after")
    def _one_choice(self) -> "EvalOptions":
        if not self.tasks and (names := self.changed(*FOR_TASKS)):
            raise ValueError(f"{names[0]} is for lm-eval's tasks, and none is named; give --tasks, or leave it out")
        if self.limit is not None and self.samples is not None:
            raise ValueError("--limit and --samples both choose documents; give one of them")
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            raise ValueError(f"--limit {self.limit} should be a whole number of documents, or a fraction below 1")
        return self

    def refuse_passkey(self, model: str, kind: str) -> None:
        """Refuse lengths of passkeys for a model that cannot write one.

        Raises:
            OptionError: some were given.
        """
        if self.passkey and self.changed("passkey"):
            raise OptionError(f"--passkey is for models that predict the next token, and {model} is {kind}; leave it out")
