"""Least squares by conjugate gradients where the unknown sits inside attention.

Fitted to most of the windows; the number of steps is chosen on those held out, and if nothing predicts these better than what was there before,
that stays.
"""
# F = inputs of a projection, O = its outputs, T = tokens in a window, M = hidden width (one more with a bias), H = query heads, G = KV heads, D = head width.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effconvert.surgery._ridge import HELD_OUT, TINY
from effconvert.surgery._rope import apart, together

DAMPING = 1e-2  # of the preconditioner, likewise
STEPS, SETTLED = 10, 5e-3  # of conjugate gradients at most; the relative gain that is worth another one


@dataclass
class Attended:
    """One window inside attention. Keys and queries are those after RoPE."""

    read: Tensor  # what q, k and v read, [T, M]; ends in 1 where there is a bias
    weights: Tensor  # of attention, half precision, [H, T, T]
    query: Tensor  # the original's, [H, T, D]
    key: Tensor  # the original's, [Hk, T, D]
    wanted: Tensor  # what the original's attention gives, [T, M], without the bias of o


class Problem(ABC):
    """A linear least-squares problem over windows: the unknown is a matrix of weights [rows, M]."""

    def __init__(self, windows: Sequence[Attended], blocks: int) -> None:
        self.windows, self.blocks = windows, blocks
        self.second = sum_of([window.read.T @ window.read for window in self.fitted])

    @property
    def fitted(self) -> list[Attended]:
        """The windows to fit."""
        return [window for index, window in enumerate(self.windows) if (index + 1) % HELD_OUT]

    @property
    def held(self) -> list[Attended]:
        """The windows to choose on."""
        return [window for index, window in enumerate(self.windows) if not (index + 1) % HELD_OUT]

    @abstractmethod
    def slope(self, weights: Tensor, window: Attended, wanted: bool) -> tuple[Tensor, float]:
        """Return the gradient [rows, M] of half the squared error, and that; without `wanted` as if nothing were wanted, so that both are linear."""

    @abstractmethod
    def curvature(self) -> Tensor:
        """Return what the error grows by for each row, per token: a matrix for each block, [blocks, rows/blocks, rows/blocks]."""


def solve(problem: Problem, start: Tensor) -> Tensor:
    """Return the best weights on held-out windows that conjugate gradients pass on their way from `start` to the least-squares solution.

    Rows of different blocks do not touch: each block has steps of its own. The preconditioner is the Kronecker product of the inputs' second
    moments and the rows' curvature.
    """
    second = problem.second.double()
    damped = second + DAMPING * second.diagonal().mean().clamp_min(TINY) * torch.eye(len(second), dtype=second.dtype, device=second.device)
    inputs, rows = (torch.linalg.inv(matrix).to(start.dtype) for matrix in (damped, problem.curvature().double()))

    def easier(slope: Tensor) -> Tensor:
        eased: Tensor = (rows @ (slope @ inputs).unflatten(0, (problem.blocks, -1))).flatten(0, 1)
        return eased

    def inner(one: Tensor, other: Tensor) -> Tensor:
        total: Tensor = (one * other).unflatten(0, (problem.blocks, -1)).sum((1, 2))
        return total

    def spread(numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(len(start) // problem.blocks)[:, None]

    def error(weights: Tensor) -> float:
        return sum(problem.slope(weights, window, wanted=True)[1] for window in problem.held)

    weights = best = start
    least = before = error(start)
    slope = -sum_of([problem.slope(start, window, wanted=True)[0] for window in problem.fitted])
    direction = near = easier(slope)
    size = inner(slope, near)
    for _ in range(STEPS):
        bent = sum_of([problem.slope(direction, window, wanted=False)[0] for window in problem.fitted])
        step = size / inner(direction, bent).clamp_min(TINY)
        weights = weights + spread(step) * direction
        now = error(weights)
        if now < least:
            least, best = now, weights
        if now > (1 - SETTLED) * before:
            break
        before, slope = now, slope - spread(step) * bent
        near = easier(slope)
        size, old = inner(slope, near), size
        direction = near + spread(size / old.clamp_min(TINY)) * direction
    return best


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Add tensors."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


class Queries(Problem):
    """The queries whose scores, with keys that are given, are nearest to the original's, in the measure of its attention: to second order the KL divergence."""

    def __init__(self, windows: Sequence[Attended], keys: Sequence[Tensor], turn: "Turn", heads: int) -> None:
        self.turn, self.keys = turn, {id(window): key for window, key in zip(windows, keys, strict=True)}
        super().__init__(windows, heads)

    def slope(self, weights: Tensor, window: Attended, wanted: bool) -> tuple[Tensor, float]:
        """See `Problem`."""
        key = self._key(window)
        scores = self.turn(by_head(window.read @ weights.T, self.blocks)) @ key.mT  # [H, T, T]
        if wanted:
            scores -= window.query @ _shared(window.key, self.blocks).mT
        probability = window.weights.to(scores.dtype)
        pulled = probability * scores
        pulled -= probability * pulled.sum(-1, keepdim=True)  # a constant added to all scores of a token changes nothing
        back = self.turn(pulled @ key, back=True)
        error = float((pulled * scores).sum()) / 2 if wanted else 0.0
        return back.transpose(0, 1).flatten(1).T @ window.read, error

    def curvature(self) -> Tensor:
        """For each rotary pair, turned by every angle, the mean variance of its keys under attention."""
        total = torch.zeros(())
        for window in self.fitted[:: max(1, len(self.fitted) // 8)]:
            key, probability = self._key(window), window.weights.to(window.read.dtype)
            spread = probability @ key.square() - (probability @ key).square()  # [H, T, D]
            total = total.to(key.device) + self.turn.paired(spread).sum(1)
        return torch.diag_embed(total + 1e-3 * total.mean(-1, keepdim=True) + TINY)

    def _key(self, window: Attended) -> Tensor:
        return _shared(self.keys[id(window)], self.blocks)


class Values(Problem):
    """The values whose mixtures, through an output projection that is given, are nearest to what the original's attention gives."""

    def __init__(self, windows: Sequence[Attended], outputs: Tensor, heads: int, kv_heads: int) -> None:
        self.outputs, self.heads, self.kv_heads = outputs, heads, kv_heads
        super().__init__(windows, 1)

    def slope(self, weights: Tensor, window: Attended, wanted: bool) -> tuple[Tensor, float]:
        """See `Problem`."""
        mixed = mixtures(window, weights, self.heads, self.kv_heads)
        missing = mixed @ self.outputs.T
        if wanted:
            missing -= window.wanted
        pulled = by_head(missing @ self.outputs, self.heads)  # [H, T, D]
        back = (window.weights.to(pulled.dtype).mT @ pulled).unflatten(0, (self.kv_heads, -1)).sum(1)  # [G, T, D]
        return back.transpose(0, 1).flatten(1).T @ window.read, float(missing.square().sum()) / 2 if wanted else 0.0

    def curvature(self) -> Tensor:
        """What the output projection makes of each value."""
        by_kv = self.outputs.unflatten(1, (self.kv_heads, self.heads // self.kv_heads, -1))  # [M, G, R, D]
        grams = torch.einsum("mgrd,mgre->gde", by_kv, by_kv)
        means = grams.diagonal(dim1=1, dim2=2).mean(-1)
        means = means.clamp_min(1e-3 * means.mean()).clamp_min(TINY)  # of a head that no output reads it is zero
        damped = grams + DAMPING * means[:, None, None] * torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        blocks: Tensor = torch.block_diag(*damped)
        return blocks[None]


@dataclass
class Turn:
    """What happens to a head between its projection and the scores: at each position RoPE turns its pairs, [T, P] complex; with `rotary` 0 it is scaled."""

    angles: Tensor
    rotary: int
    layout: str
    width: int  # D
    scale: float = 1.0  # of a head that is not turned: OPT divides its queries by sqrt(D) itself

    def __call__(self, rows: Tensor, back: bool = False) -> Tensor:
        """Turn rows [..., T, D], or go back: the adjoint."""
        if not self.rotary:
            return rows * self.scale
        real, imaginary, still = apart(rows, self.rotary, self.layout)
        angles = self.angles[: rows.shape[-2]]
        cos, sin = angles.real, -angles.imag if back else angles.imag
        return together(real * cos - imaginary * sin, real * sin + imaginary * cos, still, self.layout)

    def paired(self, squares: Tensor) -> Tensor:
        """Give both of a pair the mean of the two."""
        if not self.rotary:
            return squares
        one, other, still = apart(squares, self.rotary, self.layout)
        return together((one + other) / 2, (one + other) / 2, still, self.layout)

    @classmethod
    def seen(cls, before: Tensor, after: Tensor, rotary: int, layout: str) -> "Turn | None":
        """Find the turn from queries [B, H, T, D] before and after it; None where it is no turn alone, but a norm as well."""
        width = before.shape[-1]
        turn = cls(torch.empty(0), rotary, layout, width)
        if rotary:
            one, other = (torch.complex(*apart(rows.double(), rotary, layout)[:2]) for rows in (before, after))
            energy = one.abs().square().sum((0, 1))  # [T, P]
            turn.angles = ((other * one.conj()).sum((0, 1)) / energy.clamp_min(TINY)).to(torch.promote_types(before.dtype, torch.complex64))
        else:
            turn.scale = float((before * after).sum() / before.square().sum().clamp_min(TINY))
        off = torch.linalg.vector_norm(turn(before) - after) / torch.linalg.vector_norm(after).clamp_min(TINY)
        return turn if off < 1e-3 else None


def mixtures(window: Attended, values: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return what the output projection reads, [T, H*D], with value weights [G*D, M]."""
    value = _shared(by_head(window.read @ values.T, kv_heads), heads)
    return (window.weights.to(value.dtype) @ value).transpose(0, 1).flatten(1)


def by_head(rows: Tensor, heads: int) -> Tensor:
    """Take rows [T, H*D] apart: [H, T, D]."""
    apart: Tensor = rows.unflatten(-1, (heads, -1)).transpose(-3, -2)
    return apart


def _shared(rows: Tensor, heads: int) -> Tensor:
    """Repeat KV heads [G, T, D] for the query heads that share each."""
    return rows.repeat_interleave(heads // len(rows), 0)
