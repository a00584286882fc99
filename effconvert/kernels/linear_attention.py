"""Causal linear attention with an optional decay: S_t = exp(fall_t) S_(t-1) + k_t v_t, o_t = q_t S_t.

Three forms compute the same: *recurrent*, a token at a time with a state [m, D]; *parallel*, a masked matrix [T, T]; *chunked*, parallel inside chunks and
recurrent between them, which is what runs here for any number of tokens: of one token it is the recurrent form, of one chunk the parallel one.
Katharopoulos et al. 2020, arXiv 2006.16236, eq. 9-12; with a decay of each head Sun et al. 2023, arXiv 2307.08621, eq. 5-7; with one of each token Dao and
Gu 2024, arXiv 2405.21060.
"""
# B = batch, G = KV heads, R = query heads that share one, T = tokens, m = features, D = width of values, C = tokens in a chunk.

import torch
from torch import Tensor

CHUNK = 64


def linear_attention(query: Tensor, key: Tensor, value: Tensor, state: Tensor, fall: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Attend from each token to itself and those before it, and to a state that stands for all earlier ones.

    Args:
        query: features, [B, G, R, T, m].
        key: features, [B, G, R or 1, T, m].
        value: [B, G, T, D].
        state: S, [B, G, R or 1, m, D], float32.
        fall: log of what fades before each token, [B or 1, G, R or 1, T], at most 0; None: nothing fades.
        chunk: tokens at a time.

    Returns:
        [B, G, R, T, D] and the state after the last token. R of the state is that of the keys, or all query heads where they decay.
    """
    made, value = [], value[:, :, None]
    for start in range(0, query.shape[-2], chunk):
        q, k, v = (rows[..., start : start + chunk, :] for rows in (query, key, value))
        if fall is None:
            made.append((q @ k.mT).tril() @ v + q @ state)
            state = state + k.mT @ v
            continue
        level = fall[..., start : start + chunk].cumsum(-1)[..., None]  # [B, G, R, C, 1], since the chunk began
        fade = (level - level.mT).clamp_max(0).exp()  # [B, G, R, C, C]
        made.append((q @ k.mT * fade).tril() @ v + q * level.exp() @ state)
        last = level[..., -1:, :]
        state = state * last.exp() + (k * (last - level).exp()).mT @ v
    return torch.cat(made, -2), state
