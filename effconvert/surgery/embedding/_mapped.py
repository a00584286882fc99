"""Write normalised embeddings in fewer dimensions: narrow tables, a LayerNorm over E dimensions, and a matrix behind it (ALBERT's embedding).

A LayerNorm takes the mean of all E numbers away, and divides by their deviation. So the tables are projected on the E - 1 directions in which centred
embeddings have most of their energy, and these are spread over E numbers that sum to 0: the norm takes nothing away, and what is left of a token gets the
length that all tokens have. The matrix behind it, with its bias, is the least-squares fit to the original's normalised embeddings.
"""
# V = vocabulary, M = width of the layers, E = width of the embedding, N = tokens.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effconvert.checkpoint.parts import ROWS

if TYPE_CHECKING:
    from effconvert.surgery._surgery import ForwardProtocol

UNIFORM = 0.25  # share of the weights that all tokens of the vocabulary have alike, since a text has few of them; the tokens of the text have the rest
RIDGE = 1e-5  # of the mean of the moments' diagonal


@dataclass(frozen=True)
class Mapped:
    """A narrow embedding."""

    basis: Tensor  # by which rows of all tables are multiplied, [M, E]
    matrix: Tensor  # behind the norm, [M, E]
    bias: Tensor  # likewise, [M]


def fit(forward: ForwardProtocol, width: int) -> Mapped:
    """Fit an embedding of `width` numbers to that of a model whose embeddings go through a LayerNorm, on the calibration text and the vocabulary."""
    gain, bias = (forward.outer[f"embed_norm{suffix}"].double() for suffix in ("", ".bias"))
    text = [(state.flatten(0, 1).cpu().double() - bias) / gain for state in forward.begin(int(forward.counts.sum()))]  # [N, M]
    shares = ((1 - UNIFORM) / sum(map(len, text)), UNIFORM / forward.config.vocabulary)

    def rows() -> Iterator[tuple[Tensor, float]]:
        """Yield normalised embeddings [N, M] with the weight of each."""
        yield from ((part, shares[0]) for part in text)
        yield from ((part, shares[1]) for part in _vocabulary(forward))

    moment = torch.stack([weight * part.T @ part for part, weight in rows()]).sum(0)
    basis = basis_of(moment, width)
    gram, cross = torch.zeros(width + 1, width + 1, dtype=torch.double), torch.zeros(len(gain), width + 1, dtype=torch.double)
    for part, weight in rows():
        inner = normalised(part @ basis)
        inner = torch.cat([inner, torch.ones_like(inner[:, :1])], 1)  # the last for the bias
        gram += weight * inner.T @ inner
        cross += weight * (part * gain + bias).T @ inner
    gram += RIDGE * gram.diagonal().mean() * torch.eye(width + 1, dtype=gram.dtype)
    solution = torch.linalg.solve(gram, cross, left=False)
    return Mapped(basis.float(), solution[:, :-1].float(), solution[:, -1].float())


def basis_of(moment: Tensor, width: int) -> Tensor:
    """Return a matrix [M, E]: the E - 1 first eigenvectors of the moment [M, M] of centred rows, spread over E columns that sum to 0."""
    vectors = torch.linalg.eigh(moment)[1][:, 1 - width :]
    vectors = vectors - vectors.mean(0)  # so that rows need not be centred
    frame = torch.linalg.qr(torch.cat([torch.ones(width, 1, dtype=moment.dtype), torch.eye(width, width - 1, dtype=moment.dtype)], 1))[0]
    basis: Tensor = vectors @ frame[:, 1:].T
    return basis


def normalised(rows: Tensor) -> Tensor:
    """Return rows [..., W] with mean 0 and deviation 1."""
    return torch.nn.functional.layer_norm(rows, rows.shape[-1:])


def _vocabulary(forward: ForwardProtocol) -> Iterator[Tensor]:
    """Yield the normalised embeddings of all tokens, in the mean of all positions."""
    outer = forward.outer
    common = sum((outer[part].double()[:1] if part == "types" else outer[part].double().mean(0) for part in ("positions", "types") if part in outer), 0)
    for tokens in torch.arange(forward.config.vocabulary).split(ROWS):
        yield normalised(forward.table_rows("embed", tokens).double() + common)
