"""How far a student's next-token distributions are from a teacher's, and the gradient for the student's logits, a row for each token.

With p = softmax(t / T) and q = softmax(s / T) over the first K columns, m = (p + q) / 2, and the label y of the row:

    kl          D = sum p (log p - log q)              dD/ds = (q - p) / T
    reverse-kl  D = sum q (log q - log p)              dD/ds = q (log q - log p - D) / T
    jsd         D = (KL(p || m) + KL(q || m)) / 2      dD/ds = q (log q - log m - KL(q || m)) / (2 T)

The loss of a row is w D - c log softmax(s)[y], without the second term where y is negative. Its gradient is one [C, V] tensor in the type of the logits,
computed with it: nothing of float32 and no log-softmax is stored. Reads both logits three times (twice for kl), from the L2 cache but for the first.
"""
# C = rows, V = the student's columns, U = the teacher's, K = the smaller of both: further columns are padding.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effconvert.kernels._divergences import divergence_reference
from effconvert.kernels._kinds import KINDS, Kind

__all__ = ["divergence", "divergence_reference"]

MEASURED = ()  # cards on which it agreed with the reference and was faster
BLOCK, WARPS = 4096, 8  # columns at a time, and warps for them
LOWEST = tl.constexpr(-1e30)  # what stands for minus infinity
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, kind: Kind = "kl", temperature: float = 1.0, weight: float = 1.0, ce: float = 0.0) -> Tensor:
    """Return the loss of each row, [C], in float32 (float64 for float64), by a Triton kernel.

    The gradient is computed with it, for the student's logits alone; of the gradient there is no gradient.

    Args:
        student: logits, [C, V].
        teacher: logits, [C, U], of the same type; columns beyond the smaller of V and U take no part in the divergence.
        labels: the token that each row predicts, [C], int64; negative: no cross-entropy.
        kind: one of KINDS.
        temperature: by which both logits are divided for the divergence.
        weight: w, of the divergence.
        ce: c, of the cross-entropy.

    Raises:
        ValueError: an argument has another shape, type or device; the message names it.
    """
    _check(student, teacher, labels, kind, temperature)
    losses: Tensor = _Divergence.apply(student, teacher, labels, kind, temperature, weight, ce)  # type: ignore[no-untyped-call]
    return losses


def _check(student: Tensor, teacher: Tensor, labels: Tensor, kind: Kind, temperature: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, and there are {', '.join(KINDS)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, and it should be more than 0")
    if student.ndim != 2 or student.dtype not in TYPES:
        raise ValueError(f"student is {student.dtype} {[*student.shape]}, and it should be logits [C, V] of a floating type")
    for name, tensor, shape in (("teacher", teacher, (len(student), "U")), ("labels", labels, (len(student),))):
        if tensor.ndim != len(shape) or len(tensor) != len(student):
            raise ValueError(f"{name} is {[*tensor.shape]}, and it should be [{', '.join(map(str, shape))}]")
        if tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device}, and student on {student.device}")
    if teacher.dtype != student.dtype:
        raise ValueError(f"teacher is {teacher.dtype}, and student {student.dtype}; they should be the same")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels is {labels.dtype}, and it should be torch.int64")
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.stride(1) != 1:
            raise ValueError(f"{name} has a stride of {tensor.stride(1)} between columns, and it should be 1; give {name}.contiguous()")


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, kind: Kind, temperature: float, weight: float, ce: float) -> Tensor:
        losses, gradient = launch(student, teacher, labels, kind, temperature, weight, ce, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[:, None]).to(gradient.dtype), *[None] * 6


def launch(
    student: Tensor, teacher: Tensor, labels: Tensor, kind: Kind, temperature: float, weight: float, ce: float, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel: a program for each row. Returns the losses [C] and, if wanted, the gradient [C, V]."""
    rows, columns = student.shape
    precise = torch.float64 if student.dtype == torch.float64 else torch.float32
    losses, gradient = torch.empty(rows, dtype=precise, device=student.device), torch.empty_like(student) if wanted else None
    if rows:
        block = min(BLOCK, triton.next_power_of_2(columns))
        place = student if gradient is None else gradient  # which is not written where no gradient is wanted
        _rows[(rows,)](
            student, teacher, labels, losses, place, student.stride(0), teacher.stride(0), place.stride(0), columns, min(columns, teacher.shape[1]),
            1 / temperature, weight, ce, KIND=KINDS.index(kind), CE=ce != 0, GRADIENT=wanted, BLOCK=block,
            ACC=tl.float64 if precise == torch.float64 else tl.float32, num_warps=WARPS,
        )  # fmt: skip
    return losses, gradient


@triton.jit
def _logits(row, columns, count, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load some logits, as ACC before any arithmetic: bfloat16's is wrong in the interpreter. No probability is exp(LOWEST), for which no difference is NaN."""
    values = tl.load(row + columns, mask=columns < count, other=-float("inf")).to(ACC)
    return tl.where(values < LOWEST, LOWEST, values)


@triton.jit
def _wider(largest, total, values):  # type: ignore[no-untyped-def]
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
def _rows(  # type: ignore[no-untyped-def]
    student, teacher, labels, losses, gradient, s_stride, t_stride, g_stride, V, K, sharpness, weight, ce,
    KIND: tl.constexpr, CE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * s_stride
    teacher += row * t_stride
    zero = tl.sum(tl.zeros((1,), ACC), 0)
    s_top, t_top, z_top = zero + LOWEST, zero + LOWEST, zero + LOWEST
    s_sum, t_sum, z_sum = zero, zero, zero
    for start in range(0, V, BLOCK):  # the normalisers
        columns = start + tl.arange(0, BLOCK)
        s_top, s_sum = _wider(s_top, s_sum, _logits(student, columns, K, ACC) * sharpness)
        t_top, t_sum = _wider(t_top, t_sum, _logits(teacher, columns, K, ACC) * sharpness)
        if CE:
            z_top, z_sum = _wider(z_top, z_sum, _logits(student, columns, V, ACC))
    s_norm, t_norm = s_top + tl.log(s_sum), t_top + tl.log(t_sum)

    first, second = zero, zero  # KL(p || q), KL(q || p), or KL(p || m) and KL(q || m)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        q = _logits(student, columns, K, ACC) * sharpness - s_norm
        p = _logits(teacher, columns, K, ACC) * sharpness - t_norm
        if KIND == 0:
            first += tl.sum(_apart(p, q), 0)
        if KIND == 1:
            second += tl.sum(_apart(q, p), 0)
        if KIND == 2:
            m = _middle(p, q)
            first += tl.sum(_apart(p, m), 0)
            second += tl.sum(_apart(q, m), 0)
    loss = weight * (first + second) * (0.5 if KIND == 2 else 1.0)

    label = tl.load(labels + row)
    counts = (label >= 0) & CE
    z_norm = zero
    if CE:
        z_norm = z_top + tl.log(z_sum)
        own = tl.load(student + label, mask=counts, other=0.0).to(ACC)
        loss += tl.where(counts, ce * (z_norm - own), 0.0)
    tl.store(losses + row, loss)

    if GRADIENT:
        gradient += row * g_stride
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            q = _logits(student, columns, K, ACC) * sharpness - s_norm
            p = _logits(teacher, columns, K, ACC) * sharpness - t_norm
            if KIND == 0:
                slope = tl.exp(q) - tl.exp(p)
            if KIND == 1:
                slope = _apart(q, p) - tl.exp(q) * second
            if KIND == 2:
                slope = 0.5 * (_apart(q, _middle(p, q)) - tl.exp(q) * second)
            slope = weight * sharpness * slope
            if CE:
                likely = tl.exp(_logits(student, columns, V, ACC) - z_norm)
                slope += tl.where(counts, ce * (likely - tl.where(columns == label, 1.0, 0.0)), 0.0)
            tl.store(gradient + columns, slope.to(gradient.dtype.element_ty), mask=columns < V)
