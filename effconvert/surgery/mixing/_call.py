"""The arguments of a mixer: queries, keys and values of new tokens, and the state of earlier ones."""
# B = batch, H = query heads, Hk = KV heads, T = new tokens, D = head width, M = hidden width, P = tokens before them.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from effconvert.kernels.choice import cannot, runs_triton

Slots = Mapping[str, tuple[tuple[int, ...], str]]  # name -> shape for one sequence, and dtype: "model" (that of the keys), "float32", "bool", "int64"


class Memory(Protocol):
    """The state of a sequence: `effconvert.modeling.state.State`.

    Attributes:
        tensors: name -> tensor [B, ...].
        tokens: number of tokens so far, padding included.
    """

    tensors: dict[str, Tensor]
    tokens: int


@dataclass(frozen=True)
class Rotation:
    """The RoPE of the new tokens, by the family's own function, so that queries can be moved to other positions."""

    apply: Callable[..., tuple[Tensor, Tensor]]  # apply_rotary_pos_emb(q, k, cos, sin)
    parts: tuple[Tensor, Tensor]  # cos and sin of each token, [B or 1, T, rotary]
    order: Tensor | None = None  # order of the tokens, [B, T]; None: as they came

    @property
    def angles(self) -> Tensor:
        """cos and sin in the order of the call's tokens: [B, 2, T, rotary]."""
        both = torch.stack([*self.parts], 1)
        return both if self.order is None else reorder(both.expand(len(self.order), -1, -1, -1), self.order)

    def undone(self, rows: Tensor) -> Tensor:
        """Return queries or keys [B, H, T, D] as they were before RoPE."""
        cos, sin = self.angles.expand(len(rows), -1, -1, -1).unbind(1)
        size = cos.square() + sin.square()  # YaRN scales its angles
        turned, still = rows.split([cos.shape[-1], rows.shape[-1] - cos.shape[-1]], -1)
        return torch.cat([self.apply(turned, turned, cos / size, -sin / size)[0], still], -1)

    def at_angles(self, query: Tensor, to: Tensor) -> Tensor:
        """Return queries [B, H, T, D] with the angles `to` [B, 2, T, rotary] in place of their own."""
        plain, still = self.undone(query).split([to.shape[-1], query.shape[-1] - to.shape[-1]], -1)
        return torch.cat([self.apply(plain, plain, to[:, 0], to[:, 1])[0], still], -1)


@dataclass(frozen=True)
class Call:
    """One call of a mixer with T new tokens."""

    query: Tensor  # after RoPE and norms, [B, H, T, D]
    key: Tensor  # after RoPE and norms, [B, Hk, T, D]
    value: Tensor  # [B, Hk, T, D]
    scaling: float  # of scores
    live: Tensor  # which tokens are not padding, bool [B, T]
    causal: bool  # whether a token sees only itself and earlier ones
    state: Memory | None  # None: no earlier tokens, and no cache
    hidden: Tensor  # input of the attention module, [B, T, M]
    rotation: Rotation | None
    softcap: float | None = None  # of scores: cap * tanh(score / cap)
    padded: bool = False  # whether there may be tokens that are not live
    pending: int = 0  # tokens that the state has counted already and that come in later calls
    kernels: str = "auto"  # whether operations run as kernels: auto, triton or reference

    def part(self, start: int, stop: int) -> Call:
        """Return the call for the tokens from `start` to `stop`."""
        rows = {name: getattr(self, name)[:, :, start:stop] for name in ("query", "key", "value")}
        rotation, pending = None, self.pending + self.live[:, stop:].shape[1]
        if self.rotation:
            cos, sin = self.rotation.angles[:, :, start:stop].unbind(1)
            rotation = Rotation(self.rotation.apply, (cos, sin))
        return replace(self, **rows, live=self.live[:, start:stop], hidden=self.hidden[:, start:stop], rotation=rotation, pending=pending)

    def to(self, dtype: torch.dtype) -> Call:
        """Return the call with numbers of another type; the state keeps its own."""
        rows = {name: getattr(self, name).to(dtype) for name in ("query", "key", "value", "hidden")}
        rotation = self.rotation
        if rotation:
            cos, sin = rotation.parts
            rotation = replace(rotation, parts=(cos.to(dtype), sin.to(dtype)))
        return replace(self, **rows, rotation=rotation)

    @property
    def prescaled(self) -> Call:
        """The same call with most of the scaling in the queries; use it where queries and keys are multiplied in the model's dtype.

        float16 overflows at 65504, and with large key biases products exceed that before they are scaled. The power of two in the scaling moves into the
        queries, which rounds nothing in any dtype. A factor from 1 to 2 is left in `scaling`, for scores in float32.
        """
        part, power = math.frexp(self.scaling)
        return replace(self, query=self.query * 2.0 ** (power - 1), scaling=2 * part)

    @property
    def max_tokens(self) -> int:
        """An upper bound on the number of live tokens so far, these included: padding is counted."""
        return self.query.shape[-2] if self.state is None else self.state.tokens - self.pending

    @property
    def steps_by_kernel(self) -> bool:
        """Whether it decodes one token, for which no gradient is wanted, by the kernel of `decode_attention`."""
        step = self.query.shape[-2] == 1 and not (torch.is_grad_enabled() and self.query.requires_grad)
        if not step or not runs_triton(self.query.device, "decode_attention", self.kernels):
            return False
        from effconvert.kernels.decode_attention import uncovered  # imports triton

        if why := uncovered(self.query, self.key, self.value):
            cannot("decode_attention", why, self.kernels)
        return not why

    @property
    def grouped(self) -> Tensor:
        """The queries, grouped by the KV head that they share: [B, Hk, R, T, D]."""
        grouped: Tensor = self.query.unflatten(1, (self.key.shape[1], -1))
        return grouped

    def read(self, name: str, slots: Slots) -> Tensor:
        """Return the state's tensor `name`, [B, ...]; zeros without a state."""
        if self.state is not None:
            return self.state.tensors[name]
        shape, kind = slots[name]
        dtype = self.key.dtype if kind == "model" else getattr(torch, kind)
        return torch.zeros(len(self.key), *shape, dtype=dtype, device=self.key.device)

    def write(self, **tensors: Tensor) -> None:
        """Store tensors [B, ...] in the state, if there is one: with the shapes of the slots, or larger ones where a technique's cache grows."""
        if self.state is not None:
            for name, tensor in tensors.items():
                self.state.tensors[name] = tensor.to(self.state.tensors[name].dtype)

    def with_window(self, count: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values [B, Hk, P + T, D] and which are live [B, P + T]; P are the last `count` earlier tokens, or all if it is None (slots: `past`).

        Without a state P is at most T, as there are no earlier tokens.
        """
        tokens, rows = self.key.shape[-2], (self.key, self.value)
        if self.state is None:
            count = min(count or 0, tokens)
            old_key, old_value = (each.new_zeros(*each.shape[:2], count, each.shape[-1]) for each in rows)
            old_live = torch.zeros(len(self.key), count, dtype=torch.bool, device=self.key.device)
        else:
            old_key, old_value, old_live = (self.state.tensors[name] for name in ("past_key", "past_value", "past_live"))
        key, value = torch.cat([old_key, self.key], 2), torch.cat([old_value, self.value], 2)
        live = torch.cat([old_live, self.live], 1)
        if self.padded:  # padding between earlier and new tokens must not take up places in the window
            order = padding_first(live)
            key, value, live = reorder(key, order), reorder(value, order), live.gather(1, order)
        drop = 0 if count is None else tokens
        self.write(past_key=key[:, :, drop:].clone(), past_value=value[:, :, drop:].clone(), past_live=live[:, drop:].clone())
        return key, value, live

    def positions(self) -> Tensor:
        """Number the live tokens of each text from 0, [B, T] (slot `count`); padding gets the number of the live token before it."""
        before = self.read("count", {"count": ((), "int64")})
        positions = before[:, None] + self.live.cumsum(1) - 1
        self.write(count=positions[:, -1] + 1)
        return positions

    def first_tokens(self, count: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, Hk, S, D] of the first `count` = S live tokens of each text, zeros for those to come (slots: `sinks`)."""
        slots = sinks(count, self.key.shape[1], self.key.shape[-1])
        is_first = (positions[:, None] == torch.arange(count, device=positions.device)[:, None]) & self.live[:, None]  # [B, S, T]
        selection = is_first[:, None].to(self.key.dtype)
        keys, values = (self.read(name, slots) + selection @ rows for name, rows in zip(slots, (self.key, self.value), strict=True))
        self.write(**dict(zip(slots, (keys, values), strict=True)))
        return keys, values


def padding_first(live: Tensor) -> Tensor:
    """Return an order of tokens [B, T] with padding first and live tokens in their order."""
    return live.to(torch.uint8).argsort(dim=1, stable=True)


def reorder(rows: Tensor, order: Tensor) -> Tensor:
    """Reorder rows [B, ..., T, D] of tokens by `order` [B, T]."""
    places = order.reshape(len(order), *[1] * (rows.ndim - 3), -1, 1)
    return rows.gather(-2, places.expand(*rows.shape[:-2], -1, rows.shape[-1]))


def extended(old: Tensor, new: Tensor, start: Tensor, begin: Tensor, count: int) -> Tensor:
    """Return the first `count` rows of each text's tensor [B, Hk, N, D]: `old` ones, and from row `begin` [B, 1] on those of `new`, whose first is row `start`.

    There are at least as many rows as old ones. A text that has fewer than others, as it has more padding, ends with rows that mean nothing.
    """
    if missing := count - old.shape[2]:
        old = torch.nn.functional.pad(old, (0, 0, 0, missing))
    row = torch.arange(count, device=old.device)
    place = row - start  # among the new ones, [B, count]
    is_new = (row >= begin) & (place >= 0) & (place < new.shape[2])
    chosen = new if new.shape[2] == 1 else reorder(new, place.clamp(0, new.shape[2] - 1))
    return torch.where(is_new[:, None, :, None], chosen, old)


def past(count: int, kv_heads: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the slots of `Call.with_window`."""
    rows = ((kv_heads, count, head_dim), "model")
    return {"past_key": rows, "past_value": rows, "past_live": ((count,), "bool")}


def sinks(count: int, kv_heads: int, head_dim: int) -> Slots:
    """Return the slots of `Call.first_tokens`."""
    return dict.fromkeys(("sink_key", "sink_value"), ((kv_heads, count, head_dim), "model"))
