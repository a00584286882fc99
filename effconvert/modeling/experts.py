"""Experts of a decoding step: by the kernel of `experts`, or on a CPU one after the other for one token; as transformers computes them otherwise."""
# T = tokens, K = experts that each of them takes, M = hidden width.

from typing import Any

import torch
from torch import Tensor

from effconvert.kernels._gated import experts_reference
from effconvert.kernels.choice import cannot, runs_triton, wanted
from effconvert.modeling.transformers_internals import ExpertsInterface, experts_by, experts_function, gated_by

NAME = "effconvert"  # of our function in transformers' registry
OPERATION = "experts"
TOKENS = 16  # at most, in a decoding step
BEFORE = "experts_before"  # attribute of a model that has our function: the names of its own, by config


def choose_experts(model: Any, kernels: str) -> None:
    """Have a model on its device compute the experts of decoding steps by kernels, or not: "auto", "triton" or "reference".

    On a CPU all but "reference" compute one token without the sorting and gathering that transformers needs for many: each expert is a view.

    Args:
        model: of transformers, or of a class of ours. It is given our function where steps differ from its own; "reference" gives its own back.
        kernels: what is asked for.

    Raises:
        ValueError: kernels are asked for, and cannot run here.
    """
    if kernels == "reference" and (was := model.__dict__.pop(BEFORE, None)):
        model.set_experts_implementation(was)
    modules = {module: name for module in model.modules() if (name := experts_by(module))}
    wants = runs_triton(model.device, OPERATION, kernels) or (wanted(kernels) != "reference" and model.device.type == "cpu")
    for module in modules:
        module.kernels = kernels
    if not modules or not wants or not all(name != NAME and experts_function(name) for name in modules.values()):
        return
    model.__dict__[BEFORE] = model.get_experts_implementation()
    for module, name in modules.items():
        module.experts_before, module.gated_by = name, gated_by(module)
    model.set_experts_implementation(NAME)


def compute(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the outputs of an experts module, [T, M]: a function for transformers' registry.

    Args:
        module: of a class of transformers.
        hidden: [T, M].
        chosen: ids of experts, [T, K].
        weights: what each counts, [T, K].
    """
    if len(hidden) <= TOKENS and not torch.is_grad_enabled() and (step := _step(module, hidden, chosen, weights)) is not None:
        return step
    function = experts_function(module.experts_before)
    assert function  # `choose_experts` leaves models without one alone
    return function(module, hidden, chosen, weights)


def _step(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor | None:
    activation = module.gated_by
    if runs_triton(hidden.device, OPERATION, module.kernels):
        from effconvert.kernels.experts import experts, uncovered  # imports triton

        if why := uncovered(hidden, activation):
            cannot(OPERATION, why, module.kernels)
            return None
        return experts(hidden, module.gate_up_proj, module.down_proj, chosen, weights, activation)
    if len(hidden) > 1 or activation is None or hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return experts_reference(hidden, module.gate_up_proj, module.down_proj, chosen, weights, activation)


ExpertsInterface.register(NAME, compute)
