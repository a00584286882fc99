"""What a mixer is called with: queries, keys and values of new tokens, and what is remembered of those before."""
# B = batch, H = query heads, Hk = KV heads, T = new tokens, D = head width, M = hidden width, P = tokens before them.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Slots = Mapping[str, tuple[tuple[int, ...], str]]  # name -> shape of one sequence, and the type: "model" (that of the keys), "float32", "bool", "int64"


class Memory(Protocol):
    """What is remembered of a sequence: `effconvert.modeling.state.State`.

    Attributes:
        held: name -> tensor [B, ...].
        seen: tokens that went by, padding among them.
    """

    held: dict[str, Tensor]
    seen: int


@dataclass(frozen=True)
class Rotation:
    """The RoPE of the new tokens, by the family's own function, so that queries can be put at another position."""

    apply: Callable[..., tuple[Tensor, Tensor]]  # apply_rotary_pos_emb(q, k, cos, sin)
    parts: tuple[Tensor, Tensor]  # cos and sin of each token, [B or 1, T, rotary]
    order: Tensor | None = None  # in which the tokens are, [B, T]; None: as they came

    @property
    def angles(self) -> Tensor:
        """Both, beside the tokens of the call: [B, 2, T, rotary]."""
        both = torch.stack([*self.parts], 1)
        return both if self.order is None else ordered(both.expand(len(self.order), -1, -1, -1), self.order)

    def moved(self, query: Tensor, to: Tensor) -> Tensor:
        """Return queries [B, H, T, D] as they would be with the angles `to` [B, 2, T, rotary]."""
        cos, sin = self.angles.expand(len(query), -1, -1, -1).unbind(1)
        size = cos.square() + sin.square()  # YaRN scales its angles
        plain = self.apply(query, query, cos / size, -sin / size)[0]
        return self.apply(plain, plain, to[:, 0], to[:, 1])[0]


@dataclass(frozen=True)
class Call:
    """One call of a mixer: T tokens, after those that its state has seen."""

    query: Tensor  # after RoPE and norms, [B, H, T, D]
    key: Tensor  # likewise, [B, Hk, T, D]
    value: Tensor  # [B, Hk, T, D]
    scaling: float  # of scores
    live: Tensor  # which tokens are no padding, bool [B, T]
    causal: bool  # whether a token may look at those before it only
    state: Memory | None  # None: there were no tokens before, and nothing has to be remembered
    hidden: Tensor  # what the attention's module was given, [B, T, M]
    rotation: Rotation | None
    softcap: float | None = None  # of scores: cap * tanh(score / cap)
    padded: bool = False  # whether there may be tokens that are not live
    pending: int = 0  # tokens that the state has counted already, and that come in calls after this one

    def part(self, start: int, stop: int) -> Call:
        """Return the call with some of the tokens alone."""
        rows = {name: getattr(self, name)[:, :, start:stop] for name in ("query", "key", "value")}
        turned, pending = None, self.pending + self.live[:, stop:].shape[1]
        if self.rotation:
            cos, sin = self.rotation.angles[:, :, start:stop].unbind(1)
            turned = Rotation(self.rotation.apply, (cos, sin))
        return replace(self, **rows, live=self.live[:, start:stop], hidden=self.hidden[:, start:stop], rotation=turned, pending=pending)

    @property
    def prescaled(self) -> Call:
        """The same scores by products that are no larger than they: what multiplies queries and keys in the model's type takes this.

        Else float16 would end at products of 65504, which models with large key biases go beyond before their scaling brings them back. The power of two in
        the scaling is multiplied into the queries, which rounds nothing in any type; from 1 to 2 are left, to multiply scores by in float32.
        """
        part, power = math.frexp(self.scaling)
        return replace(self, query=self.query * 2.0 ** (power - 1), scaling=2 * part)

    @property
    def max_tokens(self) -> int:
        """No fewer than the tokens so far, these among them: padding is counted."""
        return self.query.shape[-2] if self.state is None else self.state.seen - self.pending

    @property
    def grouped(self) -> Tensor:
        """The queries beside the KV head that they share: [B, Hk, R, T, D]."""
        grouped: Tensor = self.query.unflatten(1, (self.key.shape[1], -1))
        return grouped

    def read(self, name: str, slots: Slots) -> Tensor:
        """Return what the state holds under `name`, [B, ...]; zeros without a state."""
        if self.state is not None:
            return self.state.held[name]
        shape, kind = slots[name]
        dtype = self.key.dtype if kind == "model" else getattr(torch, kind)
        return torch.zeros(len(self.key), *shape, dtype=dtype, device=self.key.device)

    def write(self, **tensors: Tensor) -> None:
        """Remember tensors [B, ...] under their names, where there is a state: of the shapes of the slots, or larger ones where a technique grows."""
        if self.state is not None:
            for name, tensor in tensors.items():
                self.state.held[name] = tensor.to(self.state.held[name].dtype)

    def with_window(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values [B, Hk, P + T, D] and which of them are live [B, P + T], where P are the last `count` tokens before these (slots: `past`).

        Without a state P is no more than T: there is nothing further back.
        """
        if self.state is None:
            count = min(count, self.key.shape[-2])
        shape, like = (*self.key.shape[:2], count, self.key.shape[-1]), self.key
        if self.state is None:
            old_key = old_value = like.new_zeros(shape)
            old_live = torch.zeros(len(like), count, dtype=torch.bool, device=like.device)
        else:
            old_key, old_value, old_live = (self.state.held[name] for name in ("past_key", "past_value", "past_live"))
        key, value = torch.cat([old_key, self.key], 2), torch.cat([old_value, self.value], 2)
        live = torch.cat([old_live, self.live], 1)
        if self.padded:  # padding between those before and these must take no place among the last
            order = padding_first(live)
            key, value, live = ordered(key, order), ordered(value, order), live.gather(1, order)
        tokens = self.key.shape[-2]
        self.write(past_key=key[:, :, tokens:].clone(), past_value=value[:, :, tokens:].clone(), past_live=live[:, tokens:].clone())
        return key, value, live

    def positions(self) -> Tensor:
        """Number the live tokens from 0, [B, T], on from those before (slot `count`); padding gets the number of the live one before it."""
        before = self.read("count", {"count": ((), "int64")})
        ranks = before[:, None] + self.live.cumsum(1) - 1
        self.write(count=ranks[:, -1] + 1)
        return ranks

    def first_tokens(self, count: int, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, Hk, S, D] of the first `count` = S live tokens of each text, zeros where they have not come (slots: `sinks`)."""
        slots = sinks(count, self.key.shape[1], self.key.shape[-1])
        here = (ranks[:, None] == torch.arange(count, device=ranks.device)[:, None]) & self.live[:, None]  # [B, S, T]
        place = here[:, None].to(self.key.dtype)
        keys, values = (self.read(name, slots) + place @ rows for name, rows in zip(slots, (self.key, self.value), strict=True))
        self.write(**dict(zip(slots, (keys, values), strict=True)))
        return keys, values


def padding_first(live: Tensor) -> Tensor:
    """Return an order of tokens [B, T] in which padding comes first, and live tokens follow each other as they did."""
    return live.to(torch.uint8).argsort(dim=1, stable=True)


def ordered(rows: Tensor, order: Tensor) -> Tensor:
    """Put rows [B, ..., T, D] of tokens in order [B, T]."""
    places = order.reshape(len(order), *[1] * (rows.ndim - 3), -1, 1)
    return rows.gather(-2, places.expand(*rows.shape[:-2], -1, rows.shape[-1]))


def past(count: int, kv_heads: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the slots of `Call.with_window`."""
    rows = ((kv_heads, count, head_dim), "model")
    return {"past_key": rows, "past_value": rows, "past_live": ((count,), "bool")}


def sinks(count: int, kv_heads: int, head_dim: int) -> Slots:
    """Return the slots of `Call.first_tokens`."""
    return dict.fromkeys(("sink_key", "sink_value"), ((kv_heads, count, head_dim), "model"))
