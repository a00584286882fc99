"""Causal linear attention with an optional decay: S_t = exp(fall_t) S_(t-1) + k_t v_t, o_t = q_t S_t.

Three forms give the same result: *recurrent*, a token at a time with a state [m, D]; *parallel*, with a masked matrix [T, T]; *chunked*, parallel inside
chunks and recurrent between them. This is the chunked form: one token makes it the recurrent form, one chunk the parallel one.
Katharopoulos et al. 2020, arXiv 2006.16236, eq. 9-12; with a decay for each head Sun et al. 2023, arXiv 2307.08621, eq. 5-7; with one for each token Dao
and Gu 2024, arXiv 2405.21060. With a window of softmax in the same normaliser Zhang et al. 2024, arXiv 2410.10254, eq. 6.
"""
# B = batch, G = KV heads, R = query heads that share one, T = tokens, m = features, D = width of values, C = tokens in a chunk.

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from effconvert.kernels.window import window_scores, window_values

CHUNK = 64


def linear_attention(query: Tensor, key: Tensor, value: Tensor, state: Tensor, fall: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Attend from each token to itself, to earlier tokens, and to a state that sums up those before the call.

    Args:
        query: features, [B, G, R, T, m].
        key: features, [B, G, R or 1, T, m].
        value: [B, G, T, D].
        state: S, [B, G, R or 1, m, D], float32.
        fall: log of the decay before each token, [B or 1, G, R or 1, T], at most 0; None: no decay.
        chunk: tokens in a chunk.

    Returns:
        [B, G, R, T, D] and the state after the last token. The state's R is that of the keys, or with a decay that of the queries.
    """
    outputs, value = [], value[:, :, None]
    for start in range(0, query.shape[-2], chunk):
        q, k, v = (rows[..., start : start + chunk, :] for rows in (query, key, value))
        if fall is None:
            outputs.append((q @ k.mT).tril() @ v + q @ state)
            state = state + k.mT @ v
            continue
        level = fall[..., start : start + chunk].cumsum(-1)[..., None]  # [B, G, R, C, 1], since the start of the chunk
        fade = (level - level.mT).clamp_max(0).exp()  # [B, G, R, C, C]
        outputs.append((q @ k.mT * fade).tril() @ v + q * level.exp() @ state)
        last = level[..., -1:, :]
        state = state * last.exp() + (k * (last - level).exp()).mT @ v
    return torch.cat(outputs, -2), state


class Window(NamedTuple):
    """The last tokens, to which softmax attends: K = width of queries and keys, P = tokens before the first query, at most W."""

    query: Tensor  # [B, G, R, T, K]
    key: Tensor  # [B, G, P + T, K]
    live: Tensor  # which keys are not padding, [B, P + T]
    share: Tensor  # the weight of the window beside that of features, [G, R], float32
    size: int  # W, the query's own token included
    scaling: float  # of scores


def chunked_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, fall: Tensor | None = None, least: float | None = None, window: Window | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend by features, with a decay, a normaliser, and a window of softmax in that normaliser, each if it is given.

    With a window of W, w_tj = share exp(s_tj - max_j s_tj) for the W last live keys, with scores s, and fade_tj q_t k_j for those before:
    o_t = sum_j w_tj v_j / max(least, sum_j w_tj), or without the division if `least` is None.

    Args:
        query: features, [B, G, R, T, m].
        key: features, [B, G, T, m]; with a window those of the tokens that leave it, W before the queries', and zeros where that is none or padding.
        value: [B, G, P + T, D]; P is 0 without a window.
        state: S, [B, G, R or 1, m, D], float32; with a normaliser D + 1 columns, the last one its own.
        fall: log of the decay before each token, [B or 1, G, R or 1, T], at most 0.
        least: the least that the outputs are divided by.
        window: the last tokens.
        chunk: tokens in a chunk.

    Returns:
        [B, G, R, T, D], float32 (float64 for float64), and the state after the last token.
    """
    tokens, precise = query.shape[-2], torch.float64 if query.dtype == torch.float64 else torch.float32
    value = value.to(precise)
    if least is not None:
        value = functional.pad(value, (0, 1), value=1.0)  # the ones give the normaliser
    back = window.size + tokens - value.shape[-2] if window else 0  # without a state the sequence begins with the first token, not W before it
    old = functional.pad(value, (0, 0, back, 0))[..., :tokens, :] if window else value
    sums, state = linear_attention(query, key[:, :, None], old, state, fall, chunk)
    if window:
        scores, counted = window_scores(window.query, window.key, window.live, window.size)
        scores = (scores.to(precise) * window.scaling).masked_fill(~counted, torch.finfo(precise).min)
        highest = scores.amax(-1, keepdim=True)
        sums = sums + window.share[..., None, None] * window_values((scores - highest).exp() * counted, value)
    if least is None:
        return sums, state
    return sums[..., :-1] / sums[..., -1:].clamp_min(least), state
