"""Choose the neurons of an FFN that stay, and fit their outputs: optimal brain surgeon over the columns of the output projection."""
# T = tokens of a window, M = hidden width, F = neurons, S = neurons that stay.

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.surgery._ridge import HELD_OUT, TINY, Moments, ridge

DAMPING = 1e-3  # of the mean of the Gram matrix's diagonal
WORK = 2**30  # about as many numbers are updated while neurons go: of wide FFNs several go at a time
LEAST = 32  # steps in which they go


def fewer(layer: Layer, count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the `count` neurons that stay, [S], and their output projection, [M, S], fitted to the output of all.

    An error counts as a share of its token's energy in the residual stream, so that no few tokens decide.
    """
    weights, (fit, held_out) = layer["down"].double(), _grams(layer)
    kept = survivors(weights, fit + held_out, count)
    gone = torch.ones(len(fit), dtype=torch.bool)
    gone[kept] = False
    moments = (Moments(), Moments())
    for sums, gram in zip(moments, (fit, held_out), strict=True):
        sums.gram, sums.cross = gram[kept][:, kept], weights[:, gone] @ gram[gone][:, kept]
    change = ridge(*moments) if fit.any() and held_out.any() else None
    down = weights[:, kept] if change is None else weights[:, kept] + change
    return kept, down.float()


def survivors(weights: Tensor, gram: Tensor, count: int) -> Tensor:
    """Return the neurons that stay, ascending, [S].

    Removing neuron j, while the others make up for it, costs ||w_j||^2 / (G^-1)_jj, for its column w_j and the Gram matrix G of all neurons.

    Args:
        weights: output projection, [M, F] in float64.
        gram: sum of h h^T over tokens, for the neurons' values h, [F, F].
        count: how many stay.
    """
    scale = DAMPING * gram.diagonal().mean().clamp_min(TINY)
    inverse = torch.linalg.inv(gram + scale * torch.eye(len(gram), dtype=gram.dtype))
    weights, alive = weights.clone(), torch.arange(len(gram))
    size = -(-(len(gram) - count) // max(LEAST, WORK // len(gram) ** 2))
    while len(alive) > count:
        cost = weights.square().sum(0) / inverse.diagonal()
        last = cost.topk(min(size, len(alive) - count), largest=False).indices
        rows, block = inverse[last], torch.linalg.inv(inverse[last][:, last])
        weights = weights - weights[:, last] @ block @ rows
        inverse = inverse - rows.T @ block @ rows
        stay = torch.ones(len(alive), dtype=torch.bool)
        stay[last] = False
        alive, weights, inverse = alive[stay], weights[:, stay], inverse[stay][:, stay]
    return alive


def _grams(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return sum w h h^T over tokens, [F, F] each: of the windows to fit on, and of those held out."""
    assert layer.activations
    grams, index = [torch.zeros(layer.config.ffn, layer.config.ffn, dtype=torch.double) for _ in range(2)], 0
    for capture in layer.activations.capture(layer, ("down",), until="down"):
        hidden = capture.inputs["down"].reshape(*capture.state.shape[:2], -1)  # [B, T, F]: OPT flattens B and T for its MLP
        energy = capture.state.square().mean(-1, keepdim=True).clamp_min(TINY)
        for window in hidden / energy.sqrt():
            index += 1
            grams[int(index % HELD_OUT == 0)] += (window.T @ window).double().cpu()
    return grams[0], grams[1]
