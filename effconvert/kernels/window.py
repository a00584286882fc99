"""Softmax attention to the last W tokens in linear time and memory.

Queries are processed in chunks. Each chunk has one band of keys: its own and the W - 1 before it. So prefill computes T (W + chunk) scores, not T^2.
"""
# B = batch, G = KV heads, R = query heads that share one, T = tokens, D = head width, W = window, P = tokens before the first query.

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = (64, 512)  # fewest and most queries that share a band; a quarter of the window between these


def window_scores(query: Tensor, key: Tensor, live: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the scores of each query with the keys of its band, and which of them are in its window.

    Args:
        query: [B, G, R, T, D].
        key: [B, G, P + T, D], the last T those of the queries' tokens.
        live: which keys are not padding, [B, P + T].
        window: size of the window, the query's own token included.

    Returns:
        Scores [B, G, R, T, C + P'] of the chunk's band, C tokens in a chunk, and which of them count [B, 1, 1, T, C + P'].
    """
    tokens, before = query.shape[-2], key.shape[-2] - query.shape[-2]
    chunk = min(max(CHUNK[0], min(CHUNK[1], window // 4)), tokens)
    spare = -tokens % chunk
    query = functional.pad(query, (0, 0, 0, spare)).unflatten(-2, (-1, chunk))  # [B, G, R, N, C, D]
    bands = _bands(functional.pad(key, (0, 0, 0, spare)), chunk, before)  # [B, G, N, D, P + C]
    scores = (query @ bands[:, :, None]).flatten(-3, -2)[..., :tokens, :]
    distance = before + torch.arange(chunk, device=key.device)[:, None] - torch.arange(before + chunk, device=key.device)  # [C, P + C]
    in_window = (distance >= 0) & (distance < window)
    alive = functional.pad(live, (0, spare)).unfold(1, before + chunk, chunk)  # [B, N, P + C]
    counted = (in_window & alive[:, :, None]).flatten(1, 2)[:, :tokens]
    return scores, counted[:, None, None]


def window_values(weights: Tensor, value: Tensor) -> Tensor:
    """Mix values [B, G, P + T, D] by weights [B, G, R, T, P + C] in the bands of `window_scores`: [B, G, R, T, D]."""
    tokens = weights.shape[-2]
    before = value.shape[-2] - tokens
    chunk = weights.shape[-1] - before
    spare = -tokens % chunk
    weights = functional.pad(weights, (0, 0, 0, spare)).unflatten(-2, (-1, chunk))
    bands = _bands(functional.pad(value, (0, 0, 0, spare)), chunk, before)
    return (weights @ bands[:, :, None].mT).flatten(-3, -2)[..., :tokens, :]


def _bands(rows: Tensor, chunk: int, before: int) -> Tensor:
    return rows.unfold(2, before + chunk, chunk)  # a view: bands overlap
