"""Causal linear attention with an optional decay: o_t = sum over s <= t of gamma^(t - s) (q_t k_s) v_s.

Three forms compute the same: *recurrent*, a token at a time with a state [m, D]; *parallel*, a masked matrix [T, T]; *chunked*, parallel inside chunks and
recurrent between them, which is what runs here for any number of tokens: of one token it is the recurrent form, of one chunk the parallel one.
Katharopoulos et al. 2020, arXiv 2006.16236, eq. 9-12; with decay Sun et al. 2023, arXiv 2307.08621, eq. 5-7.
"""
# B = batch, G = KV heads, R = query heads that share one, T = tokens, m = features, D = width of values, C = tokens in a chunk.

import torch
from torch import Tensor

CHUNK = 64


def linear_attention(query: Tensor, key: Tensor, value: Tensor, state: Tensor, decay: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Attend from each token to itself and those before it, and to a state that stands for all earlier ones.

    Args:
        query: features, [B, G, R, T, m].
        key: features, [B, G, R or 1, T, m].
        value: [B, G, T, D].
        state: sum of gamma^age k v, [B, G, R or 1, m, D], float32.
        decay: gamma of each head, [G, R], in (0, 1]; None: nothing fades.
        chunk: tokens at a time.

    Returns:
        [B, G, R, T, D] and the state after the last token. R of the state is that of the keys, or all query heads where they decay.
    """
    made, place = [], torch.arange(chunk, device=query.device)
    value = value[:, :, None]
    for start in range(0, query.shape[-2], chunk):
        q, k, v = (rows[..., start : start + chunk, :] for rows in (query, key, value))
        tokens = q.shape[-2]
        age = place[:tokens, None] - place[:tokens]  # [C, C]
        scores = q @ k.mT
        if decay is None:
            made.append((scores * (age >= 0)) @ v + q @ state)
            state = state + k.mT @ v
            continue
        log = decay.log()[..., None, None]  # [G, R, 1, 1]
        fade = torch.where(age >= 0, (log * age.clamp_min(0)).exp(), 0)  # [G, R, C, C]
        old = (log * (place[:tokens, None] + 1)).exp()  # [G, R, C, 1], of what the state holds
        left = (log * (tokens - 1 - place[:tokens, None])).exp()  # of each key, when the chunk is over
        made.append((scores * fade) @ v + (q * old) @ state)
        state = state * (log * tokens).exp() + (k * left).mT @ v
    return torch.cat(made, -2), state
