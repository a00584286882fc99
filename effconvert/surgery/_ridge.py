"""Ridge regression from moments: fitted to most of the texts, its strength chosen on those held out; if nothing gains there, nothing changes."""
# F = inputs of a projection, O = its outputs.

import torch
from torch import Tensor

HELD_OUT = 8  # every eighth window
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of a ridge, in means of the Gram matrix's diagonal
TINY = 1e-30  # what is divided by where all is zero


class Moments:
    """What a ridge regression needs to know of inputs and of what is missing in its outputs."""

    def __init__(self) -> None:
        self.gram, self.cross = torch.zeros(0), torch.zeros(0)  # sum x x^T [F, F], sum y x^T [O, F]

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Count tokens: inputs [..., F], missing [..., O]."""
        x, y = inputs.flatten(0, -2), missing.flatten(0, -2)
        gram, cross = (x.T @ x).double(), (y.T @ x).double()
        self.gram, self.cross = (self.gram + gram, self.cross + cross) if len(self.gram) else (gram, cross)

    def gain(self, change: Tensor) -> float:
        """Return by how much a change [O, F] of the weights lowers the squared error of these tokens; of none by nothing."""
        if not len(self.gram):
            return 0.0
        return float(2 * (change * self.cross).sum() - ((change @ self.gram) * change).sum())


def ridge(fit: Moments, held: Moments) -> Tensor | None:
    """Return the change [O, F] of a projection's weights that fits `fit` and gains most on `held`; None where none gains."""
    best, change = 0.0, None
    scale = fit.gram.diagonal().mean().clamp_min(TINY)
    for strength in STRENGTHS:
        damped = fit.gram + strength * scale * torch.eye(len(fit.gram), dtype=fit.gram.dtype, device=fit.gram.device)
        tried = torch.cholesky_solve(fit.cross.T, torch.linalg.cholesky(damped)).T
        if (gain := held.gain(tried)) > best:
            best, change = gain, tried
    return change
