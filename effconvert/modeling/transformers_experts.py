"""All names that effconvert uses of transformers' experts and routers beyond its public API, as in transformers_internals.py."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from effconvert.modeling.transformers_internals import check_has, untested

try:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
except ImportError as error:
    raise untested(str(error).partition(" (")[0]) from error

__all__ = ["ACT2FN", "ExpertsInterface"]
EXPERTS = "_experts_implementation"  # of a config: the name of the function that computes experts
CHOOSING = "_can_set_experts_implementation"  # of a class of models: whether it has the choice
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "relu": "relu"}  # to names of ours


def experts_by(module: nn.Module) -> str | None:
    """Return the name of the function by which a module computes experts, "eager" for that of its class; None for a module of another kind."""
    if not (hasattr(module, "gate_up_proj") and hasattr(module, "is_transposed")):
        return None
    check_has(module.config, EXPERTS)
    return getattr(module.config, EXPERTS)  # type: ignore[no-any-return]


def compute_experts_by(module: Any, name: str) -> None:
    """Set the function by which modules with this one's config compute experts."""
    setattr(module.config, EXPERTS, name)


def choose_experts_as(ours: Any, stock: Any) -> None:
    """Let a class of ours choose how experts are computed if `stock` may: transformers looks for that in the source of the class, and ours has none."""
    check_has(stock, CHOOSING)
    setattr(ours, CHOOSING, classmethod(lambda _: getattr(stock, CHOOSING)()))


def experts_function(name: str) -> Callable[..., Tensor] | None:
    """Return transformers' function of this name, of an experts module, hidden states, ids and weights; None for "eager"."""
    return ALL_EXPERTS_FUNCTIONS.get(name)  # type: ignore[no-any-return]


def gated_by(experts: Any) -> str | None:
    """Return the activation of an experts module, "silu", "gelu", "gelu-tanh" or "relu".

    None where it is another one, or where the experts are in another form than `down (activation(gate x) * up x)` with the matrices [gate; up] and down.
    """
    odd = any(getattr(experts, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel"))
    plain = type(experts)._apply_gate.__module__ == ExpertsInterface.__module__  # some classes clamp what they multiply
    if odd or not plain or not experts.has_gate or not experts.is_concatenated:
        return None
    return next((ours for theirs, ours in ACTIVATIONS.items() if type(ACT2FN[theirs]) is type(experts.act_fn)), None)


def routers(base: Any) -> dict[str, nn.Module]:
    """Return the modules of a base model whose logits it gives where `output_router_logits` is asked for, by their names."""
    check_has(base, "_can_record_outputs")
    if not (recorder := (base._can_record_outputs or {}).get("router_logits")):
        return {}
    kind = getattr(recorder, "target_class", recorder)
    return {name: module for name, module in base.named_modules() if isinstance(module, kind)}


def load_balancing_loss(logits: Tensor, chosen: int, counts: Tensor) -> Tensor:
    """Return transformers' load-balancing loss of the router logits [N, E] of a layer, of which `chosen` are taken; `counts` says for which tokens, [B, T]."""
    from transformers.models.mixtral import modeling_mixtral  # slow to import, and most conversions have no use for it

    check_has(modeling_mixtral, "load_balancing_loss_func")
    loss: Tensor = modeling_mixtral.load_balancing_loss_func((logits,), logits.shape[-1], chosen, counts.to(logits.dtype))
    return loss
