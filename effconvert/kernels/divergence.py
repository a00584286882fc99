"""How far a student's next-token distributions are from a teacher's, and the gradient for the student's logits, a row for each token.

With p = softmax(t / T) and q = softmax(s / T) over the first K columns, m = (p + q) / 2, and the label y of the row:

    kl          D = sum p (log p - log q)              dD/ds = (q - p) / T
    reverse-kl  D = sum q (log q - log p)              dD/ds = q (log q - log p - D) / T
    jsd         D = (KL(p || m) + KL(q || m)) / 2      dD/ds = q (log q - log m - KL(q || m)) / (2 T)

The loss of a row is w D - c log softmax(s)[y], without the second term where y is negative. Its gradient is one [C, V] tensor in the type of the logits,
computed with it: nothing of float32 and no log-softmax is stored. Reads both logits three times (twice for kl), from the L2 cache but for the first.
"""
# C = rows, V = the student's columns, U = the teacher's, K = the smaller of both: further columns are padding.

import torch
import triton
import triton.language as tl
from torch import Tensor

from effconvert.kernels._cost import Cost
from effconvert.kernels._divergences import divergence_reference
from effconvert.kernels._kinds import KINDS, Kind
from effconvert.kernels._rows import BLOCK, LOWEST, WARPS, check_logits, logits, loss_ce, register_gradient, results, slope, slope_ce, terms, wider

__all__ = ["cost", "divergence", "divergence_reference"]

MEASURED = ()  # cards on which it agreed with the reference and was faster


def cost(rows: int, columns: int, theirs: int, itemsize: int = 2, gradient: bool = True) -> Cost:
    """Return the bytes of both logits, labels, losses and the gradient, and the operations on each logit: five for its normaliser, four for the loss."""
    shared = min(columns, theirs)
    return Cost(rows * ((columns * (1 + gradient) + shared) * itemsize + 12), rows * (5 * (columns + shared) + 4 * shared))


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
    wanted = torch.is_grad_enabled() and student.requires_grad
    losses: Tensor = torch.ops.effconvert.divergence(student, teacher, labels, kind, temperature, weight, ce, wanted)[0]
    return losses


def _check(student: Tensor, teacher: Tensor, labels: Tensor, kind: str, temperature: float) -> None:
    check_logits(student, labels, kind, KINDS, temperature)
    if teacher.ndim != 2 or len(teacher) != len(student):
        raise ValueError(f"teacher is {[*teacher.shape]}, and it should be [{len(student)}, U]")
    if teacher.device != student.device:
        raise ValueError(f"teacher is on {teacher.device}, and student on {student.device}")
    if teacher.dtype != student.dtype:
        raise ValueError(f"teacher is {teacher.dtype}, and student {student.dtype}; they should be the same")
    if teacher.stride(1) != 1:
        raise ValueError(f"teacher has a stride of {teacher.stride(1)} between columns, and it should be 1; give teacher.contiguous()")


@torch.library.custom_op("effconvert::divergence", mutates_args=())
def _operation(
    student: Tensor, teacher: Tensor, labels: Tensor, kind: str, temperature: float, weight: float, ce: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel: a program for each row. Returns the losses [C], and the gradient [C, V] if it is wanted."""
    rows, columns = student.shape
    losses, gradient = results(student, wanted)
    with torch.cuda.device_of(student):  # where triton launches
        if rows:
            _rows[(rows,)](
                student, teacher, labels, losses, gradient, student.stride(0), teacher.stride(0), gradient.stride(0), columns, min(columns, teacher.shape[1]),
                1 / temperature, weight, ce, KIND=KINDS.index(kind), CE=ce != 0, GRADIENT=wanted, BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
                ACC=tl.float64 if losses.dtype == torch.float64 else tl.float32, num_warps=WARPS,
            )  # fmt: skip
    return losses, gradient


@_operation.register_fake
def _(student, teacher, labels, kind, temperature, weight, ce, wanted):  # type: ignore[no-untyped-def]
    return results(student, wanted)


register_gradient(_operation)


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
        s_top, s_sum = wider(s_top, s_sum, logits(student, columns, K, ACC) * sharpness)
        t_top, t_sum = wider(t_top, t_sum, logits(teacher, columns, K, ACC) * sharpness)
        if CE:
            z_top, z_sum = wider(z_top, z_sum, logits(student, columns, V, ACC))
    s_norm, t_norm = s_top + tl.log(s_sum), t_top + tl.log(t_sum)

    first, second = zero, zero
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        q = logits(student, columns, K, ACC) * sharpness - s_norm
        p = logits(teacher, columns, K, ACC) * sharpness - t_norm
        first, second = terms(first, second, p, q, KIND)
    loss = weight * (first + second) * (0.5 if KIND == 2 else 1.0)

    label = tl.load(labels + row)
    z_norm = zero
    if CE:
        z_norm = z_top + tl.log(z_sum)
        loss += loss_ce(student, z_norm, label, ce, ACC)
    tl.store(losses + row, loss)

    if GRADIENT:
        gradient += row * g_stride
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            q = logits(student, columns, K, ACC) * sharpness - s_norm
            p = logits(teacher, columns, K, ACC) * sharpness - t_norm
            rise = weight * sharpness * slope(p, q, second, KIND)
            if CE:
                rise += slope_ce(logits(student, columns, V, ACC), z_norm, columns, label, ce)
            tl.store(gradient + columns, rise.to(gradient.dtype.element_ty), mask=columns < V)
