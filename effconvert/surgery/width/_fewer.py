"""Choose the neurons of an FFN or the heads of attention that stay, and fit their outputs: optimal brain surgeon over columns of the output projection."""
# M = hidden width, F = inputs of an output projection: neurons, or all numbers of all heads, S = those that stay.

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.surgery._ridge import HELD_OUT, TINY, Moments, ridge

DAMPING = 1e-3  # of the mean of the Gram matrix's diagonal
WORK = 2**30  # about as many numbers are updated while neurons go: of wide FFNs several go at a time
LEAST = 32  # steps in which they go


def fewer_neurons(layer: Layer, count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the `count` neurons that stay, [S], and their output projection, [M, S], fitted to the output of all."""
    fit, held_out = grams(layer, "down")
    kept = survivors(layer["down"].double(), fit + held_out, count)
    return kept, fitted(layer["down"].double(), kept, fit, held_out)


def fewer_heads(layer: Layer, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the query heads that stay, [heads], and their output projection, fitted to the output of all.

    As many stay of each KV head; with fewer KV heads, all query heads of those that stay.
    """
    config, (fit, held_out) = layer.config, grams(layer, "o")
    weights, shared = layer["o"].double(), config.heads // config.kv_heads
    whole = kv_heads < config.kv_heads  # whole KV heads go
    columns = torch.arange(config.heads * config.head_dim).unflatten(0, (config.kv_heads if whole else config.heads, -1))

    def removable(alive: Sequence[int]) -> list[int]:
        left = [sum(other // shared == head // shared for other in alive) for head in alive]
        return [head for head, number in zip(alive, left, strict=True) if whole or number > heads // kv_heads]

    kept = surviving_blocks(weights, fit + held_out, columns, kv_heads if whole else heads, removable)
    numbers = [head for block in kept for head in (range(block * shared, (block + 1) * shared) if whole else [block])]
    return torch.tensor(numbers), fitted(weights, columns[kept].flatten(), fit, held_out)


def grams(layer: Layer, part: str) -> tuple[Tensor, Tensor]:
    """Return sum w h h^T over tokens for the inputs h of a part, [F, F] each: of the windows to fit on, and of those held out.

    An error counts as a share of its token's energy in the residual stream, so that no few tokens decide.
    """
    assert layer.activations
    width, index = layer[part].shape[1], 0
    sums = [torch.zeros(width, width, dtype=torch.double) for _ in range(2)]
    for capture in layer.activations.capture(layer, (part,), until=part):
        hidden = capture.inputs[part].reshape(*capture.state.shape[:2], -1)  # [B, T, F]: OPT flattens B and T for its MLP
        energy = capture.state.square().mean(-1, keepdim=True).clamp_min(TINY)
        for window in hidden / energy.sqrt():
            index += 1
            sums[int(index % HELD_OUT == 0)] += (window.T @ window).double().cpu()
    return sums[0], sums[1]


def fitted(weights: Tensor, kept: Tensor, fit: Tensor, held_out: Tensor) -> Tensor:
    """Return the output projection of the inputs `kept`, [M, S], fitted to the output of all inputs by ridge regression."""
    gone = torch.ones(len(fit), dtype=torch.bool)
    gone[kept] = False
    moments = (Moments(), Moments())
    for sums, gram in zip(moments, (fit, held_out), strict=True):
        sums.gram, sums.cross = gram[kept][:, kept], weights[:, gone] @ gram[gone][:, kept]
    change = ridge(*moments) if fit.any() and held_out.any() else None
    rows = weights[:, kept] if change is None else weights[:, kept] + change
    return rows.float()


def survivors(weights: Tensor, gram: Tensor, count: int) -> Tensor:
    """Return the neurons that stay, ascending, [S].

    Removing neuron j, while the others make up for it, costs ||w_j||^2 / (G^-1)_jj, for its column w_j and the Gram matrix G of all neurons.

    Args:
        weights: output projection, [M, F] in float64.
        gram: sum of h h^T over tokens, for the neurons' values h, [F, F].
        count: how many stay.
    """
    inverse = _inverse(gram)
    weights, alive = weights.clone(), torch.arange(len(gram))
    size = -(-(len(gram) - count) // max(LEAST, WORK // len(gram) ** 2))
    while len(alive) > count:
        cost = weights.square().sum(0) / inverse.diagonal()
        last = cost.topk(min(size, len(alive) - count), largest=False).indices
        weights, inverse = _without(weights, inverse, last)
        stay = torch.ones(len(alive), dtype=torch.bool)
        stay[last] = False
        alive, weights, inverse = alive[stay], weights[:, stay], inverse[stay][:, stay]
    return alive


def surviving_blocks(
    weights: Tensor, gram: Tensor, columns: Tensor, count: int, removable: Callable[[Sequence[int]], Sequence[int]] = lambda alive: alive
) -> list[int]:
    """Return the blocks of inputs that stay, ascending; each time the one goes that costs least: tr(W_b (G^-1)_bb^-1 W_b^T).

    Args:
        weights: output projection, [M, F] in float64.
        gram: sum of h h^T over tokens, for its inputs h, [F, F].
        columns: the inputs of each block, [blocks, inputs].
        count: how many stay.
        removable: those of the remaining blocks of which one may go.
    """
    inverse, alive = _inverse(gram), list(range(len(columns)))
    while len(alive) > count:
        last = min(removable(alive), key=lambda block: _cost(weights[:, columns[block]], _square(inverse, columns[block])))
        weights, inverse = _without(weights, inverse, columns[last])
        alive.remove(last)
    return alive


def _cost(weights: Tensor, inverse: Tensor) -> float:
    """Return tr(W A^-1 W^T) for the weights W [M, S] of a block and A [S, S] of the inverse."""
    return float((torch.linalg.solve(inverse, weights.T) * weights.T).sum())


def _inverse(gram: Tensor) -> Tensor:
    scale = DAMPING * gram.diagonal().mean().clamp_min(TINY)
    inverse: Tensor = torch.linalg.inv(gram + scale * torch.eye(len(gram), dtype=gram.dtype))
    return inverse


def _without(weights: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the others, which make up for those that go, and the inverse of the Gram matrix without these; zeros stand for them."""
    rows = inverse[gone]
    block: Tensor = torch.linalg.inv(_square(inverse, gone))
    return weights - weights[:, gone] @ block @ rows, inverse - rows.T @ block @ rows


def _square(matrix: Tensor, chosen: Tensor) -> Tensor:
    square: Tensor = matrix[chosen][:, chosen]
    return square
