"""Write the weights of several layers as one matrix that they share and a low-rank difference for each.

The shared matrix is the least-squares compromise on the inputs of each layer, W = sum_l (W_l - D_l) S_l (sum_l S_l)^-1 with their second moments S_l; the
differences D_l are truncated SVDs of W_l - W, whitened by S_l. The two are fitted in turn. Bae et al. 2024, arXiv 2410.20672.
"""
# M = hidden width, F = neurons, O = outputs of a projection, I = its inputs, K = rank.

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.replaced import OWN
from effconvert.surgery._ridge import HELD_OUT, TINY, Moments, ridge
from effconvert.surgery.depth._fitted import inputs_of, rows_of, scale_of, with_parts
from effconvert.surgery.projections._factors import factors
from effconvert.surgery.projections._parts import SAME_INPUT

ROUNDS = 3  # of finding the shared matrix, and then the differences
RIDGE = 1e-4  # of the mean of the moments' diagonals
NEURONS = ("gate", "up", "gate.bias", "up.bias")  # parts with a row for each neuron of an FFN

Deltas = dict[str, Tensor]  # part of one layer -> tensor


def fit_deltas(layer: Layer, path: Sequence[Layer], group: Sequence[int], ranks: Mapping[str, int]) -> dict[int, Deltas]:
    """Give `layer` the matrices that a group shares, and return what each layer of it has of its own: factors, and biases of neurons in another order.

    Args:
        layer: the first of the group.
        path: all layers of the model from the first to the last of the group.
        group: numbers of the layers that share.
        ranks: rank of the difference of each projection: part -> K.
    """
    members = {member.index: member.unchanged for member in path if member.index in group}
    inputs = inputs_of(layer, path, group) if layer.activations else {}
    own: dict[int, Deltas] = {index: {} for index in group}
    trials = {index: _reordered(member, members[group[0]]) for index, member in members.items()}
    for index, trial in trials.items():
        own[index] |= {part: trial[part] for part in NEURONS if part.endswith(".bias") and part in trial}
    for parts in SAME_INPUT:
        present = [part for part in parts if part in ranks]
        if not present:
            continue
        weights = {index: {part: trial[part].double() for part in present} for index, trial in trials.items()}
        moments = dict.fromkeys(group, torch.zeros(0))
        for index, trial in trials.items():
            moments[index], change = (
                _look(trial, members[index], present[0], inputs[index]) if inputs else (torch.eye(weights[index][present[0]].shape[1]).double(), None)
            )
            if change is not None:
                weights[index][present[0]] = weights[index][present[0]] + change
        for part in present:
            shared, deltas = decompose([weights[index][part] for index in group], [moments[index] for index in group], ranks[part])
            layer[part] = shared.float()
            for index, (left, right) in zip(group, deltas, strict=True):
                own[index] |= {f"{part}.{OWN}left": left.float(), f"{part}.{OWN}right": right.float()}
                trials[index] = with_parts(trials[index], {part: (shared + left @ right).float()})
    return own


def decompose(weights: Sequence[Tensor], moments: Sequence[Tensor], rank: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return a matrix [O, I] and factors [O, K] and [K, I] for each of `weights`, so that their sums are near to these on inputs with these moments [I, I]."""
    damped = [moment + RIDGE * moment.diagonal().mean().clamp_min(TINY) * torch.eye(len(moment), dtype=moment.dtype) for moment in moments]
    total = torch.stack(damped).sum(0)
    deltas: list[tuple[Tensor, Tensor]] = []
    for _ in range(ROUNDS):
        rest = [weight - left @ right for weight, (left, right) in zip(weights, deltas, strict=True)] if deltas else weights
        cross = torch.stack([matrix @ moment for matrix, moment in zip(rest, damped, strict=True)]).sum(0)
        shared = torch.linalg.solve(total, cross, left=False)
        deltas = [factors(weight - shared, moment, rank) for weight, moment in zip(weights, damped, strict=True)]
    return shared, deltas


def _look(trial: Layer, member: Layer, part: str, states: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the second moments of a part's inputs with the differences before it, and for o and down the change that suits them to these inputs."""
    assert member.activations
    moments, window = (Moments(), Moments()), 0
    runs = [member.activations.capture(layer, (part,), part, states) for layer in (member, trial)]
    writes = part in ("o", "down")
    weight = trial[part]
    bias = member[f"{part}.bias"] if f"{part}.bias" in member else torch.zeros(len(weight))
    for whole, capture in zip(*runs, strict=True):
        rows, targets = rows_of(capture.inputs[part], capture.state), rows_of(whole.outputs[part], whole.state) - bias.to(whole.state)
        for state, inputs, target in zip(capture.state, rows, targets, strict=True):
            window += 1
            scale = scale_of(state) if writes else 1.0
            moments[int(window % HELD_OUT == 0)].add(inputs * scale, (target - inputs @ weight.to(inputs).T) * scale)
    gram = sum((moment.gram.cpu() for moment in moments if len(moment.gram)), torch.zeros(1, dtype=torch.double))
    change = ridge(*moments) if writes else None
    return gram, None if change is None else change.cpu()


def _reordered(member: Layer, first: Layer) -> Layer:
    """Return a layer with the neurons of its FFN in the order in which they are most like those of the first layer; exact."""
    from scipy.optimize import linear_sum_assignment

    if member.index == first.index or "down" not in member:
        return member
    alike = _unit(first["down"], 0).T @ _unit(member["down"], 0)  # [F, F]
    for part in ("gate", "up"):
        if part in member:
            alike = alike + _unit(first[part], 1) @ _unit(member[part], 1).T
    order = torch.from_numpy(linear_sum_assignment(-alike.numpy())[1])
    changes = {part: member[part][order] for part in NEURONS if part in member}
    return with_parts(member, {**changes, "down": member["down"][:, order]})


def _unit(matrix: Tensor, dim: int) -> Tensor:
    return torch.nn.functional.normalize(matrix, dim=dim)
