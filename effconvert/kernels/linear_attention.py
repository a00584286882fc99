"""Causal linear attention with an optional decay: S_t = exp(fall_t) S_(t-1) + k_t v_t, o_t = q_t S_t.

Three forms give the same result: *recurrent*, a token at a time with a state [m, D]; *parallel*, with a masked matrix [T, T]; *chunked*, parallel inside
chunks and recurrent between them. This is the chunked form: one token makes it the recurrent form, one chunk the parallel one.
Katharopoulos et al. 2020, arXiv 2006.16236, eq. 9-12; with a decay for each head Sun et al. 2023, arXiv 2307.08621, eq. 5-7; with one for each token Dao
and Gu 2024, arXiv 2405.21060.
"""
# B = batch, G = KV heads, R = query heads that share one, T = tokens, m = features, D = width of values, C = tokens in a chunk.

import torch
from torch import Tensor

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
