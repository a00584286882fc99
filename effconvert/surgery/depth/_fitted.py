"""Fit one attention and one FFN to what those of several layers compute, each at its own depth.

Heads and neurons of different layers have nothing to do with each other, so they are not averaged. All heads (or neurons) of the layers are candidates
at every depth. They go one after the other, those first whose output the others can best make up for (optimal brain surgeon, as in `narrow`), until
there are as many as in one layer. The output projection is then fitted to what each layer's own gave, over all depths. An error counts as a share of
its token's energy in the residual stream: a first token that is thousands of times larger than others would else decide alone.
"""
# B = windows run at a time, T = tokens, M = hidden width, Hk = KV heads, D = head width, F = neurons, N = layers that give candidates, S = candidates.

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.surgery._ridge import HELD_OUT, TINY, Moments, ridge
from effconvert.surgery.depth._normed import follow_normed, has_norm_behind
from effconvert.surgery.width._fewer import DAMPING, surviving_blocks, survivors

DONORS = 2  # most layers of a group whose heads and neurons are candidates
ROUNDS = 2  # how often outputs are fitted on the path through the shared layers
States = Sequence[Tensor]  # hidden states, [B, T, M] for each batch


def fit_layer(layer: Layer, path: Sequence[Layer], group: Sequence[int], norms: Sequence[str] = ()) -> None:
    """Give `layer` the parameters that the layers of a group share.

    Args:
        layer: the first of the group.
        path: all layers of the model from the first to the last of the group.
        group: numbers of the layers that share.
        norms: norms that they share too, with their biases.
    """
    inputs = inputs_of(layer, path, group)
    members = [member.unchanged for member in path if member.index in group]
    donors = [members[place * (len(members) - 1) // (DONORS - 1)] for place in range(DONORS)]
    _fit_attention(layer, members, donors, inputs)
    _fit_ffn(layer, members, donors, inputs)
    for part in norms:
        layer[part] = torch.stack([member[part] for member in members]).mean(0)
    shared = [part for part in layer if part in norms or part.removesuffix(".bias") in ("q", "k", "v", "o", "gate", "up", "down")]
    if len(path) == len(group):  # else layers that are not converted yet are on the path
        for _ in range(ROUNDS):
            for part in ("o", "down"):
                if has_norm_behind(layer, part):
                    follow_normed(layer, members, part, shared)
                else:
                    _follow(layer, members, part, shared)


def inputs_of(layer: Layer, path: Sequence[Layer], group: Sequence[int]) -> dict[int, States]:
    """Return what each layer of the group reads, when the layers as they were run from the current inputs."""
    assert layer.activations
    states: States = layer.activations.states
    inputs = {path[0].index: states}
    for before, after in pairwise(path):
        states = [capture.out for capture in layer.activations.capture(before.unchanged, states=states)]
        if after.index in group:
            inputs[after.index] = states
    return inputs


def _fit_attention(layer: Layer, members: Sequence[Layer], donors: Sequence[Layer], inputs: Mapping[int, States]) -> None:
    count = layer.config.kv_heads if _movable(layer) else 1
    gives = ("q", "k", "v", "q.bias", "k.bias", "v.bias")
    moments = _moments(layer, members, donors, inputs, gives, "o")
    size = len(moments[0].gram) // (count * len(donors))
    columns = torch.arange(len(moments[0].gram)).view(-1, size)
    blocks = surviving_blocks(*_solution(moments), columns, count)
    kept = columns[blocks].flatten()
    for part in gives:
        if part in layer:
            heads = [donor[part].unflatten(0, (count, -1)) for donor in donors]
            layer[part] = torch.cat([heads[block // count][block % count] for block in blocks])
    _fit_outputs(layer, members, "o", moments, kept)


def _fit_ffn(layer: Layer, members: Sequence[Layer], donors: Sequence[Layer], inputs: Mapping[int, States]) -> None:
    gives = ("gate", "up", "gate.bias", "up.bias")
    moments = _moments(layer, members, donors, inputs, gives, "down")
    kept = survivors(*_solution(moments), layer.config.ffn)
    for part in gives:
        if part in layer:
            layer[part] = torch.cat([donor[part] for donor in donors])[kept]
    _fit_outputs(layer, members, "down", moments, kept)


def _movable(layer: Layer) -> bool:
    """Whether heads can stand at another number: not where a norm has gains for each, or positions add to the scores of each in another way."""
    gains = [len(layer[part]) for part in ("q_norm", "k_norm") if part in layer]
    return not layer.config.family.own_attention and all(gain == layer.config.head_dim for gain in gains)


def _moments(
    layer: Layer, members: Sequence[Layer], donors: Sequence[Layer], inputs: Mapping[int, States], gives: Sequence[str], part: str
) -> tuple[Moments, Moments]:
    """Return the moments, to fit and held out, of the inputs of `part` side by side for the weights of each donor, and of its outputs in each member."""
    assert layer.activations
    moments = (Moments(), Moments())
    for member in members:
        states = inputs[member.index]
        trials = [with_parts(member, {name: donor[name] for name in gives if name in donor}) for donor in donors]
        bias = member[f"{part}.bias"] if f"{part}.bias" in member else torch.zeros(layer.config.hidden)
        runs = [layer.activations.capture(trial, (part,), part, states) for trial in (member, *trials)]
        window = 0
        for own, *others in zip(*runs, strict=True):
            features = torch.cat([rows_of(other.inputs[part], own.state) for other in others], -1)  # [B, T, S]
            targets = rows_of(own.outputs[part], own.state) - bias.to(own.state)
            for state, feature, target in zip(own.state, features, targets, strict=True):
                window += 1
                scale = scale_of(state)
                moments[int(window % HELD_OUT == 0)].add(feature * scale, target * scale)
    return moments


def _solution(moments: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Return the output projection of all candidates, [M, S], and their Gram matrix."""
    gram, cross = (sum(getattr(moment, name) for moment in moments if len(moment.gram)) for name in ("gram", "cross"))
    assert isinstance(gram, Tensor)
    assert isinstance(cross, Tensor)
    gram, cross = gram.cpu(), cross.cpu()
    damped = gram + DAMPING * gram.diagonal().mean().clamp_min(TINY) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T, gram


def _fit_outputs(layer: Layer, members: Sequence[Layer], part: str, moments: Sequence[Moments], kept: Tensor) -> None:
    """Fit an output projection to the candidates that stay; its bias is the mean of those that there were."""
    some = (Moments(), Moments())
    for one, whole in zip(some, moments, strict=True):
        if len(whole.gram):
            one.gram, one.cross = whole.gram.cpu()[kept][:, kept], whole.cross.cpu()[:, kept]
    weights = ridge(*some)
    layer[part] = torch.zeros_like(layer[part]) if weights is None else weights.float()
    if f"{part}.bias" in layer:
        layer[f"{part}.bias"] = torch.stack([member[f"{part}.bias"] for member in members]).mean(0)


def _follow(layer: Layer, members: Sequence[Layer], part: str, names: Sequence[str]) -> None:
    """Fit an output projection once more, on the path through the shared layers, to the stream that stands behind it in the original.

    What comes out of a norm is not linear in the weights before it, so where a norm other than a stream's LayerNorm follows, this leaves them as they are.
    """
    assert layer.activations
    if layer.config.norms_stream or {"o": "attn_post_norm", "down": "mlp_post_norm"}[part] in layer:
        return
    moments = (Moments(), Moments())
    states: States = layer.activations.states
    for member in members:
        shared = with_parts(member, {name: layer[name] for name in names})
        half = with_parts(shared, {name: torch.zeros_like(shared[name]) for name in ("down", "down.bias") if name in shared})
        step = 2 * member.originals[-1] + (1 if part == "o" else 2)
        window, after = 0, []
        streams = layer.activations.original_stream(step)
        runs = [layer.activations.capture(trial, (part,), states=states) for trial in (half, shared)]
        for state, target, middle, whole in zip(states, streams, *runs, strict=True):
            before, out = (state, middle.out) if part == "o" else (middle.out, whole.out)
            output = rows_of(whole.outputs[part], state)
            factor = float(((out - before) * output).sum() / output.square().sum().clamp_min(TINY)) or 1.0  # by which some families multiply it
            for one, feature, residual in zip(state, rows_of(whole.inputs[part], state), (target - out) / factor, strict=True):
                window += 1
                moments[int(window % HELD_OUT == 0)].add(feature * scale_of(one), residual * scale_of(one))
            after.append(whole.out)
        states = after
    if (change := ridge(*moments)) is not None:
        layer[part] = layer[part] + change.float().cpu()


def with_parts(layer: Layer, parts: Mapping[str, Tensor]) -> Layer:
    """Return a copy of a layer with other values of some parts."""
    trial = layer.on_top(layer.index, layer.config)
    for part, tensor in parts.items():
        trial[part] = tensor
    return trial


def rows_of(tensor: Tensor, state: Tensor) -> Tensor:
    """Return rows for each token, [B, T, ...]: OPT flattens B and T for its MLP."""
    return tensor.reshape(*state.shape[:2], -1)


def scale_of(state: Tensor) -> Tensor:
    """Return one over the root of each token's energy in the stream, [T, 1]."""
    return state.square().mean(-1, keepdim=True).clamp_min(TINY).rsqrt()
