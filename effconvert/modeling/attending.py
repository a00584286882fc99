"""Softmax attention and its cache for a technique in place of an attention module: the mask, angles of RoPE and cache that the module is called with."""
# B = batch, T = new tokens, N = tokens with those before, H = query heads, G = heads of keys and values, P = rotary pairs.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effconvert.checkpoint.config import Config
from effconvert.modeling.decoding import decoded, of_one_width
from effconvert.modeling.transformers_internals import attention_function, cache_among, repeat_heads, rotary, scaling_of
from effconvert.surgery._rope import join_pairs, split_pairs


@dataclass(frozen=True)
class Attending:
    """See `effconvert.surgery._replacement.AttendingProtocol`."""

    module: Any  # of the family's attention
    config: Config
    index: int
    arguments: Mapping[str, Any]  # of the call, beside the hidden states

    def angles(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of each rotary pair for the new tokens, [B or 1, T, P], in the dtype of `like`."""
        count, layout = self.config.rotary_of(self.index), self.config.family.rope
        batch, tokens, _ = self.arguments["position_embeddings"][0].shape
        first = torch.ones(batch, 1, tokens, count // 2, dtype=like.dtype, device=like.device)
        unit = join_pairs(first, torch.zeros_like(first), first[..., :0], layout)  # turned by the family's own function, whatever its angles are
        cos, sin, _ = split_pairs(rotary(self.module)(unit, unit, *self.arguments["position_embeddings"])[0], count, layout)
        return cos[:, 0].to(like.dtype), sin[:, 0].to(like.dtype)

    def remember(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, T, D] of the new tokens to the cache, and return those of all tokens, [B, G, N, D]."""
        cache = cache_among(self.arguments.values())
        if cache is None:
            return key, value
        rows: tuple[Tensor, Tensor] = cache.update(key, value, self.index)
        return rows

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: queries [B, H, T, D], keys [B, G, N, D], values [B, G, N, D']; returns [B, T, H, D']."""
        mask = self.arguments.get("attention_mask")
        capped = {"softcap": cap} if (cap := self.config.get("attn_logit_softcapping")) else {}
        scaling = scaling_of(self.module, self.config.scale)
        if (step := decoded(self.module, query, key, value, mask, scaling=scaling, **capped)) is not None:
            return step  # for which nothing has to be padded
        repeat_heads(self.module, query.shape[1] // key.shape[1])
        function, width = attention_function(self.module.config), value.shape[-1]
        out: Tensor = function(self.module, *of_one_width(query, key, value), mask, scaling=scaling, **capped)[0]
        return out[..., :width]
