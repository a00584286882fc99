"""Decoding steps by the kernel of `decode_attention`, where that runs. Elsewhere models attend as they did without it."""
# B = batch, H = query heads, Hk = KV heads, T = new tokens, S = keys, D = width of keys, D' = that of values.

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from effconvert.kernels.choice import cannot, runs_triton
from effconvert.modeling.transformers_internals import is_causal

OPERATION = "decode_attention"
TOKENS = 4  # at most, in a decoding step: a prompt, which other kernels are for, has more


def decoded(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor | None:
    """Return the outputs of a decoding step by the kernel, [B, T, H, D']; None where the model is to attend without it.

    Args:
        module: of the family's attention.
        query: [B, H, T, D].
        key: [B, Hk, S, D].
        value: [B, Hk, S, D'].
        mask: which keys are seen, bool [B, 1, T, S]; None: all before a token, and itself.
        kwargs: what transformers gives an attention function.

    Raises:
        ValueError: the kernel was asked for, and cannot run here or does not cover this step.
    """
    asked = getattr(module, "kernels", "auto")
    if not is_step(query, key, mask) or not runs_triton(query.device, OPERATION, asked):
        return None
    if not is_causal(module) or kwargs.get("is_causal") is False or kwargs.get("output_attentions") or (torch.is_grad_enabled() and query.requires_grad):
        return None  # an encoder, who wants the weights, or training
    from effconvert.kernels.decode_attention import decode_attention, uncovered  # imports triton

    if why := _not_covered(query, key, mask, kwargs) or uncovered(query, key, value):
        cannot(OPERATION, why, asked)
        return None
    out = decode_attention(query, key, value, mask=None if mask is None else mask[:, 0], scaling=kwargs.get("scaling"), softcap=kwargs.get("softcap"))
    return out.transpose(1, 2)


def is_step(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether this is a decoding step: few tokens, and not a prompt into an empty static cache, by which transformers means the first keys."""
    tokens, keys = query.shape[2], key.shape[2]
    return tokens <= TOKENS and (mask is not None or tokens in (1, keys))


def by_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return the outputs of a decoding step by PyTorch, [B, T, H, D']: the query heads of a group are rows of one, so that no key is repeated for each of them.

    Arguments as in `decoded`; without a mask the step is the first tokens of a text.
    """
    tokens, width = query.shape[2], value.shape[-1]
    query, key, value = of_one_width(query, key, value)
    packed = query.unflatten(1, (key.shape[1], -1))  # [B, Hk, R, T, D], R query heads for each
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    rows = None if mask is None else mask.expand(-1, packed.shape[2], -1, -1).flatten(1, 2)[:, None]  # [B, 1, R T, S]
    out = scaled_dot_product_attention(packed.flatten(2, 3), key, value, rows, scale=scaling)[..., :width]
    rows_of_heads: Tensor = out.unflatten(2, (-1, tokens)).flatten(1, 2)
    return rows_of_heads.transpose(1, 2)


def of_one_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad queries, keys and values with zeros to one width: PyTorch's fused attention needs it, and is several times as fast on a CPU. Outputs end in zeros."""
    more = key.shape[-1] - value.shape[-1]
    return pad(query, (0, max(0, -more))), pad(key, (0, max(0, -more))), pad(value, (0, max(0, more)))


def _not_covered(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> str:
    """Return what of a call of an attention function the operation does not know."""
    batch, tokens, keys = len(query), query.shape[2], key.shape[2]
    if kwargs.get("dropout"):
        return "dropout"
    for name in ("position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            return name
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in ((batch, 1, tokens, keys), (1, 1, tokens, keys))):
        return f"a mask {mask.dtype} {[*mask.shape]}"
    return ""
