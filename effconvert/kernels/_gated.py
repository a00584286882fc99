"""The reference of `experts`, which has the formula. Without triton: on a CPU it is the fastest way for one token, so models run it there."""
# T = tokens, K = experts that each of them takes, E = experts, M = hidden width, F = width of an expert.

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

TOKENS, EXPERTS = 16, 64  # at most, for the kernel: a tile has the fewest rows that tensor cores take, and a number has a bit for each expert
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, "gelu-tanh": partial(gelu, approximate="tanh"), "relu": relu}


def experts_reference(hidden: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
    """Return what `experts` does, in plain PyTorch, a token at a time: its specification."""
    return torch.cat([_one(*token, gate_up, down, activation) for token in zip(hidden.split(1), chosen.tolist(), weights, strict=True)])


def _one(row: Tensor, chosen: list[int], weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    gate, up = torch.cat([linear(row, gate_up[expert]) for expert in chosen]).chunk(2, -1)  # [K, F] each
    middle = (ACTIVATIONS[activation](gate) * up * weights[:, None]).to(row.dtype)  # [K, F]
    return sum(linear(rows, down[expert]) for rows, expert in zip(middle.split(1), chosen, strict=True))  # type: ignore[return-value]
