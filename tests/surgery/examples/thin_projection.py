"""Projection: two thin matrices in place of `up` and `down`, exact at full rank."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from effconvert.surgery._replacement import PlaceContext, Replacement

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer


class ThinProjection(Replacement):
    """Replace projections by their truncated singular value decomposition."""

    drops = ("up", "down")
    rank: int = Field(ge=1, description="Inner width R.")

    def places(self, config: Config) -> tuple[str, ...]:
        """Run at both projections."""
        return ("up", "down")

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Two factors, [out, R] and [R, in]."""
        out, inner = config.matrices[place]
        return {"left": (out, self.rank), "right": (self.rank, inner)}

    def is_exact(self, config: Config) -> bool:
        """At full rank."""
        return self.rank == min(config.ffn, config.hidden)

    def values(self, layer: Layer, place: str) -> Mapping[str, Tensor]:
        """Decompose the layer's projection; the plan asks for shapes alone, on the meta device."""
        import torch

        left, size, right = torch.linalg.svd(layer[place], full_matrices=False)
        return {"left": left[:, : self.rank] * size[: self.rank], "right": right[: self.rank]}

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Multiply by one factor after the other; the family's bias is added to it."""
        return hidden @ weights["right"].T @ weights["left"].T
