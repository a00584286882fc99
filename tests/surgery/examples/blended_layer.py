"""Layer: a share of what the whole layer makes, the rest of what it was given."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING

from effconvert.surgery._replacement import PlaceContext, Replacement

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config


class BlendedLayer(Replacement):
    """Blend a layer with the identity."""

    place = "layer"

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The share of the layer's output."""
        return {"share": (1,)}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """One: the whole output."""
        import torch

        return {"share": torch.ones(1)}

    def is_exact(self, config: Config) -> bool:
        """Yes, as a share of one changes nothing."""
        return True

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Move from input to output by the share."""
        return hidden + weights["share"] * (context.original(hidden) - hidden)
