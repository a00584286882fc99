"""The gated delta rule: S_t = w_t S_(t-1) + b_t (a_t S_(t-1) + v_t), o_t = q_t S_t, with a decay w_t and a second key in place of b_t v_t if there is one.

A state S [D, D'] maps keys to values. What it holds for the key a_t is read, and comes back in the direction b_t with a new value: with a_t = -beta w_t k_t,
b_t = k_t and beta v_t for v_t the old value of k_t is replaced by v_t, by a share of beta. Inside a chunk all that is read depends on what was written
before by a triangular system (the WY form); chunks follow each other. One token makes it the recurrent form.
Yang et al. 2024, arXiv 2406.06484, and with a decay arXiv 2412.06464; with a decay for each channel and a second key Peng et al. 2025, arXiv 2503.14456.
"""
# B = batch, G = KV heads, R = query heads that share one, T = tokens, D = width of keys, D' = width of values, C = tokens in a chunk.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64


def delta_rule(
    query: Tensor, read: Tensor, write: Tensor, value: Tensor, fall: Tensor, state: Tensor, key: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Go through tokens with a state, and read it after each.

    Args:
        query: q, [B, G, R, T, D].
        read: a, [B, G, T, D].
        write: b, [B, G, T, D].
        value: v, [B, G, T, D'].
        fall: log w, at most 0: one number a token [B, G, T, 1], or one a channel [B, G, T, D], then at least -1.3: float32 holds exp of the sum over a chunk.
        state: S before the first token, [B, G, D, D'].
        key: where v is written, in place of b, [B, G, T, D].
        chunk: tokens in a chunk.

    Returns:
        [B, G, R, T, D'] and the state after the last token.
    """
    import torch

    outputs = []
    with torch.autocast(query.device.type, enabled=False):  # sums stay float32
        for start in range(0, query.shape[-2], chunk):
            q, a, b, v, step = (rows[..., start : start + chunk, :] for rows in (query, read, write, value, fall))
            k = None if key is None else key[..., start : start + chunk, :]
            level = step.cumsum(-2)  # the log of all decays since the start of the chunk, [B, G, C, 1 or D]
            before, last = level - step, level[..., -1:, :]
            given = v if k is None else _products(a, k, before, level).tril(-1) @ v
            depends = -_products(a, b, before, level)  # [B, G, C, C], of which the solver takes what is below the diagonal, and ones on it
            new = torch.linalg.solve_triangular(depends, (a * before.exp()) @ state + given, upper=False, unitriangular=True)  # [B, G, C, D']
            each = level[:, :, None]
            out = (q * each.exp()) @ state[:, :, None] + _products(q, b[:, :, None], each, each).tril() @ new[:, :, None]
            state = state * last.mT.exp() + (b * (last - level).exp()).mT @ new
            if k is not None:
                out = out + _products(q, k[:, :, None], each, each).tril() @ v[:, :, None]
                state = state + (k * (last - level).exp()).mT @ v
            outputs.append(out)
    return torch.cat(outputs, -2), state


def _products(left: Tensor, right: Tensor, reach: Tensor, level: Tensor) -> Tensor:
    """Return products of rows at different times, decayed by what lies between them, [..., C, C]; the upper half means nothing."""
    if level.shape[-1] == 1:
        return left @ right.mT * (reach - level.mT).clamp_max(0).exp()
    return (left * reach.exp()) @ (right * (-level).exp()).mT
