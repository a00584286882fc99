"""Experts of a decoding step: by the kernel of `experts`, or on a CPU one after the other for one token; as transformers computes them otherwise."""
# T = tokens, K = experts that each of them takes, M = hidden width.

from functools import partial
from typing import Any

import torch
from torch import Tensor

from effconvert.kernels._gated import EXPERTS, TOKENS, experts_reference
from effconvert.kernels.choice import cannot, runs_triton, wanted
from effconvert.modeling.transformers_experts import ExpertsInterface, compute_experts_by, experts_by, experts_function, gated_by

OURS = "effconvert+"  # begins the name of our function in transformers' registry; then comes that which a model had
OPERATION = "experts"


def choose_experts(model: Any, kernels: str) -> None:
    """Have a model on its device compute the experts of decoding steps by kernels, or not: "auto", "triton" or "reference".

    On a CPU all but "reference" compute one token without the sorting and gathering that transformers needs for many: each expert is a view.

    Args:
        model: of transformers, or of a class of ours. It is given our function where steps differ from its own; "reference" gives its own back.
        kernels: what is asked for.

    Raises:
        ValueError: kernels are asked for, and cannot run here or not for these experts.
    """
    runs = runs_triton(model.device, OPERATION, kernels)
    for module in model.modules():
        if not (name := experts_by(module)):
            continue
        module.kernels, module.gated_by, before = kernels, gated_by(module), name.removeprefix(OURS)
        compute_experts_by(module, before)
        if wanted(kernels) == "reference" or not (runs or model.device.type == "cpu"):
            continue
        if not (why := _obstacle(module, before, runs)):
            ExpertsInterface.register(OURS + before, partial(compute, before))
            compute_experts_by(module, OURS + before)
        elif runs:
            cannot(OPERATION, why, kernels)


def _obstacle(module: Any, before: str, runs: bool) -> str:
    """Return why we never compute the experts of a module."""
    if not experts_function(before):
        return f"its experts are computed by {before}"
    if not module.gated_by:
        return "its experts have biases, another layout, or another gate than silu, gelu or relu"
    return f"it has {len(module.gate_up_proj)} experts, and it should have at most {EXPERTS}" if runs and len(module.gate_up_proj) > EXPERTS else ""


def compute(before: str, module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the outputs of an experts module, [T, M]: a function for transformers' registry.

    Args:
        before: the name of transformers' function for all that is no step of ours.
        module: of a class of transformers.
        hidden: [T, M].
        chosen: ids of experts, [T, K].
        weights: what each counts, [T, K].
    """
    if len(hidden) <= TOKENS and not torch.is_grad_enabled() and (step := _step(module, hidden, chosen, weights)) is not None:
        return step
    function = experts_function(before)
    assert function  # else `choose_experts` would have left the model alone
    return function(module, hidden, chosen, weights)


def _step(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor | None:
    if not (activation := getattr(module, "gated_by", None)):  # of a model that was made from the config of another one
        return None
    given = hidden, module.gate_up_proj, module.down_proj
    if runs_triton(hidden.device, OPERATION, module.kernels):
        from effconvert.kernels.experts import experts, uncovered  # imports triton

        if not (why := uncovered(*given, activation)):
            return experts(*given, chosen, weights, activation)
        cannot(OPERATION, why, module.kernels)
        return None
    plain = hidden.device.type == "cpu" and hidden.dtype == module.gate_up_proj.dtype and not torch.is_autocast_enabled("cpu")
    if len(hidden) > 1 or not plain or torch.compiler.is_compiling():
        return None
    return experts_reference(*given, chosen, weights, activation)
