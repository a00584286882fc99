"""Factorise a table of tokens [V, M] in blocks: tokens sorted by frequency, each block with two factors of its own.

A row E_v is replaced by E_v P, where P has the rank of the block and loses least of sum_v f_v |(E_v - E_v P) A|^2. The weight f_v of a token is half its
frequency in the text, half the same for all; A A^T is the metric, by what reads the rows: the identity for the layers, and for the head E[h h^T] of the
hidden states that it gets. With A U the first eigenvectors of the block's moment A (sum_v f_v E_v^T E_v) A, P = A U U^T A^-1. Blocks of tokens by frequency
with factors of their own: Chen et al. 2018, arXiv 1806.06950 (GroupReduce).
"""
# V = vocabulary, M = width, N = tokens of a block, K = its rank.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from effconvert.checkpoint.parts import ROWS
from effconvert.surgery.projections._ranks import least_price

UNIFORM = 0.5  # share of the tokens' weights that is the same for all: the text has few of the vocabulary's tokens
HEAD_SHARE = 0.8  # of the loss, where the embedding is the head too, or both are replaced; the rest is that of the layers
RIDGE = 1e-6  # of the mean of the second moment's diagonal
LEAST = 1e-30


@dataclass(frozen=True)
class Block:
    """The eigenvectors of a block of tokens in its table's metric."""

    losses: Tensor  # at each rank, [M + 1]
    vectors: Tensor  # [M, M], the most important first
    half: Tensor  # A, [M, M]
    back: Tensor  # its inverse

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return [M, K], by which rows are multiplied, and [K, M], which maps the products back."""
        first = self.vectors[:, :rank]
        return self.half @ first, first.T @ self.back


def sizes(vocabulary: int, blocks: int) -> list[int]:
    """Return how many tokens each block has, the most frequent first: each but the first as many as all before it."""
    cuts = [0, *(vocabulary >> (blocks - 1 - block) for block in range(blocks))]
    return [stop - start for start, stop in pairwise(cuts)]


def weights_of(counts: Tensor) -> Tensor:
    """Return the weight of each token, [V] in float64, which sum to 1."""
    counts = counts.double()
    return (1 - UNIFORM) * counts / counts.sum() + UNIFORM / len(counts)


def analyse(rows: Callable[[Tensor], Tensor], groups: Sequence[Tensor], weights: Tensor, shares: tuple[float, float], second: Tensor | None) -> list[Block]:
    """Return each block of a table.

    Args:
        rows: returns rows [N, M] of the table by token.
        groups: the tokens of each block.
        weights: of all tokens, [V].
        shares: of the loss in the layers and in the head.
        second: second moment of what the head gets, [M, M]; None where no head reads the table.
    """
    moments = [sum(_moment(rows(tokens).double(), weights[tokens]) for tokens in group.split(ROWS)) for group in groups]
    whole = torch.stack([torch.as_tensor(moment) for moment in moments]).sum(0)
    metric = torch.zeros_like(whole)
    for share, shape in zip(shares, (torch.eye(len(whole), dtype=whole.dtype), second), strict=True):
        if share and shape is not None:
            damped = shape + RIDGE * shape.diagonal().mean() * torch.eye(len(whole), dtype=whole.dtype)
            metric += share * damped / (damped * whole).sum().clamp_min(LEAST)
    values, vectors = torch.linalg.eigh(metric)
    roots = values.clamp_min(values[-1] * 1e-12).sqrt()
    half, back = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    return [_block(half @ moment @ half, half, back) for moment in moments]


def _moment(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights[:, None]).T @ rows


def _block(moment: Tensor, half: Tensor, back: Tensor) -> Block:
    values, vectors = torch.linalg.eigh(moment)
    lost = torch.cat([values.new_zeros(1), values.clamp_min(0).cumsum(0)]).flip(0)
    return Block(lost, vectors.flip(1), half, back)


def parameters(tokens: int, width: int, rank: int) -> int:
    """Return the parameters of a block; at full rank it is kept as it is."""
    return tokens * width if rank == width else rank * (tokens + width)


def fill(losses: Sequence[Tensor], tokens: Sequence[int], budget: float) -> list[int]:
    """Return the ranks of the blocks with the least sum of losses [M + 1] that have no more parameters than `budget`, at least 1 each (water-filling).

    Each block minimises its loss plus a price for each parameter; the price is the least that keeps the budget.
    """
    width = len(losses[0]) - 1
    costs = [torch.tensor([parameters(count, width, rank) for rank in range(1, width + 1)], dtype=losses[0].dtype) for count in tokens]

    def at(price: float) -> list[int]:
        return [1 + int((lost[1:] + price * cost).argmin()) for lost, cost in zip(losses, costs, strict=True)]

    def total(ranks: Sequence[int]) -> int:
        return sum(parameters(count, width, rank) for count, rank in zip(tokens, ranks, strict=True))

    if sum(tokens) * width <= budget:
        return [width] * len(tokens)
    return at(least_price(lambda price: total(at(price)), budget))
