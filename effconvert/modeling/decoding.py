"""Decoding steps: by the kernel of `decode_attention`, where that runs, or by PyTorch without keys that are repeated for each query head."""
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
    if not is_step(module, query, key, mask, kwargs) or not runs_triton(query.device, OPERATION, asked) or (torch.is_grad_enabled() and query.requires_grad):
        return None
    from effconvert.kernels.decode_attention import decode_attention, uncovered  # imports triton

    if why := _not_covered(query, key, mask, kwargs) or uncovered(query, key, value):
        cannot(OPERATION, why, asked)
        return None
    out = decode_attention(query, key, value, mask=None if mask is None else mask[:, 0], scaling=kwargs.get("scaling"), softcap=kwargs.get("softcap"))
    return out.transpose(1, 2)


def is_step(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether this is a decoding step of which nobody wants the weights; arguments as in `decoded`.

    Without a mask few tokens before many keys are a prompt into an empty static cache, by which transformers means the first keys.
    """
    tokens, keys = query.shape[2], key.shape[2]
    few = tokens <= TOKENS and (mask is not None or tokens in (1, keys))
    return few and is_causal(module) and kwargs.get("is_causal") is not False and not kwargs.get("output_attentions")


def by_groups(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor | None:
    """Return the outputs of a decoding step by PyTorch, [B, T, H, D']; None for anything else. Arguments as in `decoded`.

    The query heads of a group are rows of one, so that no key is repeated for each of them.
    """
    if not is_step(module, query, key, mask, kwargs) or kwargs.get("softcap") is not None or _not_covered(query, key, mask, kwargs):
        return None
    tokens, width, scaling = query.shape[2], value.shape[-1], kwargs.get("scaling") or query.shape[-1] ** -0.5
    query, key, value = of_one_width(query, key, value)
    packed = query.unflatten(1, (key.shape[1], -1))  # [B, Hk, R, T, D], R query heads for each
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    rows = None if mask is None else mask.expand(-1, packed.shape[2], -1, -1).flatten(1, 2)[:, None]  # [B, 1, R T, S]
    out = scaled_dot_product_attention(packed.flatten(2, 3), key, value, rows, scale=scaling)[..., :width]
    by_head: Tensor = out.unflatten(2, (-1, tokens)).flatten(1, 2)
    return by_head.transpose(1, 2)


def of_one_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad queries, keys and values with zeros to one width: PyTorch's fused attention needs it, and is several times as fast on a CPU. Outputs end in zeros."""
    more = key.shape[-1] - value.shape[-1]
    if not more:
        return query, key, value  # a padding of 0 copies
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
