"""Attention within buckets of tokens, chunk by chunk: keys are sorted by bucket, so those that a query sees are neighbours."""
# B = batch, Hk = KV heads, N = keys, J = rounds, n = queries of a KV head, D = head width, C = chunk, G = groups of queries, Q = queries of a group, m = keys
# of a group, S = shared keys.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing._softmax import Part, attend


@dataclass(frozen=True)
class Seen:
    """Which keys each query sees in each round: those from `low` up to `high` in that round's order."""

    order: Tensor  # keys by bucket, and by position within it, [B, Hk, J, N]
    place: Tensor  # where each key stands in that order, [B, Hk, J, N]
    begin: Tensor  # where the chunk before the query's own begins, or would begin if there were one, [B, Hk, J, n]
    low: Tensor  # [B, Hk, J, n]
    high: Tensor  # [B, Hk, J, n]

    @classmethod
    def by_bucket(cls, keys: Tensor, queries: Tensor, own: Tensor, chunk: int, causal: bool) -> Seen:
        """Cut each bucket into chunks of C keys by position: a query sees its chunk up to itself and the one before; in encoders its chunk and both neighbours.

        A query's chunk is that of the last key in its bucket that does not come after it. So it depends on no later token.

        Args:
            keys: bucket of each key, [B, Hk, J, N]; one without queries for those that are not to be seen.
            queries: bucket of each query, [B, Hk, J, n].
            own: the key of each query's token, [B, n].
            chunk: C.
            causal: whether a query sees nothing after itself.
        """
        count = keys.shape[-1]
        codes, order = (keys * count + torch.arange(count, device=keys.device)).sort()
        first, end = torch.searchsorted(codes, queries * count), torch.searchsorted(codes, queries * count + own[:, None, None] + 1)
        begin = first + ((end - first - 1).clamp_min(0) // chunk - 1) * chunk
        high = end if causal else torch.minimum(begin + 3 * chunk, torch.searchsorted(codes, (queries + 1) * count))
        return cls(order, order.argsort(), begin, torch.maximum(begin, first), high)

    def earlier(self, rounds: int, keys: Tensor, queries: Tensor) -> Tensor:
        """Return which keys [B, Hk, G, m] queries [B, Hk, G, Q] see in the first `rounds` rounds; both by number: [B, Hk, G, Q, m]."""
        seen = torch.zeros((), dtype=torch.bool, device=keys.device)
        for round_ in range(rounds):
            place = pick(self.place[:, :, round_], keys)[..., None, :]
            low, high = (pick(bound[:, :, round_], queries)[..., None] for bound in (self.low, self.high))
            seen = seen | ((place >= low) & (place < high))
        return seen

    def attend(self, call: Call, query: Tensor, key: Tensor, value: Tensor, chunk: int, buckets: int) -> Iterator[Part]:
        """Attend in each round to the keys that no round before has.

        Queries of one chunk are a group, or several groups of at most C.

        Args:
            call: for its scaling, soft cap and number of tokens.
            query: [B, Hk, n, D].
            key: [B, Hk, N, D].
            value: [B, Hk, N, D].
            chunk: C.
            buckets: of each round but the first, which has one.

        Yields:
            What the round's keys add, [B, Hk, n, ...].
        """
        count, device, span = query.shape[2], key.device, chunk * (2 if call.causal else 3)
        size = min(chunk, count)
        for round_ in range(self.order.shape[2]):
            partial = (1 if round_ == 0 else buckets) * (1 if call.state is None else 2)  # chunks that begin before the first new token, or end after the last
            groups = (count + min(count, call.query.shape[2] // chunk + partial) * (size - 1)) // size  # at most
            begins, order = self.begin[:, :, round_].sort(stable=True)
            rank = torch.arange(count, device=device) - torch.searchsorted(begins, begins)  # among the queries of a chunk
            slot = ((rank % size == 0).cumsum(-1) - 1) * size + rank % size
            member = order.new_zeros(*order.shape[:2], groups * size).scatter(2, slot, order).unflatten(2, (groups, size))  # empty slots have some query
            at = pick(self.begin[:, :, round_], member[..., 0])[..., None] + torch.arange(span, device=device)  # [B, Hk, G, m]
            keys = pick(self.order[:, :, round_], at.clamp(0, key.shape[2] - 1))
            low, high = (pick(bound[:, :, round_], member)[..., None] for bound in (self.low, self.high))
            visible = (at[..., None, :] >= low) & (at[..., None, :] < high) & ~self.earlier(round_, keys, member)
            part = attend(call, pick(query, member)[:, :, None], pick(key, keys), pick(value, keys), visible[:, :, :, None])
            back = torch.empty_like(slot).scatter(2, order, slot)
            yield Part(*(pick(each[:, :, 0].flatten(2, 3), back) for each in (part.mixed, part.total, part.highest)))

    def attend_shared(self, call: Call, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, before: Tensor) -> Part:
        """Attend to keys that all queries share, where no round has them: [B, Hk, n, ...].

        Args:
            call: for its scaling and soft cap.
            query: [B, Hk, n, D].
            key: [B, Hk, S, D].
            value: [B, Hk, S, D].
            numbers: these keys among all, [B, S].
            before: how many of them a query may see, [B, n].
        """
        keys = numbers[:, None, None].expand(-1, query.shape[1], -1, -1)  # [B, Hk, 1, S]
        every = torch.arange(query.shape[2], device=query.device).expand(*query.shape[:2], 1, -1)  # [B, Hk, 1, n]
        visible = (torch.arange(keys.shape[3], device=key.device) < before[:, None, None, :, None]) & ~self.earlier(self.order.shape[2], keys, every)
        part = attend(call, query[:, :, None, None], key[:, :, None], value[:, :, None], visible[:, :, :, None])
        return part.map(lambda each: each[:, :, 0, 0])


def pick(rows: Tensor, places: Tensor) -> Tensor:
    """Return rows [B, Hk, N] or [B, Hk, N, D] at places [B, Hk, ...], each head its own."""
    flat = places.flatten(2)
    if rows.ndim == 4:
        flat = flat[..., None].expand(-1, -1, -1, rows.shape[-1])
    picked: Tensor = rows.gather(2, flat).unflatten(2, places.shape[2:])
    return picked
