"""Gated FFN experts for few tokens: a decoding step of a mixture of experts.

Token t takes the experts e_tk with the weights w_tk:

    y_t  =  sum_k w_tk D_e (act(G_e x_t) * U_e x_t),  e = e_tk

with G_e and U_e one above the other in `gate_up`. An expert is read once, however many tokens take it, and not at all if none does: what
gathers a matrix for each choice (transformers' batched_mm) reads and writes it for each, and what sorts tokens by expert (grouped_mm) is for many of them.
One kernel computes the neurons of each expert for its tokens, a second one sums over experts. No gradient: decoding needs none.
"""
# T = tokens, K = experts that each of them takes, E = experts, M = hidden width, F = width of an expert.

import torch
import triton
from torch import Tensor

from effconvert.kernels._cost import Cost
from effconvert.kernels._experts import inner, outer, tiles
from effconvert.kernels._gated import ACTIVATIONS, EXPERTS, TOKENS
from effconvert.kernels._gated import experts_reference as experts_reference  # without triton, for machines that have none

MEASURED = ()  # cards on which it agreed with the reference and was faster
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def cost(tokens: int, taken: int, hidden: int, width: int, choices: int, itemsize: int = 2) -> Cost:
    """Return the bytes that a step reads and writes where its tokens take `taken` experts in all, and its FLOPs."""
    matrices = 3 * taken * hidden * width * itemsize
    rows = 2 * tokens * (hidden + taken * width) * itemsize  # inputs, outputs, and the neurons between the two kernels, written and read
    return Cost(matrices + rows, 6 * tokens * choices * hidden * width)


def experts(hidden: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
    """Return the outputs of few tokens, [T, M], by Triton kernels.

    Args:
        hidden: [T, M], at most 16 tokens.
        gate_up: [E, 2 F, M], at most 64 experts.
        down: [E, M, F].
        chosen: the experts of each token, [T, K], int32 or int64, from 0 to E - 1.
        weights: what each counts, [T, K], of any floating type.
        activation: one of ACTIVATIONS.

    Raises:
        ValueError: an argument has another shape, type, stride or device, or another range; the message names it.
    """
    _check(hidden, gate_up, down, chosen, weights, activation)
    result: Tensor = torch.ops.effconvert.experts(hidden, gate_up, down, chosen, weights, activation)
    return result


def uncovered(hidden: Tensor, gate_up: Tensor, down: Tensor, activation: str | None) -> str:
    """Return why no kernel computes experts of such types, sizes and strides; empty where one does."""
    if hidden.dtype not in TYPES:
        return f"hidden is {hidden.dtype}, and it should be float32, float16 or bfloat16"
    if len(hidden) > TOKENS:
        return f"hidden has {len(hidden)} tokens, and it should have at most {TOKENS}"
    if len(gate_up) > EXPERTS:
        return f"gate_up has {len(gate_up)} experts, and it should have at most {EXPERTS}"
    for name, tensor in (("hidden", hidden), ("gate_up", gate_up), ("down", down)):
        if tensor.dtype != hidden.dtype:
            return f"{name} is {tensor.dtype}, and hidden {hidden.dtype}; they should be the same"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} has a stride of {tensor.stride(-1)} in its last dimension, and it should be 1; give {name}.contiguous()"
    if activation not in ACTIVATIONS:
        return f"activation is {activation}, and it should be one of {', '.join(ACTIVATIONS)}"
    return ""


def _check(hidden: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor, activation: str) -> None:
    for name, tensor, sizes in (("hidden", hidden, 2), ("gate_up", gate_up, 3), ("down", down, 3), ("chosen", chosen, 2), ("weights", weights, 2)):
        if tensor.ndim != sizes:
            raise ValueError(f"{name} is {[*tensor.shape]}, and it should have {sizes} dimensions")
    if why := uncovered(hidden, gate_up, down, activation):
        raise ValueError(why)
    (tokens, width), (count, _, inner_width), choices = hidden.shape, down.shape, chosen.shape[1]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, gate_up, down, weights)):
        raise ValueError("hidden, gate_up, down or weights wants a gradient, and there is none; decode in torch.no_grad()")
    shapes = [("gate_up", gate_up, [count, 2 * inner_width, width]), ("down", down, [count, width, inner_width])]
    for name, tensor, shape in [*shapes, ("chosen", chosen, [tokens, choices]), ("weights", weights, [tokens, choices])]:
        if [*tensor.shape] != shape:
            raise ValueError(f"{name} is {[*tensor.shape]}, and it should be {shape}")
    if not choices:
        raise ValueError("chosen has no expert for a token")
    if chosen.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"chosen is {chosen.dtype}, and it should be int32 or int64")
    if not weights.is_floating_point():
        raise ValueError(f"weights is {weights.dtype}, and it should be of a floating type")
    for name, tensor in (("gate_up", gate_up), ("down", down), ("chosen", chosen), ("weights", weights)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, and hidden on {hidden.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has a stride of {tensor.stride(-1)} in its last dimension, and it should be 1; give {name}.contiguous()")


@torch.library.custom_op("effconvert::experts", mutates_args=())
def _operation(hidden: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor, activation: str) -> Tensor:
    """Run the kernels."""
    (tokens, width), (count, _, inner_width), choices = hidden.shape, down.shape, chosen.shape[1]
    out = torch.empty(tokens, width, dtype=hidden.dtype, device=hidden.device)
    if not out.numel():
        return out
    middle = torch.empty(count, tokens, inner_width, dtype=hidden.dtype, device=hidden.device)  # of experts that no token takes nothing is written
    taken, sizes = min(count, tokens * choices), {"M": width, "F": inner_width, "K": choices, "KP": triton.next_power_of_2(choices), "ROWS": TOKENS}
    first, second = tiles(inner_width, width, taken, hidden.itemsize), tiles(width, inner_width, 1, hidden.itemsize)
    with torch.cuda.device_of(hidden):  # where triton launches
        inner[(-(-inner_width // first.outputs), count)](
            hidden, gate_up, chosen, weights, middle, hidden.stride(0), *gate_up.stride()[:2], chosen.stride(0), weights.stride(0), tokens,
            **sizes, ACTIVATION=activation, OUTPUTS=first.outputs, INPUTS=first.inputs, num_warps=first.warps, num_stages=first.stages,
        )  # fmt: skip
        outer[(-(-width // second.outputs),)](
            middle, down, chosen, out, *down.stride()[:2], chosen.stride(0), tokens, count,
            **sizes, OUTPUTS=second.outputs, INPUTS=second.inputs, num_warps=second.warps, num_stages=second.stages,
        )  # fmt: skip
    return out


@_operation.register_fake
def _(hidden, *_):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape)
