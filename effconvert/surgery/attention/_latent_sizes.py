"""Choose how many numbers of keys and values each layer keeps: those whose loss does least to the stream, over all layers together."""
# T = tokens, M = hidden width, P = pairs that RoPE turns, Hk = KV heads.

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from effconvert.surgery._surgery import ForwardProtocol
from effconvert.surgery.attention._heads import heads_of
from effconvert.surgery.attention._latents import directions

Size = tuple[int, int]  # pairs that RoPE turns, and other numbers


def choose(forward: ForwardProtocol, whole: Mapping[int, Size], numbers: int, least: int, tokens: int) -> list[Size]:
    """Return the size of each layer of `whole`, which has all it could have, with `numbers` of them in sum; `least` of both kinds stay everywhere.

    An error counts in shares of the stream's energy behind attention.
    """
    worth: list[tuple[float, int, int]] = []  # energy of a number's loss, its layer, and whether it is of a pair (0) or another (1)
    for index, pairs, others in losses(forward, whole, tokens):
        worth += [(float(value), index, 0) for value in (pairs.flatten() / 2).sort(descending=True).values]
        worth += [(float(value), index, 1) for value in others.sort(descending=True).values]
    sizes = {index: [min(least, most) for most in size] for index, size in whole.items()}
    seen = {index: [0, 0] for index in whole}
    left = numbers - sum(2 * pairs + rank for pairs, rank in sizes.values())
    for _, index, other in sorted(worth, reverse=True):
        seen[index][other] += 1
        cost = 1 if other else 2
        if seen[index][other] > least and cost <= left and sizes[index][other] < whole[index][other]:
            sizes[index][other] += 1
            left -= cost
    return [(pairs, rank) for pairs, rank in sizes.values()]


def by_frequency(forward: ForwardProtocol, pairs: int, tokens: int) -> list[int]:
    """Return how many of `pairs` directions of keys each frequency gets, the same in all layers: those that are worth most in sum over the layers."""
    total = sum(values for _, values, _ in losses(forward, range(forward.config.layers), tokens))  # [P, Hk]: of the best of each layer, the second best, ...
    assert isinstance(total, Tensor)
    rows = total.flatten().argsort(descending=True)[:pairs] // total.shape[1]
    return [int(count) for count in rows.bincount(minlength=len(total))]


def losses(forward: ForwardProtocol, layers: Collection[int], tokens: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield of each of these layers what it costs to leave out each direction of keys, [P, Hk], and of the others: in shares of the stream's energy."""
    states = forward.begin(tokens)
    with forward.bar(forward.config.layers) as advance:
        for index in range(forward.config.layers):
            if index in layers:
                layer = forward.parts(index)
                inputs = torch.cat([capture.inputs["q"].flatten(0, -2) for capture in forward.capture(index, states, "q")]).double().cpu()
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
                worth = directions(heads_of(layer, inputs.T @ inputs / len(inputs)))
                energy = torch.cat([state.flatten(0, -2) for state in states]).double().square().sum(1).log().mean().exp()  # a few huge tokens do not decide
                yield index, worth.pair_values / energy.cpu(), worth.other_values / energy.cpu()
            states = forward.layer(index, states)
            advance(1)
