"""Linear maps from a student's hidden states to those of a teacher of another width."""
# N = tokens, M = the student's hidden width, O = the teacher's.

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "projections.safetensors"  # beside a checkpoint's weights, and no part of the model that is written
RIDGE = 1e-3  # of the mean square of the student's states: what a fit on few tokens adds to their second moment


class Projections(torch.nn.ModuleList):
    """A map [M, O] for each hidden state that is compared. They are fitted once, then trained with the student, and left behind at the end."""

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__(torch.nn.Linear(width, to, bias=False) for width, to in widths)

    def fit(self, own: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        """Set each map to the least squares from the student's states [N, M] to the teacher's [N, O]."""
        for projection, mine, other in zip(self.parameters(), own, theirs, strict=True):
            mine, other = mine.double(), other.double()
            moment = mine.T @ mine  # [M, M]
            moment.diagonal().add_(RIDGE * moment.diagonal().mean())
            with torch.no_grad():
                projection.copy_(torch.linalg.solve(moment, mine.T @ other).T)

    def project(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Map the student's states [N, M] to [N, O]."""
        return [projection(states) for projection, states in zip(self, own, strict=True)]

    def save(self, folder: Path) -> None:
        """Write them beside a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read them from there."""
        self.load_state_dict(load_file(folder / FILE))
