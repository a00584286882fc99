"""Scores: softmax attention at a temperature that each head learns."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call, Slots


class SofterScores(Mixing):
    """Divide scores by a temperature."""

    no_encoders = "looks back only"
    leaves_windows = True
    window: int = Field(64, ge=1, description="Tokens that are seen.")

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """A temperature for each head, [H]."""
        return {"temperature": (config.heads,)}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Ones."""
        import torch

        return {"temperature": torch.ones(config.heads)}

    def cache_slots(self, config: Config) -> Slots:
        """Keys and values of the window."""
        from effconvert.surgery.mixing._call import past

        return past(self.window - 1, config.kv_heads, config.head_dim)

    def is_exact(self, config: Config) -> bool:
        """Yes, as temperatures of one change nothing."""
        return True

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Attend to the window, in the model's dtype and on its device."""
        import torch

        call = call.prescaled
        key, value, live = call.with_window(self.window - 1)  # [B, Hk, P + T, D]
        scores = call.grouped @ key[:, :, None].mT * call.scaling / weights["temperature"].view(1, key.shape[1], -1, 1, 1)
        tokens, known = scores.shape[-2:]
        seen = torch.ones_like(scores, dtype=torch.bool).tril(known - tokens).triu(known - tokens - self.window + 1) & live[:, None, None, None]
        return (scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) @ value[:, :, None]).flatten(1, 2)
