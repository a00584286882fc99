"""What the kernels for rows of logits are made of: normalisers, the terms of a divergence and its slope; and the gradient that they compute with a loss."""
# C = rows, V = the student's columns, p = log-probabilities of a teacher, q = those of a student, m = those of their mean.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effconvert.kernels._divergences import LOWEST as LEAST

LOWEST = tl.constexpr(LEAST)
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BLOCK, WARPS = 4096, 8  # columns at a time, and warps for them


@triton.jit
def logits(row, columns, count, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load some logits, as ACC before any arithmetic: bfloat16's is wrong in the interpreter. No probability is exp(LOWEST), for which no difference is NaN."""
    values = tl.load(row + columns, mask=columns < count, other=-float("inf")).to(ACC)
    return tl.where(values < LOWEST, LOWEST, values)


@triton.jit
def wider(largest, total, values):  # type: ignore[no-untyped-def]
    """Take more values into a running maximum and sum of exponentials."""
    new = tl.maximum(largest, tl.max(values, 0))
    return new, total * tl.exp(largest - new) + tl.sum(tl.exp(values - new), 0)


@triton.jit
def _apart(p, q):  # type: ignore[no-untyped-def]
    """Return the terms of KL of log-probabilities."""
    return tl.exp(p) * (p - q)


@triton.jit
def _middle(p, q):  # type: ignore[no-untyped-def]
    """Return log((exp p + exp q) / 2)."""
    high = tl.maximum(p, q)
    return high + tl.log((tl.exp(p - high) + tl.exp(q - high)) * 0.5)


@triton.jit
def terms(first, second, p, q, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add terms to KL(p || q) and KL(q || p), of which kl and reverse-kl are one; for jsd to KL(p || m) and KL(q || m), of which it is half the sum."""
    if KIND == 0:
        first += tl.sum(_apart(p, q), 0)
    if KIND == 1:
        second += tl.sum(_apart(q, p), 0)
    if KIND == 2:
        m = _middle(p, q)
        first += tl.sum(_apart(p, m), 0)
        second += tl.sum(_apart(q, m), 0)
    return first, second


@triton.jit
def slope(p, q, second, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the gradient of the divergence for logits that the temperature has divided."""
    result = tl.exp(q)
    if KIND == 0:
        result -= tl.exp(p)
    if KIND == 1:
        result = _apart(q, p) - result * second
    if KIND == 2:
        result = 0.5 * (_apart(q, _middle(p, q)) - result * second)
    return result


@triton.jit
def loss_ce(row, norm, label, ce, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the cross-entropy of a row of logits with a label; negative: none."""
    return tl.where(label >= 0, ce * (norm - tl.load(row + label, mask=label >= 0, other=0.0).to(ACC)), 0.0)


@triton.jit
def slope_ce(values, norm, columns, label, ce):  # type: ignore[no-untyped-def]
    """Return the gradient of the cross-entropy with a label; negative: none."""
    likely = tl.exp(values - norm) - tl.where(columns == label, 1.0, 0.0)
    return tl.where(label >= 0, ce * likely, 0.0)


def results(student: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Return room for losses [C], and for the gradient [C, V] or, where none is wanted, [0]."""
    precise = torch.float64 if student.dtype == torch.float64 else torch.float32
    return torch.empty(len(student), dtype=precise, device=student.device), torch.empty_like(student) if wanted else student.new_empty(0)


def register_gradient(operation: Any) -> None:
    """Let autograd know that an operation's second result is the gradient of its first, the losses [C], for its first argument."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.others = len(inputs) - 1

    @torch.autograd.function.once_differentiable
    def gradients(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[:, None]).to(gradient.dtype), *[None] * ctx.others

    operation.register_autograd(gradients, setup_context=keep)


def check_logits(student: Tensor, labels: Tensor, kind: str, kinds: tuple[str, ...], temperature: float) -> None:
    """Refuse what no kernel of rows takes.

    Raises:
        ValueError: the message names the argument.
    """
    if kind not in kinds:
        raise ValueError(f"kind is {kind!r}, and there are {', '.join(kinds)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, and it should be more than 0")
    if student.ndim != 2 or student.dtype not in TYPES:
        raise ValueError(f"student is {student.dtype} {[*student.shape]}, and it should be logits [C, V] of a floating type")
    if student.stride(1) != 1:
        raise ValueError(f"student has a stride of {student.stride(1)} between columns, and it should be 1; give student.contiguous()")
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels is {[*labels.shape]}, and it should be [{len(student)}]")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels is {labels.dtype}, and it should be torch.int64")
    if labels.device != student.device:
        raise ValueError(f"labels is on {labels.device}, and student on {student.device}")
