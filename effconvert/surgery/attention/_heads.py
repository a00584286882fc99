"""Read the attention heads of a layer in float64, with the moments of their inputs, and write them back."""
# M = hidden width (one more with a bias), H = query heads, Hk = KV heads, R = H/Hk, D = head width, P = rotary pairs, D' = D - 2P.

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Layer
from effconvert.surgery._ridge import damped, positive
from effconvert.surgery._rope import join_pairs, split_pairs


@dataclass(frozen=True)
class Heads:
    """The four projections of attention in float64, their biases as a last column of q, k and v, and the second moments of their inputs."""

    q: Tensor  # [H, D, M]
    k: Tensor  # [Hk, D, M]
    v: Tensor  # [Hk, D, M]
    o: Tensor  # [M, H, D]
    moment: Tensor  # E[x x^T], [M, M]; with biases x ends in 1
    rotary: int  # how many of a head's D dimensions RoPE rotates, in pairs
    layout: str  # which two make a pair: see `_rope`
    normed: bool  # queries and keys go through a norm, so of their bases only signs are free

    @property
    def shared(self) -> int:
        """Query heads for each KV head, R."""
        return len(self.q) // len(self.k)

    def reordered(self, chosen: Sequence[int] | None) -> "Heads":
        """Put KV heads, and the query heads of each, into the order `chosen`."""
        if chosen is None:
            return self
        kv, own = list(chosen), query_heads_of(chosen, self.shared)
        return replace(self, q=self.q[own], k=self.k[kv], v=self.v[kv], o=self.o[:, own])

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Take rows [..., D, M] split_pairs: what RoPE rotates, as complex numbers [..., P, M], and what it leaves alone [..., D', M]."""
        real, imaginary, rest = split_pairs(rows, self.rotary, self.layout, dim=-2)
        return torch.complex(real, imaginary), rest

    def rows(self, pairs: Tensor, rest: Tensor) -> Tensor:
        """Undo `pairs`."""
        return join_pairs(pairs.real, pairs.imag, rest, self.layout, dim=-2)


def read_heads(layer: Layer, ones: bool = False) -> Heads:
    """Return the heads of a layer, with the second moments of their inputs; with `ones` as if there were biases, zeros where there are none."""
    return heads_of(layer, second_moment(layer, "q", ones or any(f"{part}.bias" in layer for part in "qkv")))


def heads_of(layer: Layer, moment: Tensor) -> Heads:
    """Return the heads of a layer whose inputs have these second moments, [M, M] in float64; with biases one more, of ones, which may be there without."""
    config, biases = layer.config, [part for part in "qkv" if f"{part}.bias" in layer]
    return Heads(
        *projections(layer.__getitem__, config, biases, len(moment) > config.hidden),
        positive(damped(moment)),
        config.rotary_of(layer.index),
        config.family.rope,
        config.normed,
    )


def projections(read: Callable[[str], Tensor], config: Config, biases: Collection[str], ones: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and o of a layer as `Heads` has them; `biases` names the parts that have one, and with `ones` others get zeros."""

    def rows(part: str, count: int) -> Tensor:
        weight = read(part).double()
        if biases or ones:
            bias = read(f"{part}.bias").double() if part in biases else weight.new_zeros(len(weight))
            weight = torch.cat([weight, bias[:, None]], 1)
        heads: Tensor = weight.unflatten(0, (count, config.head_dim))
        return heads

    o = read("o").double().unflatten(1, (config.heads, config.head_dim))
    return rows("q", config.heads), rows("k", config.kv_heads), rows("v", config.kv_heads), o


def second_moment(layer: Layer, part: str, biased: bool) -> Tensor:
    """Return E[x x^T] of a part's inputs, [M, M] in float64; with a bias x ends in 1."""
    assert layer.activations
    return moment_of((capture.inputs[part] for capture in layer.activations.capture(layer, (part,), until=part)), biased)


def moment_of(batches: Iterable[Tensor], biased: bool = False) -> Tensor:
    """Return E[x x^T] of batches [..., M], [M, M] in float64; with a bias x ends in 1."""
    total, count = torch.zeros(0), 0
    for batch in batches:
        inputs = batch.flatten(0, -2)  # [B*T, M]
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1) if biased else inputs
        total = (inputs.T @ inputs).double().cpu() + (total if count else 0)
        count += len(inputs)
    return total / count


def write_heads(heads: Heads, layer: Layer, chosen: Sequence[int] | None) -> None:
    """Write the heads back to their layer; other parts with a number for each channel of a KV head are averaged over the pooled heads."""
    config, groups = layer.config, len(heads.k)
    for part, rows in (("q", heads.q), ("k", heads.k), ("v", heads.v)):
        flat, width = rows.flatten(0, 1), layer[part].shape[1]
        layer[part] = flat[:, :width].float()
        if f"{part}.bias" in layer:
            layer[f"{part}.bias"] = flat[:, width].float()
    layer["o"] = heads.o.flatten(1).float()
    order = list(range(config.kv_heads)) if chosen is None else list(chosen)
    for part in set(layer.per_kv_head) - {"k", "v", "k.bias", "v.bias"}:
        layer[part] = layer[part].unflatten(0, (config.kv_heads, -1))[order].unflatten(0, (groups, -1)).mean(1).flatten(0, 1)
    if chosen is not None and norms_heads(layer):
        own = query_heads_of(order, config.heads // config.kv_heads)
        layer["q_norm"] = layer["q_norm"].unflatten(0, (config.heads, -1))[own].flatten(0, 1)


def norms_heads(layer: Layer) -> bool:
    """Whether the norm of queries has gains for each head, which must move with their head."""
    return "q_norm" in layer and len(layer["q_norm"]) == layer.config.heads * layer.config.head_dim


def query_heads_of(kv_heads: Sequence[int], shared: int) -> list[int]:
    """Return the query heads of KV heads, `shared` each."""
    return [head * shared + index for head in kv_heads for index in range(shared)]
