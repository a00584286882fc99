"""Attend to near tokens and to some of the far ones (sparse attention)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, L = block, C = summaries of a block, S = sinks,
# G = groups of queries, Q = queries of a group: those of a block, or all of a call.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call, Slots
    from effconvert.surgery.mixing._softmax import Part, Text

SUMMARIES = 8  # the smallest number in the paper


class Sparse(Mixing):
    """Attend to near tokens and to some of the far ones (sparse attention).

    With blocks of L tokens a token sees: strided, the L - 1 tokens before it and every L-th one further back; fixed, its own block and the last C tokens
    of each earlier block; log, its own block and those 1, 2, 4, 8, ... blocks back; and always the first S tokens of the text (--sinks), which are in
    neither paper and needed here. Encoders see as much to the other side. With L near the root of the text's length, strided and fixed take O(T sqrt(T))
    time, log O(T log(T)). Only fixed makes the KV cache smaller: with the others later tokens may see any token, and writing one took
    longer than with softmax at all lengths measured. streaming with as many keys loses less. Exact where L is as long as the longest
    text. Layers with a sliding window stay as they are. Child et al. 2019, arXiv 1904.10509; Li et al. 2019, arXiv 1907.00235.

    \b
    Examples:
      effconvert sparse --pattern fixed --block 64 ./SmolLM2-135M -o ./fixed
      effconvert sparse --pattern log --block 16 --keep-softmax 0,-1 ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts(
        "models that attend", saves="time on long texts; KV cache with --pattern fixed", native="", exact="with --block as long as the text"
    )

    softcaps = True
    leaves_windows = True

    pattern: Literal["strided", "fixed", "log"] = Field(description="Which tokens are seen: strided, fixed (both Child et al.) or log (LogSparse).")
    block: int = Field(ge=1, description="Tokens of a block, or of a stride, L.", json_schema_extra={"metavar": "L"})
    summaries: int | None = Field(
        None,
        ge=1,
        description=f"Last tokens of each block that all later blocks see, C (--pattern fixed). Default: {SUMMARIES}, or as many as a shorter block has.",
        json_schema_extra={"metavar": "C"},
    )
    sinks: int = Field(4, ge=0, description="First tokens of the text that all tokens see, S.")

    @model_validator(mode="after")
    def _sound(self) -> Sparse:
        if self.summaries is not None and self.pattern != "fixed":
            raise ValueError(f"--summaries belongs to --pattern fixed; --pattern {self.pattern} has none")
        if self.summaries is not None and self.summaries > self.block:
            raise ValueError(f"--summaries {self.summaries} are more than the {self.block} tokens of a block; give at most {self.block}, which is exact")
        return self

    @property
    def summary(self) -> int:
        """C: how many of the last tokens of a block all later ones see."""
        if self.pattern != "fixed":
            return 0
        return min(SUMMARIES, self.block) if self.summaries is None else self.summaries

    def is_exact(self, config: Config) -> bool:
        """Where a block is as long as the longest text, or every token is in the pattern."""
        every = {"strided": self.block == 1, "fixed": self.summary == self.block, "log": False}[self.pattern]
        return every or (config.longest is not None and self.block >= config.longest)

    def notes(self, config: Config) -> str:
        """Say that the cache is as large as before, where it is."""
        keeps = config.decoder and not self._forgets
        return f"with --pattern {self.pattern} the KV cache keeps all tokens, since later ones may see any of them" if keeps else ""

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """None."""
        return {}

    @property
    def _forgets(self) -> bool:
        """Whether there are tokens that no later one sees."""
        return self.pattern == "fixed"

    def cache_slots(self, config: Config) -> Slots:
        """All tokens, which grow from none; of a pattern that forgets, the unfinished block, the sinks, and the summaries, which grow from none."""
        from effconvert.surgery.mixing._call import past, sinks

        if not config.decoder:
            return {}
        heads = config.kv_heads, config.head_dim
        rows = ((config.kv_heads, 0, config.head_dim), "model")
        kept: Slots = {**past(self.block - 1, *heads), **sinks(self.sinks, *heads)} if self._forgets else {}
        return {"count": ((), "int64"), **kept, "key": rows, "value": rows}

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes of the slots, and of the tokens kept of `context`: all, or C of each finished block."""
        if not config.decoder:
            return 0
        kept = context // self.block * self.summary if self._forgets else context
        return super().cache_bytes(config, itemsize) + kept * self._row_bytes(config, itemsize)

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return the bytes of a token's key and value, or its share of those of a block's summaries."""
        if not config.decoder:
            return 0.0
        return self._row_bytes(config, itemsize) * (self.summary / self.block if self._forgets else 1.0)

    def _row_bytes(self, config: Config, itemsize: int) -> int:
        return 2 * config.kv_heads * config.head_dim * itemsize

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        """Return which keys are near a query and seen, by positions; causality is not looked at here."""
        if self.pattern == "strided":
            return (query - key).abs() < self.block
        distance = (query // self.block - key // self.block).abs()
        power = (distance & (distance - 1)) == 0  # 0 counts as one: the own block
        return distance == 0 if self.pattern == "fixed" else power

    def far(self, query: Tensor, key: Tensor) -> Tensor:
        """Return which keys are seen from however far, by positions; some of these are near."""
        if self.pattern == "strided":
            return (query - key) % self.block == 0
        return key % self.block >= self.block - self.summary

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """One softmax over the near keys, the far ones that are not near, and the sinks that are neither; each kind is gathered by position."""
        from effconvert.surgery.mixing._call import reorder
        from effconvert.surgery.mixing._softmax import combine, live_last

        call, order = live_last(call.prescaled)
        positions = call.positions()  # [B, T]
        queries, text = self._queries(call, positions), self._text(call, positions)
        parts = [self._near(call, queries, text), *self._far(call, queries, text), *self._sinks(call, queries, text, positions)]
        out = combine(parts).flatten(3, 4).flatten(1, 2)  # [B, H, G Q, D]
        if queries.by_block:
            out = reorder(out, (positions - queries.place[:, 0, :1]).clamp_min(0))
        return out if order is None else reorder(out, order.argsort(1))

    def _queries(self, call: Call, positions: Tensor) -> Queries:
        """Group the queries: a block each, or all of a call that is no longer than one."""
        import torch

        from effconvert.surgery.mixing._call import reorder

        size, tokens, device = self.block, call.query.shape[-2], call.key.device
        count = positions[:, -1:] + 1  # [B, 1], live tokens so far
        first = (count - call.live.sum(1, keepdim=True)) // size  # [B, 1], the block of the first new token
        if tokens <= size:
            span = 1 if tokens == 1 or call.state is None else 2
            return Queries(call.grouped[:, :, :, None], positions[:, None], first, span, False)
        groups = -(-(tokens + (size - 1 if call.state else 0)) // size)
        place = size * first + torch.arange(groups * size, device=device)  # [B, G Q]
        rows = reorder(call.grouped, (place - count + tokens).clamp(0, tokens - 1))
        return Queries(rows.unflatten(3, (groups, size)), place.unflatten(1, (groups, size)), first + torch.arange(groups, device=device), 1, True)

    def _text(self, call: Call, positions: Tensor) -> Text:
        """Return the tokens that may be near: of the call, and with a state those in it, which is written."""
        from effconvert.surgery.mixing._call import extended
        from effconvert.surgery.mixing._softmax import Text

        count, tokens = positions[:, -1:] + 1, call.key.shape[2]
        if call.state is None:
            return Text(call.key, call.value, tokens - count)
        if self._forgets:
            key, value, _ = call.with_window(self.block - 1)
            return Text(key, value, key.shape[2] - count)
        start, begin = count - tokens, count - call.live.sum(1, keepdim=True)
        key, value = (extended(call.state.tensors[name], rows, start, begin, call.max_tokens) for name, rows in (("key", call.key), ("value", call.value)))
        call.write(key=key, value=value)
        return Text(key, value, count * 0)

    def _near(self, call: Call, queries: Queries, text: Text) -> Part:
        """Attend to the blocks that have near keys."""
        import torch

        from effconvert.surgery.mixing._softmax import attend

        device, blocks = call.key.device, -(-call.max_tokens // self.block)
        back = {"strided": {0, 1}, "fixed": {0}, "log": {0, *(1 << power for power in range(blocks.bit_length()) if 1 << power < blocks)}}[self.pattern]
        distances = back if call.causal else back | {-distance for distance in back}
        offsets = torch.tensor(sorted({of - distance for of in range(queries.span) for distance in distances}), device=device)
        at = ((queries.own[:, :, None] + offsets)[..., None] * self.block + torch.arange(self.block, device=device)).flatten(2)  # [B, G, n]
        return attend(call, queries.rows, *text.at(at), self._visible(call, queries.place, at, "near"))

    def _far(self, call: Call, queries: Queries, text: Text) -> Iterator[Part]:
        """Attend to keys a number of strides away, or to the summaries of blocks."""
        import torch

        from effconvert.surgery.mixing._call import extended
        from effconvert.surgery.mixing._softmax import attend

        device, size, blocks = call.key.device, self.block, -(-call.max_tokens // self.block)
        if self.pattern == "strided" and blocks > 1:  # queries and keys of one remainder are a group
            place = queries.place.transpose(1, 2)  # [B, Q, G]
            at = place[:, :, :1] % size + size * torch.arange(blocks, device=device)  # [B, Q, n]
            part = attend(call, queries.rows.transpose(3, 4), *text.at(at), self._visible(call, place, at, "far"))
            yield part.map(lambda each: each.transpose(3, 4))
        if self.pattern == "fixed":
            last = torch.arange(size - self.summary, size, device=device)
            at = (size * torch.arange(blocks, device=device)[:, None] + last).flatten()[None]  # [1, n]
            key, value = text.at(at)
            if call.state is not None:  # the text begins with the unfinished block; what is computed of the last one is never seen before it is finished
                own = queries.own[:, :1] + torch.arange(queries.own.shape[1] + queries.span - 1, device=device)
                new, start, kept = text.at((size * own[..., None] + last).flatten(1)), self.summary * own[:, :1], call.max_tokens // size * self.summary
                key, value = (extended(call.state.tensors[name], rows, start, start, kept) for name, rows in zip(("key", "value"), new, strict=True))
                call.write(key=key, value=value)
                at = at[:, :kept]
            if at.shape[1]:
                yield self._shared(call, queries, key, value, at, "far")

    def _sinks(self, call: Call, queries: Queries, text: Text, positions: Tensor) -> Iterator[Part]:
        """Attend to the first tokens where they are not in the pattern."""
        import torch

        if self.sinks:
            at = torch.arange(self.sinks, device=call.key.device)[None]
            key, value = call.first_tokens(self.sinks, positions) if self._forgets else text.at(at)
            yield self._shared(call, queries, key, value, at, "sink")

    def _shared(self, call: Call, queries: Queries, key: Tensor, value: Tensor, at: Tensor, kind: str) -> Part:
        """Attend to keys [B, Hk, n, D] at positions [1, n], the same for all queries."""
        from effconvert.surgery.mixing._softmax import attend

        visible = self._visible(call, queries.place.flatten(1)[:, None], at[:, None], kind)
        part = attend(call, queries.rows.flatten(3, 4)[:, :, :, None], key[:, :, None], value[:, :, None], visible)
        return part.map(lambda each: each[:, :, :, 0].unflatten(3, queries.place.shape[1:]))

    def _visible(self, call: Call, place: Tensor, at: Tensor, kind: str) -> Tensor:
        """Return which keys at positions `at` [B or 1, A, n] are of a kind for queries at `place` [B, A, Q]: [B, 1, A, 1, Q, n]."""
        query, key = place[..., None], at[:, :, None]
        near, far = self.near(query, key), self.far(query, key)
        visible = {"near": near, "far": far & ~near, "sink": ~(near | far)}[kind] & (key >= 0)
        end = query + 1 if call.causal else call.live.sum(1)[:, None, None, None]
        return (visible & (key < end))[:, None, :, None]


@dataclass(frozen=True)
class Queries:
    """The queries of a call in groups."""

    rows: Tensor  # [B, Hk, R, G, Q, D]
    place: Tensor  # their positions, [B, G, Q]
    own: Tensor  # the block of each group, [B, G]
    span: int  # blocks that a group may reach into, from its own on
    by_block: bool  # whether a group is a block; else there is one, the tokens as they came
