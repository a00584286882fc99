"""Windows of a text for distillation: which are held out, windows that repeat themselves, and tokens hidden from a masked language model."""
# N = windows, T = tokens in a window.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HELD_OUT = 16  # every sixteenth window is held out,
MOST_HELD_OUT = 32  # up to so many
PASSAGE = (16, 4)  # a repeated passage has at least T / 16 and at most T / 4 tokens
MASKED, AS_MASK, AS_ANOTHER = 0.15, 0.8, 0.1  # of the tokens; of these, those that become the mask, or any token (BERT)
UNLABELLED = -100  # the label of a token that is not to be predicted, as everywhere in transformers

Item = dict[str, Tensor]  # one window: `input_ids`, `labels`, and which tokens' predictions `count`, [T] each


@dataclass(frozen=True)
class Items(Sequence[Item]):
    """Windows that are made when they are asked for, so that of a long text the tokens alone are in memory."""

    number: int
    make: Callable[[int], Item]

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.make(at) for at in range(*index.indices(self.number))]
        if not -self.number <= index < self.number:
            raise IndexError(index)
        return self.make(index % self.number)


@dataclass(frozen=True)
class Windows:
    """Windows of a text: what is trained on, and what is held out."""

    train: Sequence[Item]
    held_out: Sequence[Item]


def held_out(count: int) -> Tensor:
    """Choose windows from all over a text of `count` windows: [N], bool."""
    some = max(1, min(MOST_HELD_OUT, count // HELD_OUT))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[[(2 * index + 1) * count // (2 * some) for index in range(some)]] = True
    return chosen


def next_tokens(ids: Tensor) -> Items:
    """Make items of windows [N, T] for a model that predicts the next token."""

    def item(index: int) -> Item:
        window = ids[index].long()
        labels, counts = torch.full_like(window, UNLABELLED), torch.ones_like(window, dtype=torch.bool)
        labels[:-1], counts[-1] = window[1:], False
        return {"input_ids": window, "labels": labels, "counts": counts}

    return Items(len(ids), item)


def unlabelled(ids: Tensor) -> Items:
    """Make items of windows [N, T] for a model that predicts no tokens."""

    def item(index: int) -> Item:
        window = ids[index].long()
        return {"input_ids": window, "labels": torch.full_like(window, UNLABELLED), "counts": torch.ones_like(window, dtype=torch.bool)}

    return Items(len(ids), item)


def masked(ids: Tensor, mask: int, special: Sequence[int], vocabulary: int) -> list[Item]:
    """Make items of windows [N, T] for a masked language model, which sees `mask` or another token in place of some; none of the `special` tokens.

    Devlin et al. 2018, arXiv 1810.04805, section 3.1. A window has the same masks whenever it is seen, so a run that goes on needs no state.
    """
    ids, draw = ids.long(), torch.Generator().manual_seed(0)
    chance = torch.rand(ids.shape, generator=draw)
    chosen = (torch.rand(ids.shape, generator=draw) < MASKED) & ~torch.isin(ids, torch.tensor([*special], dtype=ids.dtype))
    another = torch.randint(vocabulary, ids.shape, generator=draw)
    seen = torch.where(chosen & (chance < AS_MASK), mask, ids)
    seen = torch.where(chosen & (chance >= AS_MASK) & (chance < AS_MASK + AS_ANOTHER), another, seen)
    labels, counts = torch.where(chosen, ids, UNLABELLED), torch.ones_like(chosen)
    return [{"input_ids": window, "labels": label, "counts": count} for window, label, count in zip(seen, labels, counts, strict=True)]


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
