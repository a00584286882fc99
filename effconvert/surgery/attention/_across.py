"""Pool the key and value heads of several layers into those of the first: what a later layer projects is predicted from the inputs of the first."""
# M = hidden width (one more with a bias), H = query heads, Hk = KV heads, R = H/Hk, D = head width, N = layers.

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.surgery.attention._heads import RIDGE, Heads, projections, read_heads, write_heads
from effconvert.surgery.attention._pooling import pool

Reader = dict[str, Tensor]  # the new queries and outputs of a layer that reads: part -> tensor


def pool_layers(layer: Layer, readers: Sequence[Layer]) -> dict[int, Reader]:
    """Give `layer` keys and values that suit its readers too, fit its queries and outputs to them, and return those of the readers.

    Heads of the same number are pooled across layers by weighted PCA, as gqa pools neighbours within one. Keys and values of a reader are first
    replaced by their linear prediction from the inputs of `layer`; its queries are written in the basis of these inputs, in which they have
    the energy that they have on their own, and are taken back afterwards.
    """
    heads = read_heads(layer)
    biases = [part for part in "qkv" if f"{part}.bias" in layer]
    root, roots, members = torch.linalg.cholesky(heads.moment), [], [heads]
    for reader in readers:
        own, both = _moments(layer, reader, len(heads.moment))
        roots.append(torch.linalg.cholesky(own))
        q, k, v, o = projections(reader.before, reader.config, biases)
        to_inputs = torch.linalg.solve_triangular(root.mT, roots[-1].mT, upper=True).mT  # R L^-1, for E[y y^T] = R R^T and E[x x^T] = L L^T
        predicted = torch.linalg.solve(heads.moment, both.mT).mT  # E[y x^T] E[x x^T]^-1, [M, M]
        members.append(replace(heads, q=q @ to_inputs, k=k @ predicted, v=v @ predicted, o=o))
    pooled = pool(_side_by_side(members), len(heads.k), "pca")
    queries = pooled.q.unflatten(0, (len(heads.k), len(members), -1))  # [Hk, N, R, D, M]
    outputs = pooled.o.unflatten(1, (len(heads.k), len(members), -1))  # [M, Hk, N, R, D]
    write_heads(replace(pooled, q=queries[:, 0].flatten(0, 1), o=outputs[:, :, 0].flatten(1, 2)), layer, None)
    result, width = {}, layer.config.hidden
    for number, (reader, own_root) in enumerate(zip(readers, roots, strict=True), 1):
        back = torch.linalg.solve_triangular(own_root.mT, root.mT, upper=True).mT  # L R^-1
        q = (queries[:, number].flatten(0, 1) @ back).flatten(0, 1)  # [H*D, M]
        result[reader.index] = {"q": q[:, :width].float(), "o": outputs[:, :, number].flatten(1).float()}
        if "q" in biases:
            result[reader.index]["q.bias"] = q[:, width].float()
    return result


def _side_by_side(members: Sequence[Heads]) -> Heads:
    """Join the heads of layers: those of one number are neighbours, with the query heads of each."""
    first = members[0]
    k, v = (torch.stack([getattr(heads, part) for heads in members], 1).flatten(0, 1) for part in "kv")
    q = torch.stack([heads.q.unflatten(0, (len(first.k), -1)) for heads in members], 1).flatten(0, 2)
    o = torch.stack([heads.o.unflatten(1, (len(first.k), -1)) for heads in members], 2).flatten(1, 3)
    return replace(first, q=q, k=k, v=v, o=o)


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
    own /= count
    return own + RIDGE * own.diagonal().mean() * torch.eye(width, dtype=own.dtype), both / count
