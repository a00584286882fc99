"""Decoding steps by the kernel of `decode_attention`, where that runs. Elsewhere models attend as they did without it."""
# B = batch, H = query heads, Hk = KV heads, T = new tokens, S = keys, D = width of keys, D' = that of values.

from typing import Any

import torch
from torch import Tensor

from effconvert.kernels.choice import cannot, runs_triton
from effconvert.modeling.transformers_internals import implementation, is_causal

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
    tokens, asked = query.shape[2], getattr(module, "kernels", "auto")
    if tokens > TOKENS or not runs_triton(query.device, OPERATION, asked):
        return None
    if not is_causal(module) or kwargs.get("is_causal") is False or kwargs.get("output_attentions") or (torch.is_grad_enabled() and query.requires_grad):
        return None  # an encoder, who wants the weights, or training
    if mask is None and 1 < tokens < key.shape[2]:
        return None  # a prompt into an empty static cache: transformers means the first keys by that
    from effconvert.kernels.decode_attention import decode_attention, uncovered  # imports triton

    if why := _not_covered(query, key, mask, kwargs) or uncovered(query, key, value):
        cannot(OPERATION, why, asked)
        return None
    out = decode_attention(query, key, value, mask=None if mask is None else mask[:, 0], scaling=kwargs.get("scaling"), softcap=kwargs.get("softcap"))
    return out.transpose(1, 2)


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


def choose(model: Any, kernels: str, name: str) -> None:
    """Have a model on its device decode by kernels, or not: "auto", "triton" or "reference".

    Args:
        model: of transformers, or of a class of ours.
        kernels: what is asked for.
        name: that of our attention function in transformers' registry, which a stock model is given where kernels run.

    Raises:
        ValueError: kernels are asked for, and cannot run here, or the model does not attend by an attention function.
    """
    runs = runs_triton(model.device, OPERATION, kernels)
    modules = [module for module in model.modules() if is_causal(module)]
    for module in modules:
        module.kernels = kernels
    if not runs or not model.can_generate() or (before := implementation(model.config)) == name:
        return
    if modules:
        model.set_attn_implementation(name)  # which some classes answer by a warning alone
    if implementation(model.config) != name:
        cannot(OPERATION, f"{type(model).__name__} does not attend through transformers' AttentionInterface", kernels)
        return
    for module in modules:
        module.softmax = before
