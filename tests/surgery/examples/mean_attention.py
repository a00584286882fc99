"""Attention: the mean of all tokens, in place of the whole module."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING

from effconvert.surgery._replacement import PlaceContext, Replacement

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config


class MeanAttention(Replacement):
    """Replace attention by the mean of the text and a gain."""

    place = "attention"
    drops = ("q", "k", "v", "o", "q_norm", "k_norm")
    no_decoders = "sees later tokens"

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """A gain for each channel, [M]."""
        return {"gain": (config.hidden,)}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Ones."""
        import torch

        return {"gain": torch.ones(config.hidden)}

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Give each token the mean of those that are no padding."""
        live = context.live[..., None]  # [B, T, 1]
        mean = (hidden * live).sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp_min(1)
        return weights["gain"] * mean.expand_as(hidden)
