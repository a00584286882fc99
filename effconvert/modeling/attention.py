"""Attention function that runs a layer's mixer, registered with transformers' AttentionInterface; a pre-hook passes it the cache and hidden states."""
# B = batch, H = query heads, Hk = KV heads, T = new tokens, N = tokens with those before, D = head width.

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effconvert.checkpoint.config import Config
from effconvert.families import FAMILIES
from effconvert.kernels.choice import cannot, runs_triton, wanted
from effconvert.modeling import latent
from effconvert.modeling.decoding import OPERATION, by_groups, decoded, of_one_width
from effconvert.modeling.grouped import unique_heads
from effconvert.modeling.packed import arrange
from effconvert.modeling.places import NAME as OWN_NAME
from effconvert.modeling.places import Own
from effconvert.modeling.state import State
from effconvert.modeling.transformers_internals import (
    AttentionInterface,
    AttentionMaskInterface,
    attention_inputs,
    cache_among,
    eager,
    implementation,
    is_causal,
    rotary,
    sdpa,
    sdpa_mask,
    shared_by,
)
from effconvert.surgery.mixing._call import Call, Rotation
from effconvert.surgery.mixing._mixing import Mixing

NAME = "effconvert"  # of our function in transformers' registry
SLICE = 2048  # tokens of a decoder's mixer per call, which limits its memory on long prompts
BEFORE = "attention_before"  # attribute of a stock model that has our function: the name of its own
SOFTMAX = ("sdpa", "eager")  # implementations for layers without a mixer


class Mixer(Own):
    """A technique's mixer inside a model: `self_attn.effconvert`, with its parameters."""

    technique: Mixing

    def __init__(self, technique: Mixing, config: Config, index: int) -> None:
        super().__init__(technique, config, index, technique.place)
        self.slots = technique.cache_slots(config)

    def forward(self, call: Call) -> Tensor:
        """Mix: [B, H, T, D]. Under autocast as a model of its type does, so that what is float32 there, such as sums, is so here."""
        device = call.query.device.type
        if not torch.is_autocast_enabled(device):
            return self._mix(self.weights, call)
        dtype = torch.get_autocast_dtype(device)
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in self.weights.items()}
        if isinstance(call.state, State):
            call.state.to(dtype)
        with torch.autocast(device, enabled=False):
            return self._mix(weights, call.to(dtype))

    def _mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        tokens = call.query.shape[-2]
        if not call.causal or tokens <= SLICE:
            return self.technique.mix(weights, call)
        if call.state is None:
            state = State(self.slots)
            state.update(call.key, call.value)  # as a model does before attention: the whole prompt
            call = replace(call, state=state)
        return torch.cat([self.technique.mix(weights, call.part(start, start + SLICE)) for start in range(0, tokens, SLICE)], 2)


def install(module: nn.Module, technique: Mixing, config: Config, index: int) -> None:
    """Put a mixer into an attention module."""
    setattr(module, OWN_NAME, Mixer(technique, config, index))
    module.register_forward_pre_hook(_pass_inputs, with_kwargs=True)


def _pass_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the cache, hidden states and RoPE angles, which attention modules keep to themselves, to our attention function."""
    cache = cache_among((*args, *kwargs.values()))
    state = None
    if cache is not None:
        state = cache.layers[module.effconvert.index] if module.effconvert.index < len(cache.layers) else None
        if not isinstance(state, State):
            raise ValueError(
                f"this cache has no room for the state of the mixer in layer {module.effconvert.index}; leave it out, "
                "or make one with effconvert.modeling.cache_for(model.config)"
            )
    return args, {**kwargs, "mixing": (state, *attention_inputs(args, kwargs))}


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, mixing: Any = None, **kwargs: Any) -> Any:
    """Attend by the module's mixer, or by softmax without one: an attention function for transformers' registry."""
    if latent.absorbs(module):
        if (out := latent.decode(module, query, key, value, attention_mask, **kwargs)) is not None:
            return out, None
        key, value = latent.expanded(module, key, value)
    key, value = unique_heads(module, query, key), unique_heads(module, query, value)
    if mixing is None:
        return softmax(module, query, key, value, attention_mask, **kwargs)
    state, hidden, angles = mixing
    if not module.effconvert.config.rotary_of(module.effconvert.index):
        angles = None  # transformers passes angles to layers without RoPE too
    causal, scaling = module.effconvert.config.decoder, kwargs.get("scaling")
    arranged = arrange(attention_mask, query, causal, state is None)
    query, key, value, hidden = map(arranged.rows, (query, key, value, hidden))
    if arranged.packing:
        angles = angles and tuple(map(arranged.packing.split, angles))
    rotation = None if angles is None else Rotation(rotary(module), angles, arranged.order)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    padded, kernels = attention_mask is not None, getattr(module, "kernels", "auto")
    call = Call(query, key, value, scaling, arranged.live, causal, state, hidden, rotation, kwargs.get("softcap"), padded, kernels=kernels)
    out = arranged.back(module.effconvert(call))
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def softmax(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """Attend as the family does without a mixer. Soft-capped scores need its eager implementation. A decoding step may run as a kernel."""
    if (out := decoded(module, query, key, value, attention_mask, **kwargs)) is not None:
        return out, None
    if kwargs.get("softcap") is None and getattr(module, "softmax", "sdpa") == "sdpa":
        if (out := by_groups(module, query, key, value, attention_mask, **kwargs)) is not None:
            return out, None
        kwargs["scaling"] = kwargs.get("scaling") or query.shape[-1] ** -0.5  # of the width before it is padded
        out, weights = sdpa(module, *of_one_width(query, key, value), attention_mask, **kwargs)
        return out[..., : value.shape[-1]], weights
    key, value = (rows.repeat_interleave(getattr(module, "repeats", 1), 1) for rows in (key, value))  # one for each query head, as the family expects
    tokens, known = query.shape[-2], key.shape[-2]
    if attention_mask is None and is_causal(module) and tokens > 1:
        attention_mask = torch.ones(tokens, known, dtype=torch.bool, device=query.device).tril(known - tokens)[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    return eager(module)(module, query, key, value, attention_mask, **kwargs)


def choose(model: Any, kernels: str) -> None:
    """Have a model on its device decode by kernels, or not: "auto", "triton" or "reference".

    But for "reference", latent attention decodes by its latents, and on a CPU query heads that share a KV head are rows of one product.
    "reference" gives a stock model the attention function back that it had.

    Args:
        model: of transformers, or of a class of ours. A stock model is given our attention function where a step differs from its own.
        kernels: what is asked for.

    Raises:
        ValueError: kernels are asked for, and cannot run here, or the model does not attend by an attention function.
    """
    if kernels == "reference" and (was := model.__dict__.pop(BEFORE, None)):
        model.set_attn_implementation(was)
    runs, before = runs_triton(model.device, OPERATION, kernels), implementation(model.config)
    modules = [module for module in model.modules() if is_causal(module)]
    family = model.config.get_text_config().model_type
    known = family in FAMILIES  # other classes may ask for the name of their attention function, as gemma4 does
    latents = [module for module in modules if known and latent.can_absorb(module) and kernels != "reference" and before in (NAME, *SOFTMAX)]
    grouped = known and wanted(kernels) != "reference" and model.device.type == "cpu" and before == "sdpa" and any(shared_by(module) > 1 for module in modules)
    for module in modules:
        module.kernels = kernels
        latent.absorb(module, NAME if module in latents else "")
    if not (runs or latents or grouped) or not model.can_generate() or before == NAME:
        return
    if not known:
        cannot(OPERATION, f"effconvert does not know the family {family}, whose class may need its own attention function", kernels)
        return
    if modules:
        model.set_attn_implementation(NAME)  # which some classes answer by a warning alone
    if implementation(model.config) != NAME:
        if runs or latents:
            cannot(OPERATION, f"{type(model).__name__} does not attend through transformers' AttentionInterface", kernels)
        return
    model.__dict__[BEFORE] = before
    for module in modules:
        module.softmax = before


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
