"""The Monarch matrix next to a matrix for given inputs: each block of rank 1 by a whitened SVD, then the output factor fitted to the whole.

Output p K + k of a Monarch matrix is sum over r of left[k, p, r] right[r, k, :] x_r, for blocks x_r of the input (Dao et al. 2022, arXiv 2204.00595).
"""
# O = outputs of a projection, I = its inputs, K = blocks.

import torch
from torch import Tensor

from effconvert.surgery._ridge import damped, positive


def monarch(weight: Tensor, moment: Tensor | None, blocks: int) -> tuple[Tensor, Tensor]:
    """Return the blocks of outputs [K, O/K, K] and of inputs [K, K, I/K], in float64, for inputs with this second moment [I, I]; None: equally likely."""
    weight = weight.double()
    inputs = weight.shape[1]
    second = torch.eye(inputs, dtype=weight.dtype) if moment is None else positive(damped(moment))
    parts = weight.unflatten(0, (-1, blocks)).unflatten(2, (blocks, -1)).permute(1, 2, 0, 3)  # [K, K, O/K, I/K]: by output block k, input block r
    own = torch.stack([second[rows, rows] for rows in _slices(inputs, blocks)])  # [K, I/K, I/K]: each block's own moment
    roots = torch.linalg.cholesky(own)
    left, sizes, right = torch.linalg.svd(parts @ roots, full_matrices=False)
    whitened = right[..., 0, :] * sizes[..., :1]  # [K, K, I/K]
    solved = torch.linalg.solve_triangular(roots, whitened[..., None, :], upper=False, left=False)[..., 0, :].transpose(0, 1)  # [r, k, I/K]
    outputs = left[..., 0].transpose(1, 2)  # [k, O/K, r]
    return _fitted(parts, outputs, solved, second), solved


def _fitted(parts: Tensor, left: Tensor, right: Tensor, second: Tensor) -> Tensor:
    """Return the blocks of outputs with the least squared error, given those of inputs: blocks of the input are not independent."""
    blocks, fitted = len(left), torch.empty_like(left)
    for k in range(blocks):
        rows = torch.block_diag(*right[:, k])  # [K, I]: what the middle values of this block are
        cross = rows @ second
        gram = cross @ rows.T
        wanted = parts[k].transpose(0, 1).flatten(1)  # [O/K, I]
        fitted[k] = left[k] + torch.linalg.solve(damped(gram), cross @ (wanted - left[k] @ rows).T).T
    return fitted


def _slices(inputs: int, blocks: int) -> list[slice]:
    size = inputs // blocks
    return [slice(start, start + size) for start in range(0, inputs, size)]
