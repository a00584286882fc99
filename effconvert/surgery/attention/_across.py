"""Pool the key and value heads of several layers into those of the first: what a later layer projects is predicted from the inputs of the first."""
# M = hidden width (one more with a bias), H = query heads, Hk = KV heads, R = H/Hk, D = head width, P = rotary pairs, N = layers.

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.surgery._ridge import damped, positive
from effconvert.surgery.attention._heads import Heads, heads_of, projections, read_heads, write_heads
from effconvert.surgery.attention._pooling import SCORES, pool

Reader = dict[str, Tensor]  # the new queries and outputs of a layer that reads: part -> tensor


def pool_layers(layer: Layer, readers: Sequence[Layer]) -> dict[int, Reader]:
    """Give `layer` keys and values that suit its readers too, fit its queries and outputs to them, and return those of the readers.

    Heads of the same number are pooled across layers by weighted PCA, as gqa pools neighbours within one.
    """
    heads, biases = read_heads(layer), _biases(layer)
    members = [_as_member(heads, reader, biases, *_moments(layer, reader, len(heads.moment))) for reader in readers]
    pooled = pool(_side_by_side([heads, *(member.heads for member in members)]), len(heads.k), "pca")
    queries = pooled.q.unflatten(0, (len(heads.k), 1 + len(members), -1))  # [Hk, N, R, D, M]
    outputs = pooled.o.unflatten(1, (len(heads.k), 1 + len(members), -1))  # [M, Hk, N, R, D]
    write_heads(replace(pooled, q=queries[:, 0].flatten(0, 1), o=outputs[:, :, 0].flatten(1, 2)), layer, None)
    result, width = {}, layer.config.hidden
    for number, (reader, member) in enumerate(zip(readers, members, strict=True), 1):
        q = (queries[:, number].flatten(0, 1) @ member.back).flatten(0, 1)  # [H*D, M]
        result[reader.index] = {"q": q[:, :width].float(), "o": outputs[:, :, number].flatten(1).float()}
        if "q" in biases:
            result[reader.index]["q.bias"] = q[:, width].float()
    return result


def sharing_cost(layer: Layer, reader: Layer, x: Tensor, y: Tensor) -> float:
    """Return what `reader` and `layer` lose by keeping one set of keys and values, as the energy of the error in their outputs.

    Args:
        layer: the layer that would be read.
        reader: the later layer that would read it.
        x: inputs of the attention of `layer`, [tokens, M].
        y: inputs of that of `reader`, for the same tokens.
    """
    biases = _biases(layer)
    x, y = (torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if biases else rows for rows in (x.double(), y.double()))
    heads = heads_of(layer, x.T @ x / len(x))
    own, both = positive(damped(y.T @ y / len(y))), y.T @ x / len(x)
    member = _as_member(heads, reader, biases, own, both)
    unpredicted = own - both @ torch.linalg.solve(heads.moment, both.mT)  # what of y no x says, [M, M]
    lost = 0.0
    _, k, v, _ = projections(reader.__getitem__, reader.config, biases)
    for index in range(len(heads.k)):
        two = _side_by_side([_only(heads, index), _only(member.heads, index)])
        grams = torch.einsum("mhd,mhe->hde", two.o, two.o).unflatten(0, (2, -1)).sum(1)  # [2, D, D]
        roots = torch.linalg.cholesky(damped(grams))
        rows = (roots.mT @ two.v).flatten(0, 1)
        lost += float(torch.linalg.eigvalsh(rows @ heads.moment @ rows.T)[: -two.v.shape[1]].sum())
        lost += float(((roots[1].mT @ v[index]) @ unpredicted * (roots[1].mT @ v[index])).sum())
        energy = torch.einsum("mhd,hde,mhe->h", two.o, (two.v @ heads.moment @ two.v.mT).repeat_interleave(heads.shared, 0), two.o)  # of each head's output
        wanted = torch.einsum("hdm,mn,hdn->hd", two.q, heads.moment, two.q) * energy[:, None] / two.q.shape[1]  # how much a key's number matters
        weights = SCORES * wanted.unflatten(0, (2, -1)).sum(1)  # [2, D]
        pairs, rest = heads.pairs(two.k * weights.sqrt()[..., None])
        gram = torch.einsum("spm,mn,tpn->pst", pairs, heads.moment.to(pairs.dtype), pairs.conj())
        flat = rest.flatten(0, 1)
        lost += float(torch.linalg.eigvalsh(gram)[:, :-1].sum()) + float(torch.linalg.eigvalsh(flat @ heads.moment @ flat.T)[: -rest.shape[1] or None].sum())
        lost += float((k[index] @ unpredicted * k[index] * weights[1][:, None]).sum())
    return lost


@dataclass(frozen=True)
class _Member:
    """A reader's heads as functions of another layer's inputs."""

    heads: Heads
    back: Tensor  # [M, M]: queries times it are those of the reader's own inputs again


def _as_member(heads: Heads, reader: Layer, biases: Sequence[str], own: Tensor, both: Tensor) -> _Member:
    """Write a reader's heads as functions of the inputs x of `heads`, given E[y y^T] and E[y x^T] of its own inputs y.

    Keys and values become their linear prediction from x. Queries are written in a basis in which x gives them the energy that y gives them.
    """
    q, k, v, o = projections(reader.before, reader.config, biases)
    root, own_root = torch.linalg.cholesky(heads.moment), torch.linalg.cholesky(own)
    predicted = torch.linalg.solve(heads.moment, both.mT).mT  # E[y x^T] E[x x^T]^-1
    to_inputs = torch.linalg.solve_triangular(root.mT, own_root.mT, upper=True).mT  # R L^-1, for E[y y^T] = R R^T and E[x x^T] = L L^T
    back = torch.linalg.solve_triangular(own_root.mT, root.mT, upper=True).mT  # L R^-1
    return _Member(replace(heads, q=q @ to_inputs, k=k @ predicted, v=v @ predicted, o=o), back)


def _only(heads: Heads, index: int) -> Heads:
    """Return one KV head, with the query heads that share it."""
    return heads.reordered([index])


def _side_by_side(members: Sequence[Heads]) -> Heads:
    """Join the heads of layers: those of one number are neighbours, with the query heads of each."""
    first = members[0]
    k, v = (torch.stack([getattr(heads, part) for heads in members], 1).flatten(0, 1) for part in "kv")
    q = torch.stack([heads.q.unflatten(0, (len(first.k), -1)) for heads in members], 1).flatten(0, 2)
    o = torch.stack([heads.o.unflatten(1, (len(first.k), -1)) for heads in members], 2).flatten(1, 3)
    return replace(first, q=q, k=k, v=v, o=o)


def _biases(layer: Layer) -> list[str]:
    return [part for part in "qkv" if f"{part}.bias" in layer]


def _moments(layer: Layer, reader: Layer, width: int) -> tuple[Tensor, Tensor]:
    """Return E[y y^T] and E[y x^T] for the inputs x of a layer's attention and y of a reader's, as the original computes them from the same stream."""
    assert layer.activations
    own, both, count = torch.zeros(width, width, dtype=torch.double), torch.zeros(width, width, dtype=torch.double), 0
    between = range(layer.originals.start, reader.originals.start + 1)
    for first, later in zip(layer.activations.capture(layer, ("q",), until="q"), layer.activations.original(between, ("q",), until="q"), strict=True):
        x, y = (capture.inputs["q"].flatten(0, -2) for capture in (first, later))
        x, y = (torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if rows.shape[1] < width else rows for rows in (x, y))
        own += (y.T @ y).double().cpu()
        both += (y.T @ x).double().cpu()
        count += len(x)
    return positive(damped(own / count)), both / count
