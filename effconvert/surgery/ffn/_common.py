"""Make one FFN that several layers share: neurons of all of them are pooled, and a common output projection is fitted to what each layer's own FFN gives.

An error counts as a share of its token's energy in the residual stream, so that no few tokens decide.
"""
# B = texts, T = tokens, M = hidden width, F = neurons of a layer, C = pooled neurons, W = neurons of the shared FFN.

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.replaced import OWN
from effconvert.checkpoint.shared import SHARES
from effconvert.surgery._ridge import HELD_OUT, STRENGTHS, TINY, Moments, ridge
from effconvert.surgery.width._fewer import survivors

SPARE = 2048  # pooled neurons beyond those that stay; only these are compared with each other, as that takes memory by their square
ROUNDS = 3  # of fitting each layer's gains, then the projection that all share
FFN = SHARES["ffn"] or ()
INPUTS = ("gate", "gate.bias", "up", "up.bias")  # parts with a row for each neuron
GAIN, SHIFT = f"down.{OWN}gain", f"down.{OWN}shift"  # what a layer has of its own

Parts = dict[str, Tensor]  # part -> its tensor
Sums = tuple[Moments, Moments]  # of windows to fit on, and of those held out


@dataclass
class Shared:
    """The FFN that layers share, and what each of them has of its own."""

    parts: Parts
    own: dict[int, Parts] = field(default_factory=dict)  # layer -> gains of neurons and a shift of the output


def shared_ffn(between: Sequence[Layer], members: Sequence[int], width: int, after: Config, gains: bool) -> Shared:
    """Return the FFN of `width` neurons that the layers `members` share.

    Args:
        between: the layers from the first member to the last, which may have others among them.
        members: the numbers of the layers that share, ascending.
        width: neurons of the shared FFN, W.
        after: the config with the shared FFN.
        gains: whether each layer has gains and a shift.
    """
    rows, down = _pooled(between, members, width)
    columns, sums = down.shape[1], (Moments(), Moments())
    for layer, states in _stream(between):
        if layer.index in members:
            for held_out, values, output in _windows(layer, states, _values(layer, rows, states)):
                sums[held_out].add(values[:, :columns], output - values[:, :columns] @ down.T)
    kept, down = _thin(sums, down.double(), width, biased="down.bias" in between[0])
    shared = Shared({part: tensor[kept] for part, tensor in rows.items()} | _split(down, width))
    for _ in range(ROUNDS):
        down = _round(between, members, shared, down, after, gains)
    return shared


def _pooled(between: Sequence[Layer], members: Sequence[int], width: int) -> tuple[Parts, Tensor]:
    """Return the most valuable neurons of all members by part, and what each writes, on average over members: [M, C], with the bias as a last column.

    A neuron's value is the energy of what it adds to the output of its layer. Neurons with the same inputs are one.
    """
    copies: dict[bytes, list[tuple[int, int]]] = {}  # neuron, by its input weights -> where it is: member, number
    worth: dict[bytes, float] = {}
    for layer, states in _stream(between):
        if layer.index in members:
            energies = _energies(layer, states).tolist()
            for neuron, key in enumerate(_keys(layer)):
                copies.setdefault(key, []).append((layer.index, neuron))
                worth[key] = worth.get(key, 0.0) + energies[neuron]
    best = sorted(sorted(copies, key=lambda key: -worth[key])[: width + SPARE], key=lambda key: copies[key])
    first, count = between[0], max(len(best), width)  # rows of zeros where there are too few
    rows = {part: torch.zeros(count, *first.before(part).shape[1:]) for part in INPUTS if part in first}
    down = torch.zeros(first.config.hidden, count + ("down.bias" in first))
    for layer in between:
        places = [(column, neuron) for column, key in enumerate(best) for index, neuron in copies[key] if index == layer.index]
        if places:
            at, neurons = (torch.tensor(side) for side in zip(*places, strict=True))
            for part, tensor in rows.items():
                tensor[at] = layer.before(part)[neurons]
            down.index_add_(1, at, layer.before("down")[:, neurons] / len(members))
        if layer.index in members and "down.bias" in first:
            down[:, -1] += layer.before("down.bias") / len(members)
    return rows, down


def _energies(layer: Layer, states: Sequence[Tensor]) -> Tensor:
    """Return the energy that each neuron adds to its layer's output, [F]."""
    assert layer.activations
    total, lengths = torch.zeros(layer.config.ffn, dtype=torch.double), layer.before("down").double().square().sum(0)
    hidden = (_rows(capture.inputs["down"], capture.state) for capture in layer.activations.capture(_alone(layer), ("down",), "down", states))
    for _, values, _ in _windows(layer, states, hidden):
        total += values[:, :-1].square().sum(0).double().cpu()
    return total * lengths


def _keys(layer: Layer) -> Iterator[bytes]:
    """Yield a hash of each neuron's input weights."""
    rows = torch.cat([layer.before(part).reshape(layer.config.ffn, -1) for part in INPUTS if part in layer], 1).contiguous()
    for row in rows.numpy():
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _stream(between: Sequence[Layer]) -> Iterator[tuple[Layer, Sequence[Tensor]]]:
    """Yield each layer with its inputs, where every layer has its own FFN."""
    activations = between[0].activations
    assert activations
    states = activations.states
    for layer in between:
        yield layer, states
        if layer is not between[-1]:
            states = [capture.out for capture in activations.capture(_alone(layer), states=states)]


def _alone(layer: Layer) -> Layer:
    """Return a copy of a layer with its own FFN."""
    copy = layer.on_top(layer.index, layer.config)
    for part in list(layer):
        if part.removesuffix(".bias") in FFN:
            copy[part] = layer.before(part)
        elif part in (GAIN, SHIFT):
            del copy[part]
    return copy


def _values(layer: Layer, rows: Parts, states: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the values of pooled neurons in a layer for each batch, [B, T, C]. The layer's own class computes them, F at a time."""
    assert layer.activations
    count, size, runs = len(rows["up"]), layer.config.ffn, []
    for start in range(0, count, size):
        copy = _alone(layer)
        for part, tensor in rows.items():
            copy[part] = torch.zeros(size, *tensor.shape[1:])
            copy[part][: min(size, count - start)] = tensor[start : start + size]
        runs.append(layer.activations.capture(copy, ("down",), "down", states))
    for captures in zip(*runs, strict=True):
        yield torch.cat([_rows(capture.inputs["down"], capture.state) for capture in captures], -1)[..., :count]


def _windows(layer: Layer, states: Sequence[Tensor], hidden: Iterable[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield of each window 1 if it is held out, the values of neurons with a 1 at their end, and the output of the layer's own FFN.

    Both are divided by the root of the stream's energy at each token.

    Args:
        layer: the layer.
        states: its inputs, [B, T, M] for each batch.
        hidden: the values of neurons, [B, T, C] for each batch.
    """
    assert layer.activations
    index = 0
    for values, capture in zip(hidden, layer.activations.capture(_alone(layer), ("down",), "down", states), strict=True):
        scale = capture.state.square().mean(-1, keepdim=True).clamp_min(TINY).rsqrt()
        pairs = torch.cat([values * scale, scale], -1), _rows(capture.outputs["down"], capture.state) * scale
        for window, output in zip(*pairs, strict=True):
            index += 1
            yield int(index % HELD_OUT == 0), window, output


def _rows(tensor: Tensor, state: Tensor) -> Tensor:
    """Return a module's input or output, [B, T, ...]: OPT flattens B and T for its MLP."""
    return tensor.reshape(*state.shape[:2], -1)


def _thin(sums: Sums, down: Tensor, width: int, biased: bool) -> tuple[Tensor, Tensor]:
    """Return the numbers of the neurons that stay, [W], and the output projection fitted to them, [M, W].

    Neurons go one after the other, each time the one whose output the others can best make up for.

    Args:
        sums: of all pooled neurons, with residuals of `down`.
        down: what they write, [M, C].
        width: how many stay.
        biased: whether the projection has a bias, as a last column here and there.
    """
    count, gram, change = down.shape[1] - biased, sums[0].gram + sums[1].gram, ridge(*sums)
    fitted, kept = down if change is None else down + change, torch.arange(down.shape[1] - biased)
    if count > width:
        means = gram[:count, count:] @ gram[count:, :count] / gram[-1, -1] if biased else 0  # the bias makes up for them
        kept = survivors(fitted[:, :count], gram[:count, :count] - means, width)
    columns = torch.cat([kept, torch.tensor([count])]) if biased else kept
    start, fewer = fitted[:, columns], (Moments(), Moments())
    for some, pooled in zip(fewer, sums, strict=True):
        if len(pooled.gram):
            some.gram = pooled.gram[columns][:, columns]
            some.cross = pooled.cross[:, columns] + down @ pooled.gram[:, columns] - start @ some.gram
    change = ridge(*fewer)
    return kept, start if change is None else start + change


def _round(between: Sequence[Layer], members: Sequence[int], shared: Shared, down: Tensor, after: Config, gains: bool) -> Tensor:
    """Run the layers with the shared FFN one after the other; fit what each has of its own, and return the common projection fitted to all, [M, W].

    Each layer is fitted to what its own FFN gives for the inputs that the layers with the shared FFN below it leave.
    """
    activations, width, sums = between[0].activations, len(shared.parts["up"]), (Moments(), Moments())
    assert activations
    states, biased = activations.states, down.shape[1] > width
    for layer in between:
        trial = layer.on_top(layer.index, after if layer.index in members else layer.config)
        if layer.index in members:
            gain, shift = torch.ones(width), torch.zeros(len(down))
            _assign(trial, shared.parts, {GAIN: gain, SHIFT: shift} if gains else {})
            own = Moments(), Moments()
            hidden = (_rows(capture.inputs["down"], capture.state) for capture in activations.capture(trial, ("down",), "down", states))
            for held_out, values, output in _windows(layer, states, hidden):
                own[held_out].add(values, output)
            if gains:
                gain, shift = fit_own(own, down if biased else torch.nn.functional.pad(down, (0, 1)))
                shared.own[layer.index] = {GAIN: gain, SHIFT: shift}
                _assign(trial, {}, shared.own[layer.index])
            for total, moments in zip(sums, own, strict=True):
                _add(total, moments, gain.double(), shift.double(), down)
        states = [capture.out for capture in activations.capture(trial, states=states)]
    change = ridge(*sums)
    down = down if change is None else down + change
    shared.parts |= _split(down, width)
    return down


def _assign(layer: Layer, *groups: Parts) -> None:
    for parts in groups:
        for part, tensor in parts.items():
            layer[part] = tensor


def fit_own(sums: Sums, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gains g [W] and the shift b [M] with the least squared error of D (g * h) + b from a layer's own output, in float32.

    Args:
        sums: over tokens, of h ending in 1, and of the output.
        down: D with the bias as a last column, [M, W + 1].
    """
    width, (fit, held_out) = down.shape[1] - 1, (_normal_equations(moments, down) for moments in sums)
    scale = fit[0].diagonal().clamp_min(TINY).rsqrt()
    best, solution = 0.0, torch.zeros_like(scale)
    for strength in STRENGTHS:
        damped = fit[0] * scale * scale[:, None] + strength * torch.eye(len(scale), dtype=scale.dtype)
        candidate = scale * torch.linalg.solve(damped, scale * fit[1])
        if (gain := float(2 * candidate @ held_out[1] - candidate @ held_out[0] @ candidate)) > best:
            best, solution = gain, candidate
    return 1 + solution[:width].float(), solution[width:].float()


def _normal_equations(sums: Moments, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix and the right side of the equations for (g - 1, b), [W + M]."""
    outputs, width = len(down), down.shape[1] - 1
    if not len(sums.gram):
        return down.new_zeros(width + outputs, width + outputs), down.new_zeros(width + outputs)
    gram, residual, weights = sums.gram.cpu(), (sums.cross.cpu() - down @ sums.gram.cpu()), down[:, :width]
    both = weights * gram[:width, width]  # [M, W]
    count = gram[width, width] * torch.eye(outputs, dtype=gram.dtype)
    matrix = torch.cat([torch.cat([weights.T @ weights * gram[:width, :width], both.T], 1), torch.cat([both, count], 1)])
    return matrix, torch.cat([(weights * residual[:, :width]).sum(0), residual[:, width]])


def _add(total: Moments, sums: Moments, gain: Tensor, shift: Tensor, down: Tensor) -> None:
    """Add a layer's sums to those for the common projection: of its values times their gains, and of what `down` leaves of its output."""
    if not len(sums.gram):
        return
    columns = down.shape[1]
    factors = torch.cat([gain, gain.new_ones(1)])
    gram = (sums.gram.cpu() * factors * factors[:, None])[:columns, :columns]
    cross = ((sums.cross.cpu() - shift[:, None] * sums.gram[-1].cpu()) * factors)[:, :columns] - down @ gram
    total.gram, total.cross = (total.gram + gram, total.cross + cross) if len(total.gram) else (gram, cross)


def _split(down: Tensor, width: int) -> Parts:
    """Return the output projection and its bias, where there is one."""
    return {"down": down[:, :width].float()} | ({"down.bias": down[:, width].float()} if down.shape[1] > width else {})
