"""Attend within segments, with dilation in the long ones (LongNet)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, W = segment, r = dilation, S = sinks, G = groups of
# queries, Q = queries of a group, n = keys of a group.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from effconvert.options import Listed
from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call, Slots
    from effconvert.surgery.mixing._softmax import Part, Text

Numbers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), Listed]


class Longnet(Mixing):
    """Attend within segments, with dilation in the long ones (LongNet).

    The text is cut into segments of W tokens, once for each W,r of --segments and --dilations. In a segment each r-th token attends to each r-th one up
    to itself; the first of them differs by head (h mod r for head h), so that r heads have all tokens. One softmax covers all pairs, and a key counts once
    for each pair that has it. All tokens also see the first S of the text (--sinks), which are not in the paper and needed here. Encoders see both sides
    of a segment. Time is linear in the text's length, and the KV cache stops growing at the longest W. streaming with as many keys loses less. Exact with
    one pair: W as long as the longest text, r = 1. Layers with a sliding window stay as they are. Ding et al. 2023, arXiv 2307.02486.

    \b
    Examples:
      effconvert longnet --segments 64,256,512 --dilations 1,2,4 ./SmolLM2-135M -o ./longnet
      effconvert longnet --segments 512,2048 --dilations 1,4 --keep-softmax 0,-1 ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts(
        "models that attend",
        saves="time on long texts; KV cache: it stops growing",
        native="",
        exact="with one --segments as long as the text, and --dilations 1",
    )

    softcaps = True
    leaves_windows = True

    segments: Numbers = Field(description="Tokens of a segment, one number for each pair, W.", json_schema_extra={"metavar": "W,..."})
    dilations: Numbers = Field(
        description="Of each segment every r-th token is kept, one number for each pair; one of them is 1.", json_schema_extra={"metavar": "R,..."}
    )
    sinks: int = Field(4, ge=0, description="First tokens of the text that all tokens see, S.")

    @model_validator(mode="after")
    def _sound(self) -> Longnet:
        if len(self.segments) != len(self.dilations):
            raise ValueError(f"--segments has {len(self.segments)} numbers and --dilations {len(self.dilations)}; give as many of both, they are pairs")
        if 1 not in self.dilations:
            raise ValueError(
                f"--dilations {','.join(map(str, self.dilations))} leave tokens that see no key, not even their own, as a head has each r-th token only; "
                "give one pair a dilation of 1"
            )
        for width, dilation in self.pairs:
            if width % dilation:
                raise ValueError(
                    f"--segments {width} is no multiple of its dilation, {dilation}; give {-(-width // dilation) * dilation}, so that all segments are alike"
                )
        return self

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """W and r of each pair."""
        return list(zip(self.segments, self.dilations, strict=True))

    @property
    def label(self) -> str:
        """The command and its pairs, for a folder's name: longnet-64x1-512x4."""
        return "-".join([self.name, *(f"{width}x{dilation}" for width, dilation in self.pairs)])

    def is_exact(self, config: Config) -> bool:
        """Where every pair has all tokens."""
        return config.longest is not None and all(width >= config.longest and dilation == 1 for width, dilation in self.pairs)

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """None."""
        return {}

    def cache_slots(self, config: Config) -> Slots:
        """What the longest segment may still see, whatever the head, and the sinks."""
        from effconvert.surgery.mixing._call import past, sinks

        if not config.decoder:
            return {}
        heads = config.kv_heads, config.head_dim
        return {"count": ((), "int64"), **past(max(self.segments) - 1, *heads), **sinks(self.sinks, *heads)}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """One softmax over the keys of all pairs, and over the sinks that are in none."""
        from effconvert.surgery.mixing._call import reorder
        from effconvert.surgery.mixing._softmax import Text, combine, live_last

        call, order = live_last(call.prescaled)
        positions = call.positions()  # [B, T]
        key, value, count = call.key, call.value, positions[:, -1:] + 1  # [B, 1], live tokens so far
        if call.state is not None:
            key, value, _ = call.with_window(max(self.segments) - 1)
        text = Text(key, value, key.shape[2] - count)
        parts = [self._pair(call, positions, text, width, dilation) for width, dilation in self.pairs]
        if self.sinks:
            parts.append(self._sinks(call, positions))
        out = combine(parts)  # [B, H, T, D]
        return out if order is None else reorder(out, order.argsort(1))

    def _pair(self, call: Call, positions: Tensor, text: Text, width: int, dilation: int) -> Part:
        """Attend within segments, in each head among the tokens that it has: [B, H, T, ...].

        A group of queries is a segment, or all tokens of a call that is shorter than one; these may be in two segments.
        """
        import torch

        from effconvert.surgery.mixing._softmax import Part, attend

        tokens, device, kept = call.query.shape[2], call.key.device, width // dilation
        count = positions[:, -1:, None] + 1  # [B, 1, 1]
        start = count - tokens  # the position of the call's first row, padding or not
        first = (count - call.live.sum(1)[:, None, None]) // width * width  # where the segment of the first new token begins
        offset = (torch.arange(call.query.shape[1], device=device) % dilation)[:, None]  # [H, 1]
        if width <= tokens:
            groups = -(-(tokens + (width - 1 if call.state else 0)) // width)
            place = at = (first + offset + dilation * torch.arange(groups * kept, device=device)).unflatten(2, (groups, kept))  # positions, [B, H, G, Q]
        else:
            spans = 1 if tokens == 1 or call.state is None else 2
            place = (start + (offset - start) % dilation + dilation * torch.arange(-(-tokens // dilation), device=device))[:, :, None]  # [B, H, 1, Q]
            reach = min(spans * kept, -(-call.max_tokens // dilation))
            at = (first + offset + dilation * torch.arange(reach, device=device))[:, :, None]  # [B, H, 1, n]
        query = _by_head(call.query, (place - start[..., None]).flatten(2)).unflatten(2, place.shape[2:])  # [B, H, G, Q, D]
        rows = (at + text.shift[:, :, None, None]).flatten(2)
        key, value = (_by_head(tensor, rows).unflatten(2, at.shape[2:]) for tensor in (text.key, text.value))  # [B, H, G, n, D]
        one, other = place[..., None], at[..., None, :]
        visible = (one // width == other // width) & (other >= 0) & (other <= one if call.causal else other < count[..., None, None])
        part = attend(call, query[:, :, None], key, value, visible[:, :, :, None]).map(lambda each: each[:, :, 0].flatten(2, 3))  # [B, H, G Q, ...]
        back = (positions[:, None] - place[:, :, 0, :1]).div(dilation, rounding_mode="floor")  # [B, H, T]
        if dilation == 1:
            return part.map(lambda each: _by_head(each, back))
        has = (positions[:, None] % dilation == offset)[..., None]  # whether the head has the token, [B, H, T, 1]
        mixed, total, highest = (_by_head(each, back) for each in (part.mixed, part.total, part.highest))
        return Part(mixed * has, total * has, highest.masked_fill(~has, torch.finfo(highest.dtype).min))

    def _sinks(self, call: Call, positions: Tensor) -> Part:
        """Attend to the first tokens where no pair has them: [B, H, T, ...]."""
        import torch

        from effconvert.surgery.mixing._softmax import attend

        query, device = call.grouped[:, :, :, None], call.key.device  # [B, Hk, R, 1, T, D]
        key, value = (rows[:, :, None] for rows in call.first_tokens(self.sinks, positions))  # [B, Hk, 1, S, D]
        one, other = positions[:, None, :, None], torch.arange(self.sinks, device=device)  # [B, 1, T, 1], [S]
        head = torch.arange(call.query.shape[1], device=device)[:, None, None]
        paired = torch.zeros((), dtype=torch.bool, device=device)
        for width, dilation in self.pairs:
            paired = paired | ((one // width == other // width) & (one % dilation == head % dilation) & (other % dilation == head % dilation))
        end = one + 1 if call.causal else call.live.sum(1)[:, None, None, None]
        visible = (~paired & (other < end)).unflatten(1, query.shape[1:3])[:, :, None]  # [B, Hk, 1, R, T, S]
        return attend(call, query, key, value, visible).map(lambda each: each[:, :, :, 0].flatten(1, 2))


def _by_head(rows: Tensor, places: Tensor) -> Tensor:
    """Gather rows [B, Hk, N, D] at places [B, H, n], of each head its own: [B, H, n, D]. Places that do not exist are the nearest ones."""
    index = places.clamp(0, rows.shape[2] - 1).unflatten(1, (rows.shape[1], -1))[..., None]  # [B, Hk, R, n, 1]
    gathered = rows[:, :, None].expand(-1, -1, index.shape[2], -1, -1).gather(3, index.expand(-1, -1, -1, -1, rows.shape[3]))
    return gathered.flatten(1, 2)
