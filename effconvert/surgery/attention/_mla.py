"""One head of latents as the parts of deepseek_v3's attention, and back."""
# M = hidden width, H = query heads, D = head width, N = pairs of the key that RoPE turns, R = numbers of values.

from collections.abc import Mapping

import torch
from torch import Tensor

from effconvert.surgery._rope import join_pairs, split_pairs
from effconvert.surgery.attention._latents import Latents

TINY = 1e-30  # least energy of values


def assigned(head: Latents, moment: Tensor, scale: float, constant: float) -> dict[str, Tensor]:
    """Return the parts in float32: q, kv_a with its bias and norm, and kv_b.

    The class normalises the R + 1 latents. The last one is a constant that is much larger than the others together, so it alone decides what all are
    divided by, and the norm's gains undo that. Behind the norm it is 1, and kv_b multiplies what a head's values have in common with it.
    `moment` are the second moments of the inputs, [M, M], and `scale` is the factor of scores that the queries are for.
    """
    pairs, width = len(head.pairs), len(head.c) + 1
    energy = torch.einsum("rm,mn,rn->", head.c, moment, head.c).clamp_min(TINY).sqrt()  # of all latents, which becomes 1
    c = torch.cat([head.c / energy, torch.zeros_like(head.c[:1])])
    c[-1, -1] = constant
    q = interleaved(head.q * (scale * (2 * pairs) ** 0.5), pairs)
    kv_a = torch.cat([c, interleaved(head.k, pairs)])
    gains = torch.full((width,), constant / width**0.5)
    gains[-1] = width**-0.5
    kv_b = torch.cat([head.values * energy, head.means[..., None]], -1)  # [H, D, R + 1]
    parts = {"q": q.flatten(0, 1)[:, :-1], "kv_a": kv_a[:, :-1], "kv_a.bias": kv_a[:, -1], "kv_a_norm": gains, "kv_b": kv_b.flatten(0, 1)}
    return {part: rows.float() for part, rows in parts.items()}


def interleaved(rows: Tensor, pairs: int) -> Tensor:
    """Put the two numbers of each pair side by side, in rows [..., 2N, M] that have all first ones before all second ones."""
    return join_pairs(*split_pairs(rows, 2 * pairs, "halves", dim=-2), "interleaved", dim=-2)


def halves(rows: Tensor, pairs: int) -> Tensor:
    """Undo `interleaved`."""
    return join_pairs(*split_pairs(rows, 2 * pairs, "interleaved", dim=-2), "halves", dim=-2)


def value_latents(parts: Mapping[str, Tensor]) -> Tensor:
    """Return what kv_b reads as functions of attention's input, which ends in 1, [R + 1, M + 1]: as if the norm did nothing but divide by the constant."""
    width = len(parts["kv_a_norm"])
    rows = torch.cat([parts["kv_a"], parts["kv_a.bias"][:, None]], 1)[:width]
    result: Tensor = rows * (parts["kv_a_norm"] * width**0.5 / parts["kv_a.bias"][width - 1])[:, None]
    return result
