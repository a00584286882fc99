"""One softmax over several sets of keys: each set is attended to by itself, and the results are added."""
# B = batch, Hk = KV heads, R = query heads that share one, T = tokens, A = groups of queries with the same keys, Q = queries of a group, n = keys of a
# group, D = head width.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from effconvert.surgery.mixing._call import Call, padding_first, reorder


@dataclass(frozen=True)
class Part:
    """What one set of keys adds to a softmax, float32. Scores are counted from the highest, so that none overflows."""

    mixed: Tensor  # sums of values, weighted by exp(score - highest), [..., D]
    total: Tensor  # sums of these weights, [..., 1]
    highest: Tensor  # [..., 1]; the least float where no key is seen

    def map(self, change: Callable[[Tensor], Tensor]) -> Part:
        """Return the part with another arrangement of the queries."""
        return Part(*map(change, (self.mixed, self.total, self.highest)))


def attend(call: Call, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Part:
    """Attend in groups of queries, each to its own keys.

    Args:
        call: for its scaling and soft cap.
        query: [B, Hk, R, A, Q, D].
        key: [B, Hk, A, n, D].
        value: [B, Hk, A, n, D].
        visible: which keys a query sees, bool [B or 1, Hk or 1, A or 1, 1, Q, n].
    """
    rows = query.transpose(2, 3).flatten(3, 4)  # [B, Hk, A, R Q, D]
    scores = (rows @ key.mT).unflatten(3, (query.shape[2], query.shape[4])).float() * call.scaling  # [B, Hk, A, R, Q, n]
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weight = (scores - highest).exp()
    mixed = (weight.to(value.dtype).flatten(3, 4) @ value).float().unflatten(3, scores.shape[3:5])
    return Part(mixed, weight.sum(-1, keepdim=True), highest).map(lambda each: each.transpose(2, 3))


def combine(parts: Sequence[Part]) -> Tensor:
    """Return the output of one softmax over the keys of all parts; zeros where no key is seen."""
    highest = reduce(torch.maximum, [part.highest for part in parts])
    shares = [(part.highest - highest).exp() for part in parts]
    mixed = sum(share * part.mixed for share, part in zip(shares, parts, strict=True))
    total = sum(share * part.total for share, part in zip(shares, parts, strict=True))
    output: Tensor = mixed / torch.as_tensor(total).clamp_min(1)  # the highest score has a weight of 1
    return output


@dataclass(frozen=True)
class Text:
    """Keys and values of a text's tokens by position: that of a live token among the live ones."""

    key: Tensor  # [B, Hk, N, D]
    value: Tensor  # [B, Hk, N, D]
    shift: Tensor  # the row of position 0, [B, 1]; negative where the first tokens are not kept

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values at positions [B or 1, ..., n]: [B, Hk, ..., n, D]. At positions that do not exist they are another token's."""
        shape = positions.shape[1:]
        rows = (positions.flatten(1) + self.shift).clamp(0, self.key.shape[2] - 1)
        key, value = (reorder(tensor, rows).unflatten(2, shape) for tensor in (self.key, self.value))
        return key, value


def live_last(call: Call) -> tuple[Call, Tensor | None]:
    """Return the call with padding in front, as a decoder's calls come, and the order [B, T] if that is another."""
    if call.causal or not call.padded:
        return call, None
    order = padding_first(call.live)
    query, key, value = (reorder(rows, order) for rows in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, live=call.live.gather(1, order)), order
