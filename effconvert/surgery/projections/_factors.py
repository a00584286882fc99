"""Replace a matrix by two thin ones so that its outputs on the calibration text change least: an activation-whitened SVD.

With S = E[x x^T] of the inputs, the best W' of rank K in E|W x - W' x|^2 projects the outputs onto the first K eigenvectors U of W S W^T: W' = U (U^T W).
SVD-LLM (Wang et al. 2024, arXiv 2403.07378) has the same optimum by a Cholesky factor of S.
"""
# O = outputs of a projection, I = its inputs, K = rank.

from collections.abc import Mapping

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.replaced import OWN
from effconvert.surgery._ridge import damped, positive
from effconvert.surgery.projections import _pivoted
from effconvert.surgery.projections._parts import FACTORED


def factors(weight: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best [O, K] and [K, I] in float64 for inputs with this second moment [I, I]; None: all inputs are equally likely."""
    weight = weight.double()
    symmetric, whitened = _whitened(weight, moment)
    first: Tensor = torch.linalg.eigh(symmetric)[1].flip(1)[:, :rank]
    basis: Tensor = first if whitened is None else torch.linalg.qr(whitened @ first)[0]
    return basis, basis.T @ weight


def thin(weight: Tensor, moment: Tensor | None, rank: int, pivoted: bool) -> dict[str, Tensor]:
    """Return what is stored of these factors: `left` and `right` in float32, and in the pivoted form the order."""
    left, right = factors(weight, moment, rank)
    stored = _pivoted.pivoted(left, right, moment) if pivoted else {"left": left, "right": right}
    return {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}


def product(stored: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix [O, I] that stored factors stand for."""
    return _pivoted.product(stored) if _pivoted.ORDER in stored else stored["left"] @ stored["right"]


def losses(weight: Tensor, moment: Tensor | None) -> Tensor:
    """Return the energy of the outputs that the best factors lose at each rank, [min(O, I) + 1] from rank 0 to the full one."""
    energies: Tensor = torch.linalg.eigvalsh(_whitened(weight.double(), moment)[0]).clamp_min(0)  # from the least
    return torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)


def _whitened(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return A A^T, or A^T A and A where that is smaller; A = W C [O, I] with C C^T = S."""
    outputs, inputs = weight.shape
    second = torch.eye(inputs, dtype=weight.dtype) if moment is None else damped(moment)
    if outputs <= inputs:
        return weight @ second @ weight.T, None
    whitened = weight @ torch.linalg.cholesky(positive(second))
    return whitened.T @ whitened, whitened


def outputs_of(layer: Layer, part: str) -> tuple[str, ...]:
    """Return the parts of a layer that a projection's output is proportional to, or the sum of its outputs: the matrix, one of two thin factors, or both."""
    names = factors_of(layer, part)
    through = "right" if _pivoted.ORDER in names and not _pivoted.inputs_are_pivots(_stored(layer, part)) else "left"
    return tuple(name for name in (part, names.get(through)) if name and name in layer)


def factors_of(layer: Layer, part: str) -> dict[str, str]:
    """Return the parts of a layer that are the two thin factors in place of a projection or beside it, by their names; none without such a technique."""
    record = layer.config.replaced_at(layer.index, part)
    names = {name: f"{part}.{OWN}{name}" for name in ("left", "right", _pivoted.ORDER)} if record and record.technique in FACTORED else {}
    return {name: own for name, own in names.items() if own in layer}


def fitted_of(layer: Layer, part: str) -> tuple[str, ...]:
    """Return the parts of a layer that `assign_product` changes; none where the projection is shared with other layers, and nothing is added to it."""
    if names := factors_of(layer, part):
        return tuple(names.values())
    return (part,) if part in layer and not layer.config.shares(layer.index, part) else ()


def product_of(layer: Layer, part: str) -> Tensor:
    """Return the matrix [O, I] of a projection, which may be replaced by two thin ones, or have two beside it."""
    stored = _stored(layer, part)
    if not stored:
        return layer[part]
    return product(stored) + layer[part] if part in layer else product(stored)


def assign_product(layer: Layer, part: str, weight: Tensor, moment: Tensor) -> None:
    """Set a projection to `weight` [O, I]; if it has thin factors, set these to what of it is best for inputs with this second moment at their rank."""
    names = factors_of(layer, part)
    if not names:
        layer[part] = weight.float().cpu()
        return
    rest = weight.cpu() - layer[part] if part in layer else weight.cpu()
    for name, value in thin(rest, moment.cpu(), len(layer[names["right"]]), _pivoted.ORDER in names).items():
        layer[names[name]] = value


def _stored(layer: Layer, part: str) -> dict[str, Tensor]:
    return {name: layer[own] for name, own in factors_of(layer, part).items()}
