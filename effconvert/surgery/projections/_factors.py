"""Replace a matrix by two thin ones so that its outputs on the calibration text change least: an activation-whitened SVD.

With S = E[x x^T] of the inputs, the best W' of rank K in E|W x - W' x|^2 projects the outputs onto the first K eigenvectors U of W S W^T: W' = U (U^T W).
SVD-LLM (Wang et al. 2024, arXiv 2403.07378) has the same optimum by a Cholesky factor of S.
"""
# O = outputs of a projection, I = its inputs, K = rank.

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.replaced import OWN
from effconvert.surgery.projections._parts import FACTORED

RIDGE = 1e-6  # of the mean of the moment's diagonal: in directions that the text does not cover, the weights themselves decide


def factors(weight: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best [O, K] and [K, I] in float64 for inputs with this second moment [I, I]; None: all inputs are equally likely."""
    weight = weight.double()
    symmetric, whitened = _whitened(weight, moment)
    first: Tensor = torch.linalg.eigh(symmetric)[1].flip(1)[:, :rank]
    basis: Tensor = first if whitened is None else torch.linalg.qr(whitened @ first)[0]
    return basis, basis.T @ weight


def losses(weight: Tensor, moment: Tensor | None) -> Tensor:
    """Return the energy of the outputs that the best factors lose at each rank, [min(O, I) + 1] from rank 0 to the full one."""
    energies: Tensor = torch.linalg.eigvalsh(_whitened(weight.double(), moment)[0]).clamp_min(0)  # from the least
    return torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)


def _whitened(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return A A^T, or A^T A and A where that is smaller; A = W C [O, I] with C C^T = S."""
    outputs, inputs = weight.shape
    unit = torch.eye(inputs, dtype=weight.dtype)
    damped = unit if moment is None else moment + RIDGE * moment.diagonal().mean() * unit
    if outputs <= inputs:
        return weight @ damped @ weight.T, None
    whitened = weight @ torch.linalg.cholesky(damped)
    return whitened.T @ whitened, whitened


def outputs_of(layer: Layer, part: str) -> tuple[str, ...]:
    """Return the parts of a layer that multiply last in a projection, and whose outputs are added: the projection, the first of two thin factors, or both."""
    return tuple(name for name in (part, factors_of(layer, part)[0]) if name in layer)


def factors_of(layer: Layer, part: str) -> tuple[str, str]:
    """Return the names of the two thin factors in place of a projection or beside it; empty without a technique that puts them there."""
    record = layer.config.replaced_at(layer.index, part)
    return (f"{part}.{OWN}left", f"{part}.{OWN}right") if record and record.technique in FACTORED else ("", "")


def fitted_of(layer: Layer, part: str) -> tuple[str, ...]:
    """Return the parts of a layer that `assign_product` changes; none where the projection is shared with other layers, and nothing is added to it."""
    factors = factors_of(layer, part)
    if factors[0] in layer:
        return factors
    return (part,) if part in layer and not layer.config.shares(layer.index, part) else ()


def product_of(layer: Layer, part: str) -> Tensor:
    """Return the matrix [O, I] of a projection, which may be replaced by two thin ones, or have two beside it."""
    left, right = factors_of(layer, part)
    if left not in layer:
        return layer[part]
    thin = layer[left] @ layer[right]
    return thin + layer[part] if part in layer else thin


def assign_product(layer: Layer, part: str, weight: Tensor, moment: Tensor) -> None:
    """Set a projection to `weight` [O, I]; if it has thin factors, set these to what of it is best for inputs with this second moment at their rank."""
    left, right = factors_of(layer, part)
    if left not in layer:
        layer[part] = weight.float().cpu()
        return
    rest = weight.cpu() - layer[part] if part in layer else weight.cpu()
    layer[left], layer[right] = (factor.float() for factor in factors(rest, moment.cpu(), layer[left].shape[1]))
