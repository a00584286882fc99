"""Write all key and value heads of a layer as one head of fewer numbers, chosen by what each is worth on real text.

RoPE turns a pair of a key's numbers, which is one complex number. Keys of several heads that turn alike, those of one frequency, can be mixed freely as
long as their queries are: so each frequency has as many complex directions as there are KV heads, and those worth least are left out. Values, and
keys that RoPE does not turn, are mixed freely too. Queries and outputs of each head absorb the mixing, so with all directions nothing changes.
What all tokens have in common of values goes into the bias of the output, and of unturned keys nowhere: softmax ignores it.
All in float64, from second moments of the projections' inputs, which end in 1.
"""
# M = hidden width and one for the biases, H = query heads, Hk = KV heads, D = head width, P = rotary pairs, D' = D - 2P,
# N = turned pairs that are kept, R = other numbers that are kept.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effconvert.surgery._ridge import positive
from effconvert.surgery.attention._heads import Heads
from effconvert.surgery.attention._pooling import SCORES, cholesky

TINY = 1e-12  # least energy of queries


@dataclass(frozen=True)
class Latents:
    """One head of keys and values for all query heads."""

    q: Tensor  # [H, 2N, M]: first numbers of the pairs, then the second ones; [H, 2N + R, M] where keys have numbers that RoPE does not turn
    k: Tensor  # [2N, M]
    c: Tensor  # values, and what of the keys RoPE does not turn, [R, M]
    values: Tensor  # of each query head as functions of c, [H, D, R]
    means: Tensor  # what its values have in common, [H, D]
    o: Tensor  # [M - 1, H, R]
    bias: Tensor  # of the output, beside that of o, [M - 1]
    pairs: Tensor  # the rotary pair by whose angle each of the N pairs turns, [N]


@dataclass(frozen=True)
class Directions:
    """Directions of keys and values, with the energy of the error that leaving one out makes in the output."""

    pair_values: Tensor  # [P, Hk], ascending in each pair
    pair_vectors: Tensor  # [P, Hk, Hk]: of keys scaled by `gains`
    gains: Tensor  # root of what an error of a key's pair counts, [Hk, P]
    other_values: Tensor  # [Hk * (D + D')], ascending
    others: Tensor  # as functions of the inputs, [Hk * (D + D'), M - 1]


def directions(heads: Heads) -> Directions:
    """Find the directions of a layer's keys and values, by a small eigenproblem for each frequency and one for the rest."""
    count = len(heads.k)
    outputs = heads.o.unflatten(1, (count, -1))  # [M, Hk, R, D]
    value_roots = cholesky(torch.einsum("msrd,msre->sde", outputs, outputs))
    values = (heads.v @ heads.moment @ heads.v.mT).repeat_interleave(heads.shared, 0)  # [H, D, D]
    energy = torch.einsum("mhd,hde,mhe->h", heads.o, values, heads.o)  # of each head's output
    worth = SCORES * energy / heads.q.shape[1]  # what an error of its scores counts
    query_pairs, query_rest = heads.pairs(heads.q)  # [H, P, M], [H, D', M]
    key_pairs, key_rest = heads.pairs(heads.k)
    moment = heads.moment.to(key_pairs.dtype)
    wanted = torch.einsum("hpm,mn,hpn->hp", query_pairs, moment, query_pairs.conj()).real * worth[:, None] / 2
    gains = wanted.unflatten(0, (count, -1)).sum(1).sqrt().clamp_min(TINY)  # [Hk, P]
    scaled = key_pairs * gains[..., None]
    pair_values, pair_vectors = torch.linalg.eigh(torch.einsum("spm,mn,tpn->pst", scaled, moment, scaled.conj()))
    wanted_rest = torch.einsum("hdm,mn,hen->hde", query_rest, heads.moment, query_rest) * worth[:, None, None]
    key_roots = cholesky(wanted_rest.unflatten(0, (count, -1)).sum(1))
    rows = torch.cat([(value_roots.mT @ heads.v).flatten(0, 1), (key_roots.mT @ key_rest).flatten(0, 1)])[:, :-1]
    other_values, other_vectors = torch.linalg.eigh(rows @ covariance(heads)[0] @ rows.T)
    return Directions(pair_values.clamp_min(0), pair_vectors, gains, other_values.clamp_min(0), other_vectors.T @ rows)


def covariance(heads: Heads) -> tuple[Tensor, Tensor]:
    """Return the covariance of the projections' inputs, [M - 1, M - 1], and their mean, which ends in 1."""
    mean = heads.moment[:, -1] / heads.moment[-1, -1]
    return heads.moment[:-1, :-1] - torch.outer(mean[:-1], mean[:-1]), mean


def latents(heads: Heads, pairs: int | Sequence[int], rank: int) -> Latents:
    """Return the head of the `pairs` = N and `rank` = R directions that are worth most; where `pairs` has a number for each frequency, so many of each."""
    ranked, count = directions(heads), len(heads.k)
    best = _best(ranked.pair_values, pairs)  # by frequency
    pair, column = best // count, best % count
    vectors, gains = ranked.pair_vectors[pair, :, column].conj(), ranked.gains[:, pair].T  # [N, Hk]
    (key_pairs, key_rest), (query_pairs, query_rest) = heads.pairs(heads.k), heads.pairs(heads.q)
    keys = torch.einsum("ns,snm->nm", vectors * gains, key_pairs[:, pair])
    queries = (vectors / gains).T.repeat_interleave(heads.shared, 0)[..., None] * query_pairs[:, pair]  # [H, N, M]
    q = torch.cat([queries.real, queries.imag], 1)
    moment, mean = covariance(heads)
    others = ranked.others[len(ranked.others) - rank :].flip(0)  # [R, M - 1]
    back = _prediction(others, moment)  # [M - 1, R]
    values, means = (rows.repeat_interleave(heads.shared, 0) for rows in (heads.v[..., :-1] @ back, (heads.v @ mean)[..., None]))
    if query_rest.shape[1]:
        q = torch.cat([q, torch.einsum("hdr,hdm->hrm", (key_rest[..., :-1] @ back).repeat_interleave(heads.shared, 0), query_rest)], 1)
    c = torch.cat([others, -others @ mean[:-1, None]], 1)
    o, bias = torch.einsum("mhd,hdr->mhr", heads.o, values), torch.einsum("mhd,hdr->m", heads.o, means)
    return Latents(q, torch.cat([keys.real, keys.imag]), c, values, means[..., 0], o, bias, pair)


def _best(values: Tensor, pairs: int | Sequence[int]) -> Tensor:
    """Return where in `values` [P, Hk], flattened, the largest are: so many of all, or so many of each row."""
    if isinstance(pairs, int):
        return values.flatten().argsort(descending=True)[:pairs].sort().values
    count = values.shape[1]
    return torch.tensor([row * count + column for row, number in enumerate(pairs) for column in range(count - number, count)])


def _prediction(rows: Tensor, moment: Tensor) -> Tensor:
    """Return the best linear prediction of inputs [M - 1, R] from `rows` [R, M - 1] of them: S A^T (A S A^T)^-1."""
    root = torch.linalg.cholesky(positive(moment))
    basis, triangle = torch.linalg.qr((rows @ root).T)  # [M - 1, R], [R, R]
    result: Tensor = torch.linalg.solve_triangular(triangle.T, root @ basis, upper=False, left=False)
    return result


def assigned(head: Latents, bias: Tensor) -> dict[str, Tensor]:
    """Return the parameters of `narrow-kv` in float32; `bias` is that of o, [M - 1]."""
    result = {"o": head.o.flatten(1).float(), "o_bias": (head.bias + bias.double()).float()}
    for name, rows in (("q", head.q.flatten(0, 1)), ("kv", torch.cat([head.k, head.c]))):
        result[name], result[f"{name}_bias"] = rows[:, :-1].float(), rows[:, -1].float()
    return {**result, **({"pairs": head.pairs.float()} if len(head.pairs) else {})}
