"""Means of values weighted by exp(key), for each channel by itself: the sums of an attention-free transformer.

The weight of token j for token t is exp(key_j + bias_tj): the key has a number for each channel, the bias one for each head.
"""
# B = batch, H = heads, T = tokens of a call, P = tokens before them, D = head width, C = tokens of a chunk, n = keys that a chunk has a bias for.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CHUNK, WIDE_CHUNK = 16, 128  # tokens: those of a decoder weigh each other channel by channel; an encoder's need not
LEAST = torch.finfo(torch.float32).min  # the highest key where there is none

Bias = Callable[[range, range], Tensor]  # (rows of the queries, rows of the keys) -> [B or 1, H, C, n]


class Sums(NamedTuple):
    """What a set of keys adds, float32: [B, H, C or 1, D] each. Weights are counted from the highest, so that none overflows."""

    mixed: Tensor  # sums of values, weighted by exp(key + bias - highest)
    total: Tensor  # sums of these weights
    highest: Tensor  # `LEAST` where there is no key

    @classmethod
    def stored(cls, mixed: Tensor, total: Tensor, highest: Tensor) -> Sums:
        """Read sums [B, H, D] from a state, which begins with zeros."""
        return cls(*(tensor[:, :, None] for tensor in (mixed, total, highest.masked_fill(total == 0, LEAST))))

    def add(self, key: Tensor, value: Tensor) -> Sums:
        """Add tokens [B, H, n, D], whose bias is 0."""
        highest = torch.maximum(self.highest, _highest(key, 2))
        share, weight = (self.highest - highest).exp(), (key - highest).exp()
        return Sums(share * self.mixed + (weight * value).sum(2, keepdim=True), share * self.total + weight.sum(2, keepdim=True), highest)


def look_back(key: Tensor, value: Tensor, tokens: int, sums: Sums, reach: int | None, bias: Bias | None) -> tuple[Tensor, Sums]:
    """Return the mean of each of the last `tokens` tokens over itself and all before it, [B, H, T, D], and the sums over those out of reach.

    A chunk's earlier keys are seen by all of its queries, so the highest of them is a safe reference for each; within the chunk each pair has its own.

    Args:
        key: float32, -inf where a token is padding, [B, H, P + T, D].
        value: float32, [B, H, P + T, D].
        tokens: T.
        sums: those over tokens before these.
        reach: a bias is 0 for tokens further back than this; None: for none.
        bias: of pairs; None: 0.
    """
    count, added, outputs = key.shape[2], 0, []
    for start in range(count - tokens, count, CHUNK):
        stop, begin = min(start + CHUNK, count), 0 if reach is None else max(0, start - reach)
        if begin > added:
            sums, added = sums.add(key[:, :, added:begin], value[:, :, added:begin]), begin
        weights = bias(range(start, stop), range(begin, stop)) if bias else key.new_zeros(1, 1, stop - start, stop - begin)
        earlier, own = weights.split([start - begin, stop - start], -1)
        parts = [sums, _within(key[:, :, start:stop], value[:, :, start:stop], own)]
        if start > begin:
            parts.append(_across(key[:, :, begin:start], value[:, :, begin:start], earlier))
        outputs.append(_mean(parts))
    end = 0 if reach is None else count - reach
    return torch.cat(outputs, 2), sums.add(key[:, :, added:end], value[:, :, added:end]) if end > added else sums


def look_around(key: Tensor, value: Tensor, reach: int | None, bias: Bias | None) -> Tensor:
    """Return the mean of each token over all tokens, [B, H, T, D]; arguments as for `look_back`. All see the highest key, so it is the only reference."""
    count = key.shape[2]
    weight = (key - _highest(key, 2)).exp()
    rows = torch.cat([weight * value, weight], -1)  # [B, H, T, 2 D]
    if bias is None:
        return _divided(rows.sum(2, keepdim=True)).expand(value.shape)
    before = functional.pad(rows.cumsum(2), (0, 0, 1, 0))  # [B, H, T + 1, 2 D]: sums of the first so many tokens
    after = functional.pad(rows.flip(2).cumsum(2), (0, 0, 1, 0)).flip(2)  # and of those from here on
    outputs = []
    for start in range(0, count, WIDE_CHUNK):
        stop = min(start + WIDE_CHUNK, count)
        begin, end = (0, count) if reach is None else (max(0, start - reach), min(count, stop + reach))
        near = bias(range(start, stop), range(begin, end)).exp() @ rows[:, :, begin:end]
        outputs.append(_divided(before[:, :, begin : begin + 1] + near + after[:, :, end : end + 1]))
    return torch.cat(outputs, 2)


def _across(key: Tensor, value: Tensor, bias: Tensor) -> Sums:
    """Sum over keys [B, H, n, D] that all queries see."""
    highest, factor = _highest(key, 2), bias.exp()
    weight = (key - highest).exp()
    return Sums(factor @ (weight * value), factor @ weight, highest)


def _within(key: Tensor, value: Tensor, bias: Tensor) -> Sums:
    """Sum over the keys of a chunk that are no later than the query: [B, H, C, C, D] weights."""
    tokens = key.shape[2]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device).triu(1)
    scores = (key[:, :, None] + bias[..., None]).masked_fill(later[..., None], -torch.inf)
    highest = _highest(scores, 3)
    weight = (scores - highest).exp()
    return Sums((weight * value[:, :, None]).sum(3), weight.sum(3), highest.squeeze(3))


def _highest(scores: Tensor, dim: int) -> Tensor:
    return scores.detach().amax(dim, keepdim=True).clamp_min(LEAST)


def _mean(parts: Sequence[Sums]) -> Tensor:
    """Divide the sums over all parts; zeros where there is no key."""
    highest = reduce(torch.maximum, [part.highest for part in parts])
    shares = [(part.highest - highest).exp() for part in parts]
    mixed, total = (sum(share * getattr(part, name) for share, part in zip(shares, parts, strict=True)) for name in ("mixed", "total"))
    return _divided(torch.cat([torch.as_tensor(mixed), torch.as_tensor(total)], -1))


def _divided(sums: Tensor) -> Tensor:
    mixed, total = sums.chunk(2, -1)
    return mixed / total.clamp_min(torch.finfo(total.dtype).tiny)
