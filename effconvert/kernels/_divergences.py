"""The loss of distillation in plain PyTorch, a number for each token: what its kernels are held to, and what runs where they do not."""
# C = rows, V = the student's columns, U = the teacher's: those beyond the smaller of both are padding. K = ids known of a row.

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from effconvert.kernels._kinds import Kind, SparseKind

LOWEST = -1e30  # what stands for minus infinity: no difference to it is NaN


def divergence_reference(
    student: Tensor, teacher: Tensor, labels: Tensor, kind: Kind = "kl", temperature: float = 1.0, weight: float = 1.0, ce: float = 0.0
) -> Tensor:
    """Return what `divergence` does, [C], in plain PyTorch: its specification, with a gradient by autograd for both logits."""
    student = student.to(_precise(student))
    shared = min(student.shape[1], teacher.shape[1])
    loss = student.new_zeros(len(student))
    if weight:
        q = _at_temperature(student[:, :shared], temperature).log_softmax(-1)
        p = _at_temperature(teacher[:, :shared].to(student.dtype), temperature).clamp_min(LOWEST).log_softmax(-1)
        loss = weight * _apart(p, q, kind)
    return _with_ce(loss, student, labels, ce)


def sparse_divergence_reference(
    student: Tensor, ids: Tensor, numbers: Tensor, labels: Tensor, kind: SparseKind = "kl", vocabulary: int | None = None, temperature: float = 1.0,
    weight: float = 1.0, ce: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return what `sparse_divergence` does, [C], in plain PyTorch: its specification, with a gradient by autograd."""
    student = student.to(_precise(student))
    loss = student.new_zeros(len(student))
    if weight:
        q = _at_temperature(student[:, :vocabulary], temperature).log_softmax(-1)
        if kind == "samples":
            loss = -weight * (numbers * q.gather(-1, ids)).sum(-1)
        else:
            loss = weight * _apart(numbers.to(q.dtype).clamp_min(LOWEST).log_softmax(-1), outcomes(q, ids), kind)
    return _with_ce(loss, student, labels, ce)


def outcomes(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of some ids and of all others together, the tail: [C, K + 1], or [C, V] where all ids are among them."""
    known = log_probs.gather(-1, ids)
    if ids.shape[-1] == log_probs.shape[-1]:
        return known
    # The others are summed themselves: 1 - sum(known) would cancel, and has neither value nor gradient where the known ones round to 1.
    tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([known, tail], -1)


def _precise(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _at_temperature(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature  # a division by 1 would still be a pass over all of them


def _apart(p: Tensor, q: Tensor, kind: Kind) -> Tensor:
    """Return the divergence of log-probabilities in each row: a teacher's p, a student's q."""
    if kind == "kl":
        return _kl(p, q)
    if kind == "reverse-kl":
        return _kl(q, p)
    m = torch.logaddexp(p, q) - math.log(2)
    return (_kl(p, m) + _kl(q, m)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q)."""
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _with_ce(loss: Tensor, student: Tensor, labels: Tensor, ce: float) -> Tensor:
    """Add the cross-entropy with labels [C]; those that are negative add nothing."""
    return loss + ce * cross_entropy(student, labels.clamp_min(-1), reduction="none", ignore_index=-1) if ce else loss
