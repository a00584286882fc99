"""Windows of a text for distillation: which are held out, and windows that repeat themselves."""
# N = windows, T = tokens in a window.

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 16  # every sixteenth window is held out,
MOST_HELD_OUT = 32  # up to so many
PASSAGE = (16, 4)  # a repeated passage has at least T / 16 and at most T / 4 tokens


@dataclass(frozen=True)
class Windows:
    """Windows of a text: what is trained on, and what is held out, [N, T] each."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def split(cls, ids: Tensor, recall: float = 0.0) -> "Windows":
        """Hold out windows from all over the text; a share `recall` of the others repeat themselves."""
        count = max(1, min(MOST_HELD_OUT, len(ids) // HELD_OUT))
        chosen = torch.zeros(len(ids), dtype=torch.bool)
        chosen[[(2 * index + 1) * len(ids) // (2 * count) for index in range(count)]] = True
        return cls(repeating(ids[~chosen], recall), ids[chosen])


def repeating(ids: Tensor, share: float) -> Tensor:
    """Return windows [N, T] of which a share has a passage of its first half again in its second half.

    Such a passage can be predicted only from tokens far back, so the divergence on it teaches a student to find them.
    """
    if not share:
        return ids
    ids, draw, length = ids.clone(), torch.Generator().manual_seed(0), ids.shape[1]

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    for window in ids:
        if torch.rand(1, generator=draw) >= share:
            continue
        passage = between(length // PASSAGE[0], length // PASSAGE[1])
        source, target = between(0, length // 2 - passage), between(length // 2, length - passage)
        window[target : target + passage] = window[source : source + passage].clone()
    return ids
