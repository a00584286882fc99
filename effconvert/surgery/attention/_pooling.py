"""Pool several key and value heads into one, by what the heads compute on real text.

Queries and keys meet only in products, and so do values and outputs. So the basis of a head is free, and heads that compute the same can have
unrelated weights. Pooling first brings heads into a common basis, which is exact; only what they do not share is lost. All in float64, from second
moments of the projections' inputs.
"""
# M = hidden width (one more with a bias), H = query heads, Hk = KV heads, G = groups, S = Hk/G KV heads in a group, R = H/Hk,
# D = head width, P = rotary pairs, D' = D - 2P.

from dataclasses import replace

import torch
from torch import Tensor

from effconvert.surgery.attention._heads import Heads

JITTER = 1e-8  # of the mean of a matrix's diagonal, so that it has a Cholesky factor
SCORES = 0.1  # what an error of the scores counts beside one of the values: refit of the queries mends most of it
ROUNDS, SETTLED = 100, 1e-5  # most rounds of averaging heads and aligning them to the mean; the relative change that ends it


def pool(heads: Heads, groups: int, rule: str) -> Heads:
    """Pool Hk KV heads into G by a rule, and fit q and o to them."""
    if rule == "pca":
        v, o = pca_values(heads, groups, heads.v.shape[1])
        if heads.normed:
            aligned = align(heads, groups)
            return replace(heads, q=aligned.q, k=mean(aligned.k, groups), v=v, o=o)
        q, k = pca_keys(heads, groups)
        return replace(heads, q=q, k=k, v=v, o=o)
    if rule == "aligned":
        heads = align(heads, groups)
        return replace(heads, k=mean(heads.k, groups), v=mean(heads.v, groups))
    first, average = rule == "first", rule == "mean"
    assert first or average, rule
    k, v = (rows.unflatten(0, (groups, -1)) for rows in (heads.k, heads.v))
    return replace(heads, k=k[:, 0] if first else k.mean(1), v=v[:, 0] if first else v.mean(1))


def align(heads: Heads, groups: int) -> Heads:
    """Rotate the KV heads of each group into the basis in which they are most alike; exact. Values by Procrustes, keys by a phase for each rotary pair.

    Under QK-norm only the sign of a pair may change, because of the norm's gains.
    """
    v, o, k, q = heads.v.clone(), heads.o.clone(), heads.k.clone(), heads.q.clone()
    size = len(k) // groups
    for first in range(0, len(k), size):
        kv = slice(first, first + size)
        own = slice(first * heads.shared, (first + size) * heads.shared)
        rotations = _procrustes(heads.v[kv], heads.moment)  # [S, D, D]
        v[kv] = rotations @ heads.v[kv]
        o[:, own] = torch.einsum("hde,mhe->mhd", rotations.repeat_interleave(heads.shared, 0), heads.o[:, own])
        pairs, rest = heads.pairs(heads.k[kv])
        phases = _phases(pairs, heads.moment, heads.normed)  # [S, P]
        mixes = _signs(rest, heads.moment) if heads.normed else _procrustes(rest, heads.moment)  # [S, D', D']
        k[kv] = heads.rows(phases[..., None] * pairs, mixes @ rest)
        pairs, rest = heads.pairs(heads.q[own])
        query_phases, query_mixes = (tensor.repeat_interleave(heads.shared, 0) for tensor in (phases, mixes))
        q[own] = heads.rows(query_phases[..., None] * pairs, query_mixes @ rest)
    return replace(heads, q=q, k=k, v=v, o=o)


def mean(rows: Tensor, groups: int) -> Tensor:
    """Average the heads of each group, [Hk, D, M] -> [G, D, M], and scale the average to the mean Frobenius norm of its members."""
    by_group = rows.unflatten(0, (groups, -1))
    average = by_group.mean(1)
    size = torch.linalg.matrix_norm(by_group).mean(1) / torch.linalg.matrix_norm(average).clamp_min(1e-300)
    scaled: Tensor = average * size[:, None, None]
    return scaled


def pca_values(heads: Heads, groups: int, keep: int) -> tuple[Tensor, Tensor]:
    """Return v [G, keep, M] and o [M, H, keep]: the directions of a group's values that matter most to the output (PCA weighted by o).

    With `keep` = S*D nothing is lost; with `keep` = D the group becomes one head.
    """
    size = len(heads.k) // groups
    shared, outputs = [], []
    for v, o in zip(heads.v.split(size), heads.o.split(size * heads.shared, 1), strict=True):  # [S, D, M], [M, S*R, D]
        by_head = o.unflatten(1, (size, -1))  # [M, S, R, D]
        factors = cholesky(torch.einsum("msrd,msre->sde", by_head, by_head))  # [S, D, D]
        rows, back = _principal(v, factors, heads.moment, keep)
        shared.append(rows)
        outputs.append(torch.einsum("msrd,sde->msre", by_head, back).flatten(1, 2))
    return torch.stack(shared), torch.cat(outputs, 1)


def pca_keys(heads: Heads, groups: int) -> tuple[Tensor, Tensor]:
    """Return q [H, D, M] and k [G, D, M]: for each rotary pair the one complex direction of a group's keys that matters most to the scores.

    A pair is a complex number that RoPE rotates. A rotation and a gain of a key, undone in its queries, change no score. Other dimensions mix freely.
    """
    size = len(heads.k) // groups
    queries, keys = [], []
    for k, q in zip(heads.k.split(size), heads.q.unflatten(0, (len(heads.k), -1)).split(size), strict=True):  # [S, D, M], [S, R, D, M]
        (pairs, rest_k), (query_pairs, rest_q) = heads.pairs(k), heads.pairs(q)  # [S, P, M], [S, R, P, M]
        moment = heads.moment.to(pairs.dtype)
        energy = torch.einsum("srpm,mn,srpn->sp", query_pairs, moment, query_pairs.conj()).real.clamp_min(0)  # [S, P]
        gain = (energy / heads.shared).sqrt()
        gain = gain.clamp_min(1e-6 * gain.mean().clamp_min(1e-30)) if gain.numel() else gain  # any gain would do for queries that are zero
        weighted = pairs * gain[..., None]
        gram = torch.einsum("spm,mn,tpn->pst", weighted, moment, weighted.conj())
        top = torch.linalg.eigh(gram).eigenvectors[..., -1].T  # [S, P]
        pooled = torch.einsum("sp,spm->pm", top.conj(), weighted)
        rotated_queries = query_pairs * (top.conj() / gain)[:, None, :, None]
        if rest_k.shape[1]:
            factors = cholesky(torch.einsum("srdm,mn,sren->sde", rest_q, heads.moment, rest_q))
            rows, back = _principal(rest_k, factors, heads.moment, rest_k.shape[1])
            rest_q = torch.einsum("sde,srdm->srem", back, rest_q)
        else:
            rows = rest_k[0]
        keys.append(heads.rows(pooled, rows))
        queries.append(heads.rows(rotated_queries, rest_q).flatten(0, 1))
    return torch.cat(queries), torch.stack(keys)


def order(heads: Heads, groups: int) -> list[int]:
    """Order the KV heads so that heads which lose least by pooling are adjacent.

    Starts from the model's order; two heads of different groups swap as long as the sum of all losses within groups falls.
    """
    count, size = len(heads.k), len(heads.k) // groups
    cost = torch.zeros(count, count, dtype=torch.float64)
    for first in range(count):
        for second in range(first):
            cost[first, second] = cost[second, first] = _loss(heads, [first, second])
    arrangement = list(range(count))

    def within(head: int, group: int, without: int) -> float:
        return sum(float(cost[head, other]) for other in arrangement[group * size : (group + 1) * size] if other != without)

    better = groups > 1 and size > 1
    while better:
        better = False
        for index in range(count):
            for partner in range((index // size + 1) * size, count):
                first, second, mine, theirs = arrangement[index], arrangement[partner], index // size, partner // size
                change = within(second, mine, first) + within(first, theirs, second) - within(first, mine, first) - within(second, theirs, second)
                if change < -1e-9:
                    arrangement[index], arrangement[partner], better = second, first, True
    return [head for group in sorted(sorted(arrangement[at : at + size]) for at in range(0, count, size)) for head in group]


def _loss(heads: Heads, chosen: list[int]) -> float:
    """Return the share of the heads' weighted energy, of values and of keys, that is lost by pooling them."""
    some = heads.reordered(chosen)
    by_head = some.o.unflatten(1, (len(chosen), -1))
    factors = cholesky(torch.einsum("msrd,msre->sde", by_head, by_head))
    weighted = (factors.mT @ some.v).flatten(0, 1)
    values = torch.linalg.eigvalsh(weighted @ some.moment @ weighted.T)
    pairs, rest = some.pairs(some.k)
    gram = torch.einsum("spm,mn,tpn->pst", pairs, some.moment.to(pairs.dtype), pairs.conj())
    keys = torch.linalg.eigvalsh(gram)  # [P, S]
    flat = rest.flatten(0, 1)
    others = torch.linalg.eigvalsh(flat @ some.moment @ flat.T)
    lost = keys[..., :-1].sum() + others[: -rest.shape[1] or None].sum() * bool(rest.shape[1])
    width = some.v.shape[1]
    return float(values[:-width].sum() / values.sum().clamp_min(1e-300) + lost / (keys.sum() + others.sum()).clamp_min(1e-300))


def _principal(rows: Tensor, factors: Tensor, moment: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the `keep` principal rows of `rows` [S, D, M] weighted by `factors` [S, D, D], and the matrices that map them back to heads [S, D, keep]."""
    weighted = (factors.mT @ rows).flatten(0, 1)  # [S*D, M]
    top = torch.linalg.eigh(weighted @ moment @ weighted.T).eigenvectors[:, -keep:]  # [S*D, keep]
    back = torch.linalg.solve_triangular(factors.mT, top.unflatten(0, rows.shape[:2]), upper=True)
    return top.T @ weighted, back


def _procrustes(rows: Tensor, moment: Tensor) -> Tensor:
    """Return the rotations [S, D, D] that bring heads [S, D, M] nearest to their common mean."""
    common = rows[0]
    rotations = torch.eye(rows.shape[1], dtype=rows.dtype).expand(len(rows), -1, -1)
    for _ in range(ROUNDS if rows.shape[1] else 0):
        left, _, right = torch.linalg.svd(common @ moment @ rows.mT)
        rotations, before = left @ right, common
        common = (rotations @ rows).mean(0)
        if torch.linalg.norm(common - before) <= SETTLED * torch.linalg.norm(before):
            break
    return rotations


def _phases(pairs: Tensor, moment: Tensor, signs: bool) -> Tensor:
    """Return the unit complex numbers [S, P] that bring keys [S, P, M] nearest to their common mean; with `signs` only 1 or -1."""
    common, weight = pairs[0], moment.to(pairs.dtype)
    phases = torch.ones(pairs.shape[:2], dtype=pairs.dtype)
    for _ in range(ROUNDS if pairs.shape[1] else 0):
        inner = torch.einsum("pm,mn,spn->sp", common, weight, pairs.conj())
        phases = torch.where(inner.real < 0, -1, 1).to(pairs.dtype) if signs else torch.polar(torch.ones_like(inner.real), inner.angle())
        before, common = common, (phases[..., None] * pairs).mean(0)
        if torch.linalg.norm(common - before) <= SETTLED * torch.linalg.norm(before):
            break
    return phases


def _signs(rows: Tensor, moment: Tensor) -> Tensor:
    """Return diagonal matrices [S, D, D] of 1 and -1 that bring keys [S, D, M] nearest to their common mean."""
    return torch.diag_embed(_phases(rows.to(torch.complex128), moment, signs=True).real)


def cholesky(gram: Tensor) -> Tensor:
    """Return the lower factor of Gram matrices [S, D, D], made positive by a little on the diagonal."""
    jitter = JITTER * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    factor: Tensor = torch.linalg.cholesky(gram + jitter[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype))
    return factor
