"""Ridge regression from moments. Most texts are fitted; held-out ones choose its strength. If no strength improves on them, nothing changes."""
# F = inputs of a projection, O = its outputs.

import torch
from torch import Tensor

HELD_OUT = 8  # every eighth window
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of a ridge, in means of the Gram matrix's diagonal
TINY = 1e-30  # least divisor
RIDGE = 1e-6  # of the mean of a moment's diagonal: in directions that the text does not cover, the weights themselves decide
ROUNDING = 1e-9  # least energy of a direction, as a share of the largest


class Moments:
    """The sums over tokens that a ridge regression needs: of inputs, and of inputs with residuals of the outputs."""

    def __init__(self) -> None:
        self.gram, self.cross = torch.zeros(0), torch.zeros(0)  # sum x x^T [F, F], sum y x^T [O, F]

    def add(self, inputs: Tensor, residuals: Tensor) -> None:
        """Add tokens: inputs [..., F], residuals [..., O]."""
        x, y = inputs.flatten(0, -2), residuals.flatten(0, -2)
        gram, cross = (x.T @ x).double(), (y.T @ x).double()
        self.gram, self.cross = (self.gram + gram, self.cross + cross) if len(self.gram) else (gram, cross)

    def gain(self, change: Tensor) -> float:
        """Return by how much a change [O, F] of the weights lowers the squared error of these tokens; 0 without tokens."""
        if not len(self.gram):
            return 0.0
        return float(2 * (change * self.cross).sum() - ((change @ self.gram) * change).sum())


def damped(moment: Tensor) -> Tensor:
    """Add a little to the diagonal of second moments, [..., M, M]."""
    scale = RIDGE * moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(TINY)
    return moment + scale[..., None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype)


def positive(moment: Tensor) -> Tensor:
    """Return second moments [..., M, M], or the nearest that have a Cholesky factor: on fewer tokens than M, rounded sums leave directions below zero."""
    if not torch.linalg.cholesky_ex(moment).info.any():
        return moment
    energies, vectors = torch.linalg.eigh(moment)
    nearest: Tensor = (vectors * energies.clamp_min(ROUNDING * energies[..., -1:])[..., None, :]) @ vectors.mT
    return nearest


def ridge(fit: Moments, held_out: Moments) -> Tensor | None:
    """Return the change [O, F] of a projection's weights that fits `fit` and gains most on `held_out`; None where none gains."""
    best, change = 0.0, None
    scale = fit.gram.diagonal().mean().clamp_min(TINY)
    for strength in STRENGTHS:
        damped = fit.gram + strength * scale * torch.eye(len(fit.gram), dtype=fit.gram.dtype, device=fit.gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:  # the sums are rounded to float32, and so weak a ridge does not cover that
            break
        candidate = torch.cholesky_solve(fit.cross.T, factor).T
        if (gain := held_out.gain(candidate)) > best:
            best, change = gain, candidate
    return change
