"""What a cache keeps of a teacher's predictions, and the loss of a student towards that.

Samples: of each token's distribution, K ids are drawn, and how often each came. The mean of many such draws is the distribution itself, so the gradient of
the loss is that of KL(teacher || student) on average (Sparse Logit Sampling, Anshumann et al. 2025, arXiv 2503.16870, with q = p). The K draws are
evenly spaced with one random offset (systematic sampling): each id then comes either as often as expected or once more or less.

Top-k: the K likeliest ids with their log-probabilities, and one number for all other ids together, the tail. Teacher and student are compared as
distributions of K + 1 outcomes, whose KL is never more than that of all V.
"""
# N = tokens, V = vocabulary, K = numbers a token, C = tokens at a time.

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from effconvert.heal._in_pieces import summed
from effconvert.heal._objective import Head, Objective
from effconvert.kernels._divergences import outcomes, sparse_divergence_reference
from effconvert.kernels._kinds import SparseKind
from effconvert.kernels.choice import runs_triton

NARROW = {torch.uint8: 2**8, torch.uint16: 2**16}  # types for small whole numbers -> how many there are
Stored = Mapping[str, Tensor]


def narrow(numbers: Tensor, below: int) -> Tensor:
    """Return whole numbers less than `below` in the smallest type that holds them."""
    return numbers.to(next((dtype for dtype, many in NARROW.items() if below <= many), torch.int32))


@dataclass(frozen=True)
class Kept:
    """A way to keep predictions: what is stored of them, and what a student's loss needs."""

    size: int  # K
    vocabulary: int  # V

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """The most bytes of disk for a token."""

    @abstractmethod
    def keep(self, log_probs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return of log-probabilities [C, V] what is kept: ids [C, K], and numbers for them."""

    @abstractmethod
    def pack(self, ids: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Return what `keep` gave for the tokens of a window as small tensors for the disk."""

    @abstractmethod
    def unpack(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """Return ids [N, K] and numbers as the loss takes them."""

    @abstractmethod
    def compared(self, objective: Objective) -> SparseKind:
        """Return how a student is compared with what was kept."""


class Samples(Kept):
    """Ids that are drawn from the teacher's distribution, and how often each came."""

    @property
    def bytes_per_token(self) -> int:
        """Where no id comes twice; most do, and are stored once."""
        return self.size * (narrow(torch.zeros(1), self.vocabulary).itemsize + narrow(torch.zeros(1), self.size + 1).itemsize) + 4

    def keep(self, log_probs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw K ids of each distribution, in order of ids; each stands for 1 / K."""
        edges = log_probs.double().exp().cumsum(-1)  # [C, V]: the id i owns what lies between edge i - 1 and edge i
        offsets = torch.rand(len(edges), 1, generator=generator, dtype=torch.double).to(edges.device)
        points = (offsets + torch.arange(self.size, device=edges.device)) / self.size * edges[:, -1:]  # [C, K]
        ids = torch.searchsorted(edges, points, right=True).clamp(max=self.vocabulary - 1)
        return ids, torch.ones_like(ids)

    def pack(self, ids: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Store each id once, with how often it came, and how many ids each token has."""
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        at = first.flatten().nonzero().flatten()
        counts = at.diff(append=torch.tensor([ids.numel()]))
        return {
            "ids": narrow(ids[first], self.vocabulary),
            "counts": narrow(counts, self.size + 1),
            "lengths": narrow(first.sum(-1), self.size + 1),
        }

    def unpack(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """Fill up with weights of 0."""
        filled = torch.arange(self.size) < stored["lengths"].long()[:, None]  # [N, K]
        ids, weights = torch.zeros(filled.shape, dtype=torch.long), torch.zeros(filled.shape)
        ids[filled], weights[filled] = stored["ids"].long(), stored["counts"].float() / self.size
        return ids, weights

    def compared(self, objective: Objective) -> SparseKind:
        """By the cross-entropy with the samples: KL but for the teacher's entropy, which no student changes."""
        return "samples"


class TopK(Kept):
    """The likeliest ids with their log-probabilities, and the log-probability of all others together."""

    @property
    def bytes_per_token(self) -> int:
        """Ids, and numbers in float32."""
        return self.size * (narrow(torch.zeros(1), self.vocabulary).itemsize + 4) + 4

    def keep(self, log_probs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Take the likeliest ids; the tail is the last number."""
        ids = log_probs.topk(self.size).indices
        return ids, outcomes(log_probs, ids)

    def pack(self, ids: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Store both as they are."""
        return {"ids": narrow(ids, self.vocabulary), "log_probs": numbers.float()}

    def unpack(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """Read both as they are."""
        return stored["ids"].long(), stored["log_probs"]

    def compared(self, objective: Objective) -> SparseKind:
        """As distributions of K + 1 outcomes."""
        return objective.kind


KINDS: dict[str, type[Kept]] = {"samples": Samples, "topk": TopK}


@dataclass(frozen=True)
class KeptObjective:
    """The loss of a student towards kept predictions, in nats a token; like `Objective` with the logits of a few tokens in memory at a time."""

    objective: Objective
    kept: Kept

    def __call__(self, hidden: Tensor, head: Head, ids: Tensor, numbers: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of tokens.

        Args:
            hidden: the student's last hidden states, [N, M].
            head: its logits of some of them.
            ids: those kept of each prediction, [N, K].
            numbers: what is known of them, [N, K] or [N, K + 1].
            labels: the token that each predicts, [N]; -100 where that is no part of the cross-entropy.
        """
        objective, ce = self.objective, self.objective.ce_of(labels)
        how = self.kept.compared(objective), self.kept.vocabulary, objective.temperature, objective.weight, ce

        def loss(own: Tensor, rows: slice) -> Tensor:
            student = head(own)
            if runs_triton(student.device, "sparse_divergence"):
                from effconvert.kernels.sparse_divergence import sparse_divergence  # imports triton
            else:
                sparse_divergence = sparse_divergence_reference
            return sparse_divergence(student, ids[rows], numbers[rows], labels[rows], *how).sum()

        return summed(loss, hidden, head.parameters(), objective.again) / len(hidden)
