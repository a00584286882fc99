"""Put an instruct model's training into a model converted from its base."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.surgery._surgery import Step

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Model


class Transplant(Step):
    """Put an instruct model's training into a model converted from its base.

    Adds (instruct - base) to every tensor that the conversion of the base kept, byte for byte; as these are the base's, that is the instruct model's
    tensor, and it is copied. What the conversion changed stays as it is. The tokenizer, the chat template, generation_config.json and the numbers of
    special tokens are the instruct model's. Nothing is trained, and nothing but copies is in memory. MODEL is the converted model.
    For conversions that train: converting the instruct model itself is better where it costs nothing. A model of which all weights were trained keeps no
    tensor, and is refused.
    The idea is task arithmetic (Ilharco et al. 2023, arXiv 2212.04089).

    \b
    Examples:
      effconvert transplant ./SmolLM2-135M-linear --base ./SmolLM2-135M --instruct ./SmolLM2-135M-Instruct -o ./SmolLM2-135M-Instruct-linear
      effconvert transplant ./pruned --base HuggingFaceTB/SmolLM2-135M --instruct HuggingFaceTB/SmolLM2-135M-Instruct --dry-run
    """

    comes_last: ClassVar[bool] = True
    base: str = Field(description="The model that MODEL was converted from: folder, Hub id or .gguf file.", json_schema_extra={"metavar": "MODEL"})
    instruct: str = Field(
        description="A model that the base was trained on to, with the same tensors: folder, Hub id or .gguf file.", json_schema_extra={"metavar": "MODEL"}
    )

    @property
    def label(self) -> str:
        """The command alone."""
        return self.name

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Any model."""
        return "--base its original --instruct what that was trained on to"

    def check(self, config: Config) -> None:
        """Refuse nothing: what counts are the three models' tensors (`effconvert.convert.transplant`)."""

    def is_exact(self, config: Config) -> bool:
        """Never: it changes what the model computes."""
        return False

    def config(self, config: Config) -> Config:
        """Change nothing here: the numbers of special tokens are only known with the instruct model."""
        return config

    def rewrite(self, model: Model) -> None:
        """Change nothing here: tensors are copied from the instruct model when it is written."""
