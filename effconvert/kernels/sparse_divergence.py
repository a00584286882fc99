"""How far a student's next-token distributions are from what was kept of a teacher's: samples, or the likeliest ids and a tail.

With q = softmax(s / T) over the first U columns, and for each row K ids i with a number n each:

    samples     D = - sum n log q_i                           dD/ds = (sum(n) q - n) / T, n being 0 for all other ids
    kl, reverse-kl, jsd                                       as in `divergence`, of K + 1 outcomes: the ids, and all others together (the tail)

In the latter n are log-probabilities, that of the tail behind them, and are normalised. With q' that of the tail, their gradient is that of the divergence
from a teacher that spreads its tail as the student does: log p = n_tail + log q - log q' for an id that was not kept. So one pass over the columns writes
the gradient as if no id had been kept, and the K ids are written over it. The student's tail is summed without the kept ids, by a mask of a byte for each
column: one less their sum would cancel. The loss of a row is w D - c log softmax(s)[y], without the second term where the label y is negative.
"""
# C = rows, V = the student's columns, U = those of the vocabulary: further columns are padding. K = ids of a row.

import torch
import triton
import triton.language as tl
from torch import Tensor

from effconvert.kernels._cost import Cost
from effconvert.kernels._divergences import sparse_divergence_reference
from effconvert.kernels._kinds import SPARSE_KINDS, SparseKind
from effconvert.kernels._rows import BLOCK, LOWEST, WARPS, check_logits, logits, loss_ce, register_gradient, results, slope, slope_ce, terms, wider

__all__ = ["cost", "sparse_divergence", "sparse_divergence_reference"]

MEASURED = ()  # cards on which it agreed with the reference and was faster
SIZE = 1024  # the most ids at a time


def cost(rows: int, columns: int, ids: int, tail: bool, itemsize: int = 2, gradient: bool = True) -> Cost:
    """Return the bytes of logits, ids, numbers, labels, losses and gradient, and with a tail of a mask that is written and read; and operations.

    Five on each logit for its normaliser, and two for the loss; ten for each id.
    """
    moved = columns * ((1 + gradient) * itemsize + 2 * tail) + ids * (8 + 4) + 4 * tail + 12
    return Cost(rows * moved, rows * (7 * columns + 10 * ids))


def sparse_divergence(
    student: Tensor, ids: Tensor, numbers: Tensor, labels: Tensor, kind: SparseKind = "kl", vocabulary: int | None = None, temperature: float = 1.0,
    weight: float = 1.0, ce: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return the loss of each row, [C], in float32 (float64 for float64), by a Triton kernel.

    The gradient is computed with it, for the student's logits alone; of the gradient there is no gradient.

    Args:
        student: logits, [C, V].
        ids: what was kept of each distribution, [C, K], int64, less than U; none comes twice but with a number of 0 among samples.
        numbers: of samples how often each came, [C, K], of which 1 is always; otherwise log-probabilities at the temperature, [C, K + 1] with that of all
            other ids at the end, or [C, K] where K is U.
        labels: the token that each row predicts, [C], int64; negative: no cross-entropy.
        kind: one of SPARSE_KINDS.
        vocabulary: U; None: V.
        temperature: by which the student's logits are divided for the divergence.
        weight: w, of the divergence.
        ce: c, of the cross-entropy.

    Raises:
        ValueError: an argument has another shape, type or device; the message names it.
    """
    vocabulary = student.shape[-1] if vocabulary is None else vocabulary
    _check(student, ids, numbers, labels, kind, vocabulary, temperature)
    wanted = torch.is_grad_enabled() and student.requires_grad
    losses: Tensor = torch.ops.effconvert.sparse_divergence(student, ids, numbers, labels, kind, vocabulary, temperature, weight, ce, wanted)[0]
    return losses


def _check(student: Tensor, ids: Tensor, numbers: Tensor, labels: Tensor, kind: str, vocabulary: int, temperature: float) -> None:
    check_logits(student, labels, kind, SPARSE_KINDS, temperature)
    if not 1 <= vocabulary <= student.shape[1]:
        raise ValueError(f"vocabulary is {vocabulary}, and it should be from 1 to the student's {student.shape[1]} columns")
    if ids.ndim != 2 or len(ids) != len(student) or not 1 <= ids.shape[1] <= vocabulary:
        raise ValueError(f"ids is {[*ids.shape]}, and it should be [{len(student)}, K] with K from 1 to {vocabulary}")
    if ids.dtype != torch.int64:
        raise ValueError(f"ids is {ids.dtype}, and it should be torch.int64")
    count = ids.shape[1] + (kind != "samples" and ids.shape[1] < vocabulary)
    if [*numbers.shape] != [len(student), count]:
        raise ValueError(f"numbers is {[*numbers.shape]}, and it should be [{len(student)}, {count}]")
    if numbers.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"numbers is {numbers.dtype}, and it should be torch.float32 or torch.float64")
    for name, tensor in (("ids", ids), ("numbers", numbers)):
        if tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device}, and student on {student.device}")


@torch.library.custom_op("effconvert::sparse_divergence", mutates_args=())
def _operation(
    student: Tensor, ids: Tensor, numbers: Tensor, labels: Tensor, kind: str, vocabulary: int, temperature: float, weight: float, ce: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel: a program for each row. Returns the losses [C], and the gradient [C, V] if it is wanted."""
    rows, columns = student.shape
    losses, gradient = results(student, wanted)
    kept = ids if kind == "samples" else torch.zeros(rows, vocabulary, dtype=torch.uint8, device=student.device).scatter_(1, ids, 1)
    with torch.cuda.device_of(student):  # where triton launches
        if rows:
            _sparse_rows[(rows,)](
                student, ids.contiguous(), numbers.contiguous(), kept, labels, losses, gradient, student.stride(0), gradient.stride(0),
                columns, vocabulary, ids.shape[1], 1 / temperature, weight, ce,
                KIND=SPARSE_KINDS.index(kind), TAIL=numbers.shape[1] - ids.shape[1], CE=ce != 0, GRADIENT=wanted,
                SIZE=min(SIZE, triton.next_power_of_2(numbers.shape[1])), BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
                ACC=tl.float64 if losses.dtype == torch.float64 else tl.float32, num_warps=WARPS,
            )  # fmt: skip
    return losses, gradient


@_operation.register_fake
def _(student, ids, numbers, labels, kind, vocabulary, temperature, weight, ce, wanted):  # type: ignore[no-untyped-def]
    return results(student, wanted)


register_gradient(_operation)


@triton.jit
def _outcomes(student, ids, numbers, at, K, U, rest, sharpness, TAIL: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load some outcomes: their ids, the student's scaled logits, of the tail the log of the sum of its exponentials, and the teacher's numbers."""
    which = tl.load(ids + at, mask=at < K, other=U)
    own = logits(student, which, U, ACC) * sharpness
    if TAIL:
        own = tl.where(at == K, rest, own)
    return which, own, logits(numbers, at, K + TAIL, ACC)


@triton.jit
def _write_gradient(  # type: ignore[no-untyped-def]
    student, ids, numbers, gradient, V, U, K, rest, p_norm, q_norm, z_norm, second, mass, label, sharpness, weight, ce,
    KIND: tl.constexpr, TAIL: tl.constexpr, CE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row as if no id had been kept, and then those of the ids over it."""
    tail = tl.maximum(tl.load(numbers + K, mask=TAIL > 0, other=LOWEST).to(ACC), LOWEST) - p_norm
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        q = logits(student, columns, U, ACC) * sharpness - q_norm
        rise = mass * tl.exp(q)
        if KIND < 3:  # the teacher spreads its tail as the student does
            rise = slope(tail + (q - (rest - q_norm)), q, second, KIND)
        rise = weight * sharpness * rise
        if CE:
            rise += slope_ce(logits(student, columns, V, ACC), z_norm, columns, label, ce)
        tl.store(gradient + columns, rise.to(gradient.dtype.element_ty), mask=columns < V)
    tl.debug_barrier()  # other threads' numbers are written over
    for start in range(0, K, SIZE):
        at = start + tl.arange(0, SIZE)
        which, own, known = _outcomes(student, ids, numbers, at, K, U, rest, sharpness, TAIL, ACC)
        written = at < K
        if KIND < 3:
            rise = slope(known - p_norm, own - q_norm, second, KIND)
        else:
            written &= known > 0
            rise = mass * tl.exp(own - q_norm) - tl.where(written, known, 0.0)
        rise = weight * sharpness * rise
        if CE:
            rise += slope_ce(logits(student, which, V, ACC), z_norm, which, label, ce)
        tl.store(gradient + which, rise.to(gradient.dtype.element_ty), mask=written)


@triton.jit
def _sparse_rows(  # type: ignore[no-untyped-def]
    student, ids, numbers, kept, labels, losses, gradient, s_stride, g_stride, V, U, K, sharpness, weight, ce,
    KIND: tl.constexpr, TAIL: tl.constexpr, CE: tl.constexpr, GRADIENT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * s_stride
    ids += row * K
    numbers += row * (K + TAIL)
    kept += row * U
    zero = tl.sum(tl.zeros((1,), ACC), 0)
    q_top, p_top, z_top = zero + LOWEST, zero + LOWEST, zero + LOWEST
    q_sum, p_sum, z_sum = zero, zero, zero
    for start in range(0, V, BLOCK):  # the normaliser of all columns, or of those that were not kept
        columns = start + tl.arange(0, BLOCK)
        values = logits(student, columns, U, ACC) * sharpness
        if KIND < 3:
            values = tl.where(tl.load(kept + columns, mask=columns < U, other=1) > 0, LOWEST, values)
        q_top, q_sum = wider(q_top, q_sum, values)
        if CE:
            z_top, z_sum = wider(z_top, z_sum, logits(student, columns, V, ACC))
    rest = q_top + tl.log(q_sum)

    first, second, mass = zero, zero, zero
    p_norm, q_norm = zero, rest
    if KIND < 3:
        q_top, q_sum = zero + LOWEST, zero
        for start in range(0, K + TAIL, SIZE):  # the normalisers of the outcomes
            _, own, known = _outcomes(student, ids, numbers, start + tl.arange(0, SIZE), K, U, rest, sharpness, TAIL, ACC)
            q_top, q_sum = wider(q_top, q_sum, own)
            p_top, p_sum = wider(p_top, p_sum, known)
        q_norm, p_norm = q_top + tl.log(q_sum), p_top + tl.log(p_sum)
    for start in range(0, K + TAIL, SIZE):
        at = start + tl.arange(0, SIZE)
        _, own, known = _outcomes(student, ids, numbers, at, K, U, rest, sharpness, TAIL, ACC)
        if KIND < 3:
            first, second = terms(first, second, known - p_norm, own - q_norm, KIND)
        else:
            weights = tl.where(at < K, known, 0.0)
            mass += tl.sum(weights, 0)
            first += tl.sum(tl.where(weights > 0, weights * (q_norm - own), 0.0), 0)
    loss = weight * (first + second) * (0.5 if KIND == 2 else 1.0)

    label = tl.load(labels + row)
    z_norm = zero
    if CE:
        z_norm = z_top + tl.log(z_sum)
        loss += loss_ce(student, z_norm, label, ce, ACC)
    tl.store(losses + row, loss)

    if GRADIENT:
        _write_gradient(
            student, ids, numbers, gradient + row * g_stride, V, U, K, rest, p_norm, q_norm, z_norm, second, mass, label, sharpness, weight, ce,
            KIND, TAIL, CE, SIZE, BLOCK, ACC,
        )  # fmt: skip
