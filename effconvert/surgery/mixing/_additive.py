"""Fit attention without queries: the log of a weight is a term of the key's token plus one of the two positions.

Both terms are those of least cross-entropy from a layer's own attention, for each head. That is convex in them, so L-BFGS finds them; each head has what was
best on texts that are held out.
"""
# B = texts of a batch, H = heads, T = tokens, Q = queries that are looked at, M = hidden width, W = window, S = distances: W, or 2 W - 1 to both sides.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from effconvert.checkpoint.layer import Layer
from effconvert.surgery._ridge import HELD_OUT, TINY

MOST = 1 << 24  # weights of attention that are looked at; queries are left out where there are more
DAMPING = 0.1  # of the inputs' second moment, in means of its diagonal: 1e-3 was worse on held-out texts
ROUNDS, STEPS = 16, 4  # most rounds of L-BFGS, steps in each
SETTLED, PATIENCE = 1e-3, 3  # the gain in nats a query and head that is worth another round, and how many may gain less
PSEUDO = 1e-6  # attention that each cell of a table is taken to have had, of one query
SHARES = (0.0, 0.25, 0.5, 1.0)  # of a cell's own term


@dataclass(frozen=True)
class Texts:
    """Texts of a length, and the attention of some of their tokens."""

    inputs: Tensor  # of the attention module, [B, T, M]
    weights: Tensor  # [B, H, Q, T]
    queries: Tensor  # which tokens, [Q]


@dataclass(frozen=True)
class Terms:
    """The terms of each head: a projection of the key's token, and one number for each distance."""

    key: Tensor  # [H, M]
    near: Tensor  # [H, S]; S is 0 where positions do not count
    causal: bool

    def bias(self, queries: Tensor, tokens: int) -> Tensor:
        """Return the term of positions for some queries [Q] and all keys: [H, Q, T]; 0 beyond the window."""
        count = self.near.shape[1]
        distance = queries[:, None] - torch.arange(tokens, device=queries.device) + (0 if self.causal else count // 2)
        padded = functional.pad(self.near, (0, 1))  # the last one is for all that is further away
        return padded[:, torch.where((distance >= 0) & (distance < count), distance, count)]

    def logarithms(self, inputs: Tensor, queries: Tensor, bias: Tensor) -> Tensor:
        """Return the logarithms of the weights that the terms give, [B, H, Q, T], with this `bias` [H, Q, T]."""
        scores = bias + (inputs @ self.key.T).mT[:, :, None]
        if self.causal:
            scores = scores.masked_fill(torch.arange(scores.shape[-1], device=queries.device) > queries[:, None], torch.finfo(scores.dtype).min)
        return scores.log_softmax(-1)


def look(layer: Layer) -> list[Texts]:
    """Run a layer on the calibration text, and return its attention: evenly spaced queries, as many as there is room for."""
    assert layer.activations
    stride = -(-layer.config.heads * layer.activations.scores // MOST)
    texts = []
    for number, (inputs, weights) in enumerate(_attention(layer)):
        first = number % min(stride, weights.shape[-1])  # short texts have one as well
        queries = torch.arange(first, weights.shape[-1], stride, device=inputs.device)
        texts.append(Texts(inputs, weights[:, :, first::stride].clone(), queries))
    return texts


def _attention(layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs of attention [B, T, M] and its weights [B, H, T, T] for each batch."""
    assert layer.activations
    for capture in layer.activations.capture(layer, ("q", "o"), until="o"):
        assert capture.weights is not None
        yield capture.inputs["q"].float(), capture.weights.float()


def split(texts: Sequence[Texts]) -> tuple[list[int], list[int]]:
    """Return which batches to fit and which to hold out: of each length the second, the tenth and so on; all are both where there are too few."""
    lengths = [text.weights.shape[-1] for text in texts]
    held_out = [number for length in dict.fromkeys(lengths) for number in [at for at, other in enumerate(lengths) if other == length][1::HELD_OUT]]
    every = list(range(len(texts)))
    return [number for number in every if number not in held_out], held_out or every


def fit_terms(texts: Sequence[Texts], start: Terms, cells: Tensor | None = None, keys: bool = True) -> Terms:
    """Fit the terms of each head from `start`, or with `keys` false those of positions alone; `cells` [H, T, T] is what pairs of positions have beside.

    Keys follow positions: together from zeros, keys would first be fitted to what positions explain. Inputs are whitened: a few steps would else see
    the largest directions alone.
    """
    change = Terms(torch.zeros_like(start.key), start.near.clone(), start.causal)  # of the key's term, for white inputs
    unknown = [tensor.requires_grad_() for tensor in ([change.key] if keys else []) + ([change.near] if change.near.numel() else [])]
    if not unknown:
        return start
    fit, held_out = split(texts)
    inputs = torch.cat([texts[number].inputs.flatten(0, 1) for number in fit]).double()
    moment = inputs.T @ inputs / len(inputs)
    values, vectors = torch.linalg.eigh(moment + DAMPING * moment.diagonal().mean().clamp_min(TINY) * torch.eye(len(moment)).to(moment))
    whitening = (vectors * values.rsqrt()).float()  # [M, M]
    white = [Texts(text.inputs @ whitening, text.weights, text.queries) for text in texts]
    optimizer = torch.optim.LBFGS(unknown, max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = _cross_entropy([white[number] for number in fit], change, cells).sum()
            loss.backward()
        return loss.item()

    with torch.no_grad():
        chosen = [white[number] for number in held_out]
        key, near, least, worse = change.key.clone(), change.near.clone(), _cross_entropy(chosen, change, cells), 0
        for _ in range(ROUNDS):
            optimizer.step(closure)
            now = _cross_entropy(chosen, change, cells)
            better = (now < least)[:, None]  # heads share no unknown, so each has its own best round
            gain = float((least - now).clamp_min(0).sum())
            key, near, least = torch.where(better, change.key, key), torch.where(better, change.near, near), torch.minimum(now, least)
            worse = worse + 1 if gain < SETTLED * len(key) else 0
            if worse == PATIENCE:
                break
    return Terms(key @ whitening.T, near, start.causal)


def _cross_entropy(texts: Sequence[Texts], terms: Terms, cells: Tensor | None) -> Tensor:
    """Return the cross-entropy of each head's terms from its attention, a query, [H]; `cells` [H, T, T] is added for pairs of positions."""
    total, count = torch.zeros(len(terms.key), device=terms.key.device), 0
    for text in texts:
        tokens = text.weights.shape[-1]
        bias = terms.bias(text.queries, tokens)
        if cells is not None:
            bias = bias + cells[:, text.queries, :tokens]
        total = total - (text.weights * terms.logarithms(text.inputs, text.queries, bias)).sum((0, 2, 3))
        count += len(text.weights) * len(text.queries)
    return total / count


def fit_cells(layer: Layer, texts: Sequence[Texts], terms: Terms, within: int | None) -> Tensor:
    """Return what pairs of positions have beside `terms`, [H, T, T] for the T tokens of the longest text: one step of iterative scaling.

    A cell gets the logarithm of the attention it has over what the terms give it, as much of that as is best for the head on texts that are held out.
    Cells further from the diagonal than `within` keep 0, and the others are counted from what those have together.
    """
    fit, held_out = split(texts)
    longest = max(text.weights.shape[-1] for text in texts)
    has = torch.full((len(terms.key), longest, longest), PSEUDO, device=terms.key.device)
    given = has.clone()
    for number, (inputs, weights) in enumerate(_attention(layer)):
        if number in fit:
            tokens = weights.shape[-1]
            every = torch.arange(tokens, device=weights.device)
            has[:, :tokens, :tokens] += weights.sum(0)
            given[:, :tokens, :tokens] += terms.logarithms(inputs, every, terms.bias(every, tokens)).exp().sum(0)
    cells = (has / given).log()
    if within is not None:
        every = torch.arange(longest, device=cells.device)
        beyond = (every[:, None] - every).abs() > within
        level = ((has * beyond).sum(-1) / (given * beyond).sum(-1).clamp_min(TINY)).clamp_min(PSEUDO).log()  # of what is beyond, as it is counted from there
        cells = (cells - level[..., None]).masked_fill(beyond, 0)
    chosen = [texts[number] for number in held_out]
    errors = torch.stack([_cross_entropy(chosen, terms, share * cells) for share in SHARES])
    return torch.tensor(SHARES, device=cells.device)[errors.argmin(0)][:, None, None] * cells
