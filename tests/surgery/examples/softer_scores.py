"""Scores: softmax attention at a temperature that each head learns."""

import torch
from pydantic import Field

from effconvert.surgery.mixing._call import past
from effconvert.surgery.mixing._mixing import Mixing


class SofterScores(Mixing):
    """Divide scores by a temperature."""

    no_encoders = "looks back only"
    window: int = Field(64, ge=1, description="Tokens that are seen.")

    @property
    def softmax_tokens(self):
        return self.window

    def parameters(self, config, place=""):
        return {"temperature": (config.heads,)}

    def initial_values(self, config, index):
        return {"temperature": torch.ones(config.heads)}

    def cache_slots(self, config):
        return past(self.window - 1, config.kv_heads, config.head_dim)

    def is_exact(self, config):
        return True

    def mix(self, weights, call):
        key, value, live = call.with_window(self.window - 1)  # [B, Hk, P + T, D]
        scores = call.grouped @ key[:, :, None].mT * call.scaling / weights["temperature"].view(1, key.shape[1], -1, 1, 1)
        tokens, known = scores.shape[-2:]
        seen = torch.ones(tokens, known, dtype=torch.bool).tril(known - tokens).triu(known - tokens - self.window + 1) & live[:, None, None, None]
        return (scores.masked_fill(~seen, -1e9).softmax(-1) @ value[:, :, None]).flatten(1, 2)
