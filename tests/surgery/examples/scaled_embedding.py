"""Outside the layers: the embedding, times a factor."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

from pydantic import Field

from effconvert.surgery._surgery import Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.outer import Outer


class ScaledEmbedding(Surgery):
    """Multiply the embedding by a factor, and with it a head that is tied to it."""

    factor: float = Field(gt=0, description="Factor of the embedding.", json_schema_extra={"metavar": "FACTOR"})

    def check(self, config: Config) -> None:
        """Take every model."""

    def is_exact(self, config: Config) -> bool:
        """If nothing is multiplied."""
        return self.factor == 1

    def config(self, config: Config) -> Config:
        """Change nothing: no shape changes."""
        return config

    def outer(self, outer: Outer) -> None:
        """Multiply."""
        outer["embed"] = outer["embed"] * self.factor
