"""FFN: what the family's own FFN makes, times a gain of each channel."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING

from effconvert.surgery._replacement import PlaceContext, Replacement

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config


class GatedFfn(Replacement):
    """Multiply what the FFN makes by a gain."""

    place = "ffn"

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """A gain for each channel, [M]."""
        return {"gain": (config.hidden,)}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Ones."""
        import torch

        return {"gain": torch.ones(config.hidden)}

    def is_exact(self, config: Config) -> bool:
        """Yes, as gains of one change nothing."""
        return True

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Run the family's FFN, and multiply."""
        return weights["gain"] * context.original(hidden)
