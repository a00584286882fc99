"""Latent attention (MLA) in a decoding step: queries and outputs go through the latents, so that keys and values of all heads are never made."""
# B = batch, H = heads, T = new tokens, S = tokens in the cache, R = rank of the latents, P = width of the key that RoPE turns, N, V = widths of the other key
# and of a value.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effconvert.modeling.decoding import by_groups, decoded, is_step
from effconvert.modeling.transformers_internals import implementation

EXPAND = "expand_kv"  # the method of transformers' attention modules that makes keys and values of latents


def can_absorb(module: nn.Module) -> bool:
    """Whether an attention module makes its keys and values of latents, in a method of its own."""
    return hasattr(type(module), EXPAND)


def absorb(module: Any, name: str) -> None:
    """Have a module pass its latents on while it attends by the function of this name in transformers' registry; never, where that is empty."""
    module.__dict__.pop(EXPAND, None)
    if name:
        module.__dict__[EXPAND] = _Latents(module, name)


@dataclass
class _Latents:
    """Takes the place of the method; an object and no function, as a deep copy of a model copies it along."""

    module: Any
    name: str

    def __call__(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the attention function gets in place of keys and values: [B, 1, S, P], [B, 1, S, R]."""
        ours = implementation(self.module.config) == self.name
        return (turned, latent) if ours else expanded(self.module, turned, latent)


def absorbs(module: nn.Module) -> bool:
    """Whether a module passes latents in place of keys and values."""
    return EXPAND in module.__dict__


def expanded(module: Any, turned: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys [B, H, S, N + P] and values [B, H, S, V], as the family makes them."""
    key, value = getattr(type(module), EXPAND)(module, latent, turned)
    return key, value


def decode(module: Any, query: Tensor, turned: Tensor, latent: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor | None:
    """Return the outputs of a decoding step, [B, T, H, V]; None for a prompt, which is cheaper with keys and values.

    A score is (W_k c) q = c (W_k^T q), and the output W_v sum_s a_s c_s: one head of latents serves all query heads. The same numbers, but for rounding.
    DeepSeek-AI 2024, arXiv 2405.04434, section 2.1.2.

    Args:
        module: of the family's attention.
        query: [B, H, T, N + P].
        turned: keys that RoPE turned, [B, 1, S, P].
        latent: [B, 1, S, R].
        mask: which keys are seen, bool [B, 1, T, S]; None: all before a token, and itself.
        kwargs: what transformers gives an attention function.
    """
    if not is_step(module, query, latent, mask, kwargs) or type(module.kv_b_proj) is not nn.Linear:
        return None  # a prompt; or it is quantised, or has an adapter, so that its weight is not all of it
    rank = latent.shape[-1]
    unturned = query.shape[-1] - turned.shape[-1]
    up_key, up_value = module.kv_b_proj.weight.view(query.shape[1], -1, rank).split([unturned, module.v_head_dim], 1)  # [H, N, R], [H, V, R]
    inside = torch.cat([query[..., :unturned] @ up_key, query[..., unturned:]], -1)  # [B, H, T, R + P]
    key = torch.cat([latent, turned], -1)  # [B, 1, S, R + P]
    if (out := decoded(module, inside, key, latent, mask, **kwargs)) is None:
        out = by_groups(module, inside, key, key, mask, **kwargs)  # keys as values: of one width, which is faster than the narrower latents
    return None if out is None else torch.einsum("bthr,hvr->bthv", out[..., :rank], up_value)
