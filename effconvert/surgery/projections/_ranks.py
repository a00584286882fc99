"""Choose ranks by what truncation loses on a text: the least sum of losses for a share of the parameters (water-filling).

The loss of a projection is the error in the residual stream behind its layer, in shares of each token's energy there. It is measured at one rank, by
running the layer with the truncated projection; for other ranks it is proportional to the energy of the outputs that they lose. An error counts by what
it does to the predictions: the divergence that a layer causes with all its projections truncated, for each share of error behind it.
"""
# O = outputs of a projection, I = its inputs, K = rank, T = tokens, M = hidden width.

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from effconvert.surgery._surgery import ForwardProtocol
from effconvert.surgery.attention._heads import moment_of
from effconvert.surgery.projections._factors import factors, losses
from effconvert.surgery.projections._parts import SAME_INPUT, equal_rank, thin_size

TOKENS = 4096  # of the calibration text, for the choice
STEPS = 100  # of the bisection
TINY, NEGLIGIBLE = 1e-100, 1e-12  # least divisor; share of a projection's energy that is rounding
LEAST = 20  # no rank is less than this part of the full one


def choose(forward: ForwardProtocol, projections: Sequence[tuple[int, str]], ratio: float, pivoted: bool) -> list[int]:
    """Return the rank of each projection (layer, part), 0 for one that stays whole, so that `ratio` of their parameters are left."""
    curves: dict[tuple[int, str], Tensor] = {}
    truncated: dict[int, list[Tensor]] = {}  # the first states behind each layer with all its projections truncated
    distances: dict[int, Tensor] = {}  # of these from the states
    states = forward.begin(TOKENS)
    layers = range(forward.config.layers)
    with forward.bar(2 * len(layers)) as advance:
        for index in layers:
            outputs, weights = forward.layer(index, states), {}
            for part, product, curve in _curves(forward, index, states, outputs, [part for layer, part in projections if layer == index], ratio):
                curves[index, part], weights[part] = curve, product
            if weights:
                truncated[index] = forward.layer(index, states[:1], weights=weights)
                distances[index] = _distance(truncated[index], outputs[:1])
            states = outputs
            advance(1)
        for index in truncated if forward.config.decoder and forward.config.predicts else ():
            last = truncated[index]
            for later in layers[index + 1 :]:
                last = forward.layer(later, last)
            effect = max(0.0, forward.divergence(states[:1], last)) / float(distances[index].clamp_min(TINY))  # rounded, it may be below 0
            curves |= {(layer, part): curve * effect for (layer, part), curve in curves.items() if layer == index}
            advance(1)
    return fill([curves[projection] for projection in projections], [forward.config.matrices[part] for _, part in projections], ratio, pivoted)


def _curves(
    forward: ForwardProtocol, index: int, states: Sequence[Tensor], outputs: Sequence[Tensor], parts: Sequence[str], ratio: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield parts of a layer with their truncated matrices, and with what they lose at each rank from 0 to the full one, [min(O, I) + 1]."""
    for group in SAME_INPUT:
        together = [part for part in group if part in parts]
        if not together:
            continue
        moment = moment_of(batch.inputs[together[0]] for batch in forward.capture(index, states, together[0]))
        for part in together:
            weight, rank = forward.weights(index, part), equal_rank(*forward.config.matrices[part], ratio, pivoted=False)
            left, right = factors(weight, moment, rank)
            product, curve = (left @ right).float(), losses(weight, moment)
            changed = forward.layer(index, states, weights={part: product})
            least = curve[0].clamp_min(TINY) * NEGLIGIBLE  # a matrix may have no more than this rank
            yield part, product, curve / curve[rank].clamp_min(least) * _distance(changed, outputs)


def _distance(changed: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Return the mean error of tokens [B, T, M], in shares of the energy of each."""
    errors = [(new - old).square().sum(-1) / old.square().sum(-1) for new, old in zip(changed, outputs, strict=True)]  # [B, T]
    return torch.cat([error.flatten() for error in errors]).mean().double().cpu()


def fill(curves: Sequence[Tensor], shapes: Sequence[tuple[int, int]], ratio: float, pivoted: bool) -> list[int]:
    """Return the ranks with the least sum of losses at a share of the parameters; 0 where a matrix [O, I] stays whole.

    Each matrix minimises its loss plus a price for each parameter; the price is the least that keeps the share.
    """
    whole = [out * inner for out, inner in shapes]
    sizes = [torch.tensor([thin_size(*shape, rank, pivoted) for rank in range(min(shape) + 1)]) for shape in shapes]

    def parameters(price: float) -> int:
        return sum(int(size[rank]) if rank else full for rank, size, full in zip(_at(price, curves, sizes, whole), sizes, whole, strict=True))

    return _at(least_price(parameters, ratio * sum(whole)), curves, sizes, whole)


def least_price(parameters: Callable[[float], int], budget: float) -> float:
    """Return the least price of a parameter at which there are no more `parameters` than the budget."""
    low, high = 1e-30, 1e30  # too many parameters at the first, few enough at the second
    for _ in range(STEPS):
        price = (low * high) ** 0.5
        low, high = (low, price) if parameters(price) <= budget else (price, high)
    return high


def _at(price: float, curves: Sequence[Tensor], sizes: Sequence[Tensor], whole: Sequence[int]) -> list[int]:
    """Return the best rank of each matrix; `sizes` has the parameters at each rank from 0 to the full one."""
    ranks: list[int] = []
    for curve, size, full in zip(curves, sizes, whole, strict=True):
        least, beyond = -(-(len(size) - 1) // LEAST), int((size < full).sum())  # from there on two factors are no smaller than the matrix
        costs = curve[least:beyond] + price * size[least:beyond]
        ranks.append(least + int(costs.argmin()) if len(costs) and costs.min() < price * full else 0)
    return ranks
