"""Least squares by conjugate gradients, for weights inside attention.

Most windows are fitted; held-out ones choose the number of steps. If no step improves on them, the weights stay as they are.
"""
# F = inputs of a projection, O = its outputs, T = tokens in a window, M = hidden width (one more with a bias), H = query heads, G = KV heads, D = head width.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effconvert.surgery._ridge import HELD_OUT, TINY
from effconvert.surgery._rope import join_pairs, split_pairs

DAMPING = 1e-2  # of the preconditioner, in means of the diagonal
STEPS, SETTLED = 10, 5e-3  # most steps of conjugate gradients; the relative gain that is worth another one


@dataclass
class AttentionWindow:
    """One window inside attention. Keys and queries are those after RoPE."""

    inputs: Tensor  # of q, k and v, [T, M]; ends in 1 where there is a bias
    weights: Tensor  # of attention, half precision, [H, T, T]
    query: Tensor  # the original's, [H, T, D]
    key: Tensor  # the original's, [Hk, T, D]
    target: Tensor  # output of the original's attention, [T, M], without the bias of o


class Problem(ABC):
    """A linear least-squares problem over windows: the unknown is a matrix of weights [rows, M]."""

    def __init__(self, windows: Sequence[AttentionWindow], blocks: int) -> None:
        self.windows, self.blocks = windows, blocks
        self.second_moment = sum_of([window.inputs.T @ window.inputs for window in self.fit_windows])

    @property
    def fit_windows(self) -> list[AttentionWindow]:
        """The windows to fit."""
        return [window for index, window in enumerate(self.windows) if (index + 1) % HELD_OUT]

    @property
    def held_out(self) -> list[AttentionWindow]:
        """The windows that choose the number of steps."""
        return [window for index, window in enumerate(self.windows) if not (index + 1) % HELD_OUT]

    @abstractmethod
    def gradient(self, weights: Tensor, window: AttentionWindow, with_target: bool) -> tuple[Tensor, float]:
        """Return the gradient [rows, M] of half the squared error, and that error; without the target the gradient is linear in `weights` and the error 0."""

    @abstractmethod
    def curvature(self) -> Tensor:
        """Return the error's curvature in each row, per token: a matrix for each block, [blocks, rows/blocks, rows/blocks]."""


def solve(problem: Problem, start: Tensor) -> Tensor:
    """Run conjugate gradients from `start` towards the least-squares solution, and return the step that is best on held-out windows.

    Blocks are independent, so each has step sizes of its own. The preconditioner is the Kronecker product of the inputs' second moments and the
    rows' curvature.
    """
    moment = problem.second_moment.double()
    damped = moment + DAMPING * moment.diagonal().mean().clamp_min(TINY) * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    inputs, rows = (torch.linalg.inv(matrix).to(start.dtype) for matrix in (damped, problem.curvature().double()))

    def precondition(gradient: Tensor) -> Tensor:
        product: Tensor = (rows @ (gradient @ inputs).unflatten(0, (problem.blocks, -1))).flatten(0, 1)
        return product

    def inner(left: Tensor, right: Tensor) -> Tensor:
        total: Tensor = (left * right).unflatten(0, (problem.blocks, -1)).sum((1, 2))
        return total

    def by_row(numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(len(start) // problem.blocks)[:, None]

    def error(weights: Tensor) -> float:
        return sum(problem.gradient(weights, window, with_target=True)[1] for window in problem.held_out)

    weights = best = start
    least = before = error(start)
    residual = -sum_of([problem.gradient(start, window, with_target=True)[0] for window in problem.fit_windows])
    direction = conditioned = precondition(residual)
    size = inner(residual, conditioned)
    for _ in range(STEPS):
        hessian_product = sum_of([problem.gradient(direction, window, with_target=False)[0] for window in problem.fit_windows])
        step = size / inner(direction, hessian_product).clamp_min(TINY)
        weights = weights + by_row(step) * direction
        now = error(weights)
        if now < least:
            least, best = now, weights
        if now > (1 - SETTLED) * before:
            break
        before, residual = now, residual - by_row(step) * hessian_product
        conditioned = precondition(residual)
        size, old = inner(residual, conditioned), size
        direction = conditioned + by_row(size / old.clamp_min(TINY)) * direction
    return best


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Add tensors."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


class Queries(Problem):
    """Fit queries, with the keys fixed, to the original's scores, weighted by its attention: to second order the KL divergence."""

    def __init__(self, windows: Sequence[AttentionWindow], keys: Sequence[Tensor], rotation: "Rotation", heads: int) -> None:
        self.rotation, self.keys = rotation, {id(window): key for window, key in zip(windows, keys, strict=True)}
        super().__init__(windows, heads)

    def gradient(self, weights: Tensor, window: AttentionWindow, with_target: bool) -> tuple[Tensor, float]:
        """See `Problem`."""
        key = self._key(window)
        score_gradient, error = _score_gradient(self.rotation(by_head(window.inputs @ weights.T, self.blocks)), key, window, with_target)
        query_gradient = self.rotation(score_gradient @ key, back=True)
        return query_gradient.transpose(0, 1).flatten(1).T @ window.inputs, error

    def curvature(self) -> Tensor:
        """For each rotary pair, over all angles, the mean variance of its keys under attention."""
        total = torch.zeros(())
        for window in self.fit_windows[:: max(1, len(self.fit_windows) // 8)]:
            key, probability = self._key(window), window.weights.to(window.inputs.dtype)
            variance = probability @ key.square() - (probability @ key).square()  # [H, T, D]
            total = total.to(key.device) + self.rotation.pair_means(variance).sum(1)
        return torch.diag_embed(total + 1e-3 * total.mean(-1, keepdim=True) + TINY)

    def _key(self, window: AttentionWindow) -> Tensor:
        return _repeat_heads(self.keys[id(window)], self.blocks)


class Keys(Problem):
    """Fit keys, with the queries fixed, to the same scores; each query head has a KV head of its own."""

    def __init__(self, windows: Sequence[AttentionWindow], queries: Sequence[Tensor], rotation: "Rotation", heads: int) -> None:
        self.rotation, self.queries = rotation, {id(window): query for window, query in zip(windows, queries, strict=True)}
        super().__init__(windows, heads)

    def gradient(self, weights: Tensor, window: AttentionWindow, with_target: bool) -> tuple[Tensor, float]:
        """See `Problem`."""
        query = self.queries[id(window)]
        score_gradient, error = _score_gradient(query, self.rotation(by_head(window.inputs @ weights.T, self.blocks)), window, with_target)
        key_gradient = self.rotation(score_gradient.mT @ query, back=True)
        return key_gradient.transpose(0, 1).flatten(1).T @ window.inputs, error

    def curvature(self) -> Tensor:
        """For each rotary pair, over all angles, the energy of the queries that attend to a key."""
        total = torch.zeros(())
        for window in self.fit_windows[:: max(1, len(self.fit_windows) // 8)]:
            energy = window.weights.to(window.inputs.dtype).mT @ self.queries[id(window)].square()  # [H, T, D]
            total = total.to(energy.device) + self.rotation.pair_means(energy).sum(1)
        return torch.diag_embed(total + 1e-3 * total.mean(-1, keepdim=True) + TINY)


class Values(Problem):
    """Fit values, with the attention weights and the output projection fixed, to the output of the original's attention."""

    def __init__(self, windows: Sequence[AttentionWindow], outputs: Tensor, heads: int, kv_heads: int) -> None:
        self.outputs, self.heads, self.kv_heads = outputs, heads, kv_heads
        super().__init__(windows, 1)

    def gradient(self, weights: Tensor, window: AttentionWindow, with_target: bool) -> tuple[Tensor, float]:
        """See `Problem`."""
        difference = mixtures(window, weights, self.heads, self.kv_heads) @ self.outputs.T
        if with_target:
            difference -= window.target
        output_gradient = by_head(difference @ self.outputs, self.heads)  # [H, T, D]
        value_gradient = (window.weights.to(output_gradient.dtype).mT @ output_gradient).unflatten(0, (self.kv_heads, -1)).sum(1)  # [G, T, D]
        return value_gradient.transpose(0, 1).flatten(1).T @ window.inputs, float(difference.square().sum()) / 2 if with_target else 0.0

    def curvature(self) -> Tensor:
        """The Gram matrix of each KV head's columns of the output projection."""
        by_kv = self.outputs.unflatten(1, (self.kv_heads, self.heads // self.kv_heads, -1))  # [M, G, R, D]
        grams = torch.einsum("mgrd,mgre->gde", by_kv, by_kv)
        means = grams.diagonal(dim1=1, dim2=2).mean(-1)
        means = means.clamp_min(1e-3 * means.mean()).clamp_min(TINY)  # zero for a head that no output reads
        damped = grams + DAMPING * means[:, None, None] * torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        blocks: Tensor = torch.block_diag(*damped)
        return blocks[None]


@dataclass
class Rotation:
    """The operation on a head between its projection and the scores: RoPE rotates its pairs by position, [T, P] complex; `rotary` 0 means scaling."""

    angles: Tensor
    rotary: int
    layout: str
    width: int  # D
    scale: float = 1.0  # of a head without RoPE: OPT divides its queries by sqrt(D) itself

    def __call__(self, rows: Tensor, back: bool = False) -> Tensor:
        """Rotate rows [..., T, D]; with `back` apply the adjoint."""
        if not self.rotary:
            return rows * self.scale
        real, imaginary, rest = split_pairs(rows, self.rotary, self.layout)
        angles = self.angles[: rows.shape[-2]]
        cos, sin = angles.real, -angles.imag if back else angles.imag
        return join_pairs(real * cos - imaginary * sin, real * sin + imaginary * cos, rest, self.layout)

    def pair_means(self, squares: Tensor) -> Tensor:
        """Replace both numbers of a pair by their mean."""
        if not self.rotary:
            return squares
        first, second, rest = split_pairs(squares, self.rotary, self.layout)
        return join_pairs((first + second) / 2, (first + second) / 2, rest, self.layout)

    @classmethod
    def estimate(cls, before: Tensor, after: Tensor, rotary: int, layout: str) -> "Rotation | None":
        """Estimate the rotation from queries [B, H, T, D] before and after it; None where there is a norm as well."""
        width = before.shape[-1]
        rotation = cls(torch.empty(0), rotary, layout, width)
        if rotary:
            old, new = (torch.complex(*split_pairs(rows.double(), rotary, layout)[:2]) for rows in (before, after))
            energy = old.abs().square().sum((0, 1))  # [T, P]
            rotation.angles = ((new * old.conj()).sum((0, 1)) / energy.clamp_min(TINY)).to(torch.promote_types(before.dtype, torch.complex64))
        else:
            rotation.scale = float((before * after).sum() / before.square().sum().clamp_min(TINY))
        error = torch.linalg.vector_norm(rotation(before) - after) / torch.linalg.vector_norm(after).clamp_min(TINY)
        return rotation if error < 1e-3 else None


def _score_gradient(query: Tensor, key: Tensor, window: AttentionWindow, with_target: bool) -> tuple[Tensor, float]:
    """Return the gradient [H, T, T] for the scores of rotated queries and keys, [H, T, D], of half their squared error, and that error: see `Problem`."""
    scores = query @ key.mT
    if with_target:
        scores -= window.query @ _repeat_heads(window.key, len(query)).mT
    probability = window.weights.to(scores.dtype)
    gradient = probability * scores
    gradient -= probability * gradient.sum(-1, keepdim=True)  # softmax ignores a constant added to all scores of a token
    return gradient, float((gradient * scores).sum()) / 2 if with_target else 0.0


def mixtures(window: AttentionWindow, values: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return the inputs of the output projection, [T, H*D], for value weights [G*D, M]."""
    value = _repeat_heads(by_head(window.inputs @ values.T, kv_heads), heads)
    return (window.weights.to(value.dtype) @ value).transpose(0, 1).flatten(1)


def by_head(rows: Tensor, heads: int) -> Tensor:
    """Split rows [T, H*D] into heads: [H, T, D]."""
    split: Tensor = rows.unflatten(-1, (heads, -1)).transpose(-3, -2)
    return split


def _repeat_heads(rows: Tensor, heads: int) -> Tensor:
    """Repeat KV heads [G, T, D] for the query heads that share each."""
    return rows.repeat_interleave(heads // len(rows), 0)
