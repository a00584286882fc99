"""Two factors of a matrix with an identity inside one of them, which is not stored: at rank K they have K x K numbers less than two thin matrices.

Of a matrix with more outputs than inputs, K inputs are pivots: W x = left (x_pivots + right x_rest). Else K outputs are: y_pivots = right x, and
y_rest = left y_pivots. Any matrix of rank K can be written so. Which K are the pivots decides how large the numbers get, and so what rounding costs: QR with
column pivoting chooses them, of inputs by their size on the text. (The side with fewer numbers has pivots, as rounding costs least there.)
"""
# O = outputs of a projection, I = its inputs, K = rank, N = the lesser of O and I.

from collections.abc import Mapping

import torch
from torch import Tensor

ORDER = "order"  # of the inputs: pivots first, then the rest; or where each output is among the pivots and the rest
SMALLEST, TINY = 1e-6, 1e-30  # size of an input, in shares of the greatest, and at least


def shapes(out: int, inner: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the two factors and of the order."""
    if out > inner:
        return {"left": (out, rank), "right": (rank, inner - rank), ORDER: (inner,)}
    return {"left": (out - rank, rank), "right": (rank, inner), ORDER: (out,)}


def pivoted(left: Tensor, right: Tensor, moment: Tensor | None) -> dict[str, Tensor]:
    """Return the pivoted form of the product of [O, K] and [K, I], for inputs with this second moment [I, I]; None: all inputs are equally likely."""
    matrix, rank = left @ right, len(right)
    if len(left) <= right.shape[1]:
        order, rest = _pivots(torch.linalg.qr(left)[0])
        return {"left": rest, "right": matrix[order[:rank]], ORDER: order.argsort()}
    sizes = None if moment is None else moment.diagonal().sqrt()
    order, rest = _pivots(torch.linalg.qr(right.T)[0], sizes)
    return {"left": matrix[:, order[:rank]], "right": rest.T, ORDER: order}


def _pivots(basis: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the rows of a basis [N, K] with the pivots first, and what of the pivots makes up each of the other rows, [N - K, K].

    Sizes [N]: no row should need much of a smaller one.
    """
    from scipy.linalg import qr

    rank = basis.shape[1]
    scaled = basis if sizes is None else basis * sizes[:, None].clamp_min(max(TINY, SMALLEST * float(sizes.max())))
    order = torch.from_numpy(qr(scaled.T.numpy(), mode="r", pivoting=True)[1]).long()
    return order, torch.linalg.solve(basis[order[:rank]], basis[order[rank:]], left=False)


def product(factors: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix [O, I] that the factors stand for."""
    left, right, order = factors["left"], factors["right"], factors[ORDER]
    unit = torch.eye(len(right), dtype=right.dtype, device=right.device)
    if inputs_are_pivots(factors):
        return left @ torch.cat([unit, right], 1)[:, order.argsort()]
    return torch.cat([unit, left])[order] @ right


def inputs_are_pivots(factors: Mapping[str, Tensor]) -> bool:
    """Whether pivots are among the inputs: the matrix has more outputs."""
    return len(factors["left"]) > factors["right"].shape[1]


def multiply(factors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Return the products of the matrix with hidden states [..., I]: [..., O]."""
    left, right, order = factors["left"], factors["right"], factors[ORDER]
    if inputs_are_pivots(factors):
        pivots, rest = hidden.index_select(-1, order).tensor_split([len(right)], -1)
        return (pivots + rest @ right.T) @ left.T
    pivots = hidden @ right.T
    return torch.cat([pivots, pivots @ left.T], -1).index_select(-1, order)
