"""Share one key and value head among all query heads (MQA)."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, ClassVar

from effconvert.surgery._surgery import Facts
from effconvert.surgery.attention.gqa import Gqa, Grouping, choices, pooling

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config


class Mqa(Gqa):
    """Share one key and value head among all query heads (MQA).

    The same as `effconvert gqa --groups 1`; a gpt2 becomes a gpt_bigcode. Shazeer 2019, arXiv 1911.02150.

    \b
    Examples:
      effconvert mqa --refit openai-community/gpt2
      effconvert mqa --calibrate mine.txt ./SmolLM2-135M -o ./mqa
    """

    facts: ClassVar[Facts] = Facts(
        "models that attend",
        saves="KV cache",
        native="its own class, a gpt2 as gpt_bigcode (others without KV heads need effconvert)",
        exact="with one KV head already",
    )

    groups: ClassVar[int] = 1  # type: ignore[misc]  # options of gqa, fixed here
    grouping: ClassVar[Grouping] = "adjacent"  # type: ignore[misc]

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Nothing to choose."""
        choices(config)
        return pooling(config).strip() or "as it is"
