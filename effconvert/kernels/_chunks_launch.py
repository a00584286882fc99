"""The launches of `chunked_attention`'s kernels, and their registration with torch.library: what a call's sizes are, and how kernels are cut."""
# B = batch, G = KV heads, R = query heads that share one, RS = R where each has a state of its own, or 1, T = tokens, P = tokens before, m = features,
# D = width of values, K = width of the window's queries and keys, C = tokens in a chunk, N = chunks.

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from effconvert.kernels._chunks import _outputs, _scan, _step
from effconvert.kernels._chunks_backward import _key_features, _near_keys, _near_queries, _query_features, _totals, _values

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
THREADS = {"num_warps": 4, "num_stages": 2}


class _Sizes:
    """The sizes of a call, and how kernels are cut."""

    def __init__(self, query: Tensor, value: Tensor, state: Tensor, fall: Tensor | None, near: Tensor | None, size: int, least: float, chunk: int) -> None:
        batch, groups, shared, tokens, features = query.shape
        width, wide = value.shape[-1], 16 if near is None else near.shape[-1]
        self.chunk = min(chunk if max(width, wide) <= 128 else 32, _power(tokens))
        self.chunks, self.pairs, self.states = -(-tokens // self.chunk), batch * groups, batch * groups * state.shape[2]
        self.tokens, self.before = tokens, value.shape[-2] - tokens
        self.shift, self.size = (size - self.before, size) if near is not None else (0, 0)
        self.shared, self.batch, self.groups, self.own, self.features, self.width, self.wide = shared, batch, groups, state.shape[2], features, width, wide
        self.precise = state.dtype
        # What fits into the registers of four warps, as compilation for Hopper shows it: less where a product is three of float32, or rows are long.
        large = (value.itemsize >= 4 and near is not None) or max(width, wide) > 128 or (least > 0 and fall is not None)
        block, columns = min(32 if width <= 64 and not large else 16, _power(features)), min(32 if large else 64, _power(width))
        self.flags = {"DECAY": fall is not None, "NORM": least > 0, "ACC": TYPES[state.dtype]}
        self.block, self.columns = block, columns
        self.cut = {"G": groups, "RS": self.own, "M": features, "D": width, "C": self.chunk, "BM": block, "MUL": TYPES[query.dtype], **self.flags}
        self.near = {"K": wide, "BK": _power(wide), "BN": min(16 if large else 4096 // _power(max(width, wide)), 64, self.chunk)}
        self.kind = TYPES[value.dtype]

    def levels(self, fall: Tensor | None, other: Tensor) -> Tensor:
        """Return the logs of decays since the start of each chunk, [B, G, RS, N C]."""
        if fall is None:
            return other
        spare = self.chunks * self.chunk - self.tokens
        levels: Tensor = functional.pad(fall, (0, spare)).unflatten(-1, (-1, self.chunk)).cumsum(-1).flatten(-2)
        return levels

    def new(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.precise, device=like.device)

    def scan(self, rows: Tensor, values: Tensor, shift: int, first: Tensor, level: Tensor, scales: Tensor, thirds: Tensor, back: bool) -> tuple[Tensor, ...]:
        """Run `_scan`: the sums before each chunk [B G RS, N, M, D], their normalisers, and the sum in the end."""
        states = self.new(rows, self.states, self.chunks, self.features, self.width)
        norms = self.new(rows, self.states, self.chunks, self.features) if self.flags["NORM"] else states
        last = torch.empty_like(first)
        columns, block = min(16 if back else 32, self.columns), min(64, _power(self.features))
        grid = (-(-self.features // block), -(-self.width // columns), self.states)
        x = rows.stride()[:4] if back else (*rows.stride()[:2], 0, rows.stride(2))
        y = values.stride()[:4] if back else (*values.stride()[:2], 0, values.stride(2))
        _scan[grid](
            rows, values, scales, thirds, level, first, states, norms, last, *x, *y, shift, self.tokens, self.chunks,
            HEADS=self.shared // self.own if back else 1, BD=columns, BACK=back, **self.cut | {"BM": block}, **THREADS,
        )  # fmt: skip
        return states, norms, last


def _power(count: int) -> int:
    """Return the least power of two that is not less, at least 16."""
    return max(16, 1 << (count - 1).bit_length())


class _Near(NamedTuple):
    """The window's tensors, as kernels get them; others in their place where there is no window."""

    query: Tensor
    key: Tensor
    live: Tensor
    share: Tensor

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.query.stride()[:4], *self.key.stride()[:3], *self.live.stride()[:2]


def _near(query: Tensor, key: Tensor, near_query: Tensor | None, near_key: Tensor | None, live: Tensor | None, share: Tensor | None) -> _Near:
    if near_query is None or near_key is None or live is None or share is None:
        return _Near(query, key, query, query)
    return _Near(near_query, near_key, live.view(torch.uint8), share.contiguous())


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("effconvert::chunked_attention", mutates_args=())
def _operation(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, fall: Tensor | None, near_query: Tensor | None, near_key: Tensor | None, live: Tensor | None,
    share: Tensor | None, size: int, scaling: float, least: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernels of the forward pass, without a normaliser if `least` < 0.

    Returns outputs, the state, what weights are divided by, inverted, the largest scores, and the keys that have them.
    """
    sizes = _Sizes(query, value, state, fall, near_query, size, least, chunk)
    out = sizes.new(query, *query.shape[:-1], sizes.width)
    rows = query.shape[:-1]
    scales = sizes.new(query, *rows) if least > 0 else sizes.new(query, 0)
    top = sizes.new(query, *rows) if near_query is not None else sizes.new(query, 0)
    place = torch.zeros(top.shape, dtype=torch.int32, device=query.device)
    near = _near(query, key, near_query, near_key, live, share)
    level = sizes.levels(fall, state)
    states, norms, after = sizes.scan(key, value, sizes.shift, state, level, scales, scales, back=False)
    _outputs[(sizes.chunks * sizes.shared, sizes.pairs, -(-sizes.width // sizes.columns))](
        query, key, value, states, norms, level, *near, out, scales, top, place,
        *query.stride()[:4], *key.stride()[:3], *value.stride()[:3], *near.strides, sizes.shift, sizes.tokens, sizes.before, sizes.size, sizes.chunks,
        R=sizes.shared, BD=sizes.columns, LEAST=max(least, 0.0), SCALE=scaling, WINDOW=near_query is not None,
        NEAR=sizes.kind, **sizes.cut, **sizes.near, **THREADS,
    )  # fmt: skip
    return out, after, scales, top, place


@_operation.register_fake
def _(query, key, value, state, fall, near_query, near_key, live, share, size, scaling, least, chunk):  # type: ignore[no-untyped-def]
    rows = query.shape[:-1]
    scales = state.new_empty(rows if least > 0 else (0,))
    top = state.new_empty(rows if near_query is not None else (0,))
    return state.new_empty(*rows, value.shape[-1]), torch.empty_like(state), scales, top, torch.empty_like(top, dtype=torch.int32)


@torch.library.custom_op("effconvert::chunked_attention_step", mutates_args=())
def _one(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, fall: Tensor | None, near_query: Tensor | None, near_key: Tensor | None, live: Tensor | None,
    share: Tensor | None, size: int, scaling: float, least: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel of a single token. Returns outputs and the state."""
    sizes = _Sizes(query, value, state, fall, near_query, size, least, 16)
    out, after = sizes.new(query, *query.shape[:-1], sizes.width), torch.empty_like(state)
    near, heads, columns = _near(query, key, near_query, near_key, live, share), sizes.shared // sizes.own, min(32, sizes.columns)
    q_b, q_g, q_r, _, *strides = near.strides
    cut = {name: value for name, value in sizes.cut.items() if name != "C"} | {"BM": min(64, _power(sizes.features))}
    _step[(-(-sizes.width // columns), sizes.states)](
        query, key, value, state if fall is None else fall, state, *near, out, after,
        *query.stride()[:3], *key.stride()[:2], *value.stride()[:3], q_b, q_g, q_r, *strides, sizes.shift, sizes.before, sizes.size,
        R=sizes.shared, HEADS=heads, ROWS=_power(heads), BD=columns, LEAST=max(least, 0.0), SCALE=scaling, WINDOW=near_query is not None,
        NEAR=sizes.kind, **cut, **sizes.near, **THREADS,
    )  # fmt: skip
    return out, after


@_one.register_fake
def _(query, key, value, state, *_):  # type: ignore[no-untyped-def]
    return state.new_empty(*query.shape[:-1], value.shape[-1]), torch.empty_like(state)


@torch.library.custom_op("effconvert::chunked_attention_backward", mutates_args=())
def _backward(
    slope: Tensor, slope_state: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, fall: Tensor | None, near_query: Tensor | None,
    near_key: Tensor | None, live: Tensor | None, share: Tensor | None, out: Tensor, after: Tensor, scales: Tensor, top: Tensor, place: Tensor,
    size: int, scaling: float, least: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernels of the gradients: of query, key, value, state, fall, and of the window's query, key and share."""
    sizes = _Sizes(query, value, state, fall, near_query, size, least, chunk)
    shared, own, windowed = sizes.shared, sizes.own, near_query is not None
    level, thirds = sizes.levels(fall, state), sizes.new(query, *query.shape[:-1]) if least > 0 else scales
    groups, cut, more = {"G": sizes.groups, "R": shared}, sizes.cut | {"R": shared}, {"BD": sizes.columns, "NEAR": sizes.kind, **THREADS}
    x, f, v, g = query.stride()[:4], key.stride()[:3], value.stride()[:3], slope.stride()[:4]
    if least > 0:
        _totals[(sizes.chunks, sizes.pairs * shared)](
            out, slope, thirds, *g, sizes.tokens, **groups, D=sizes.width, C=sizes.chunk, BD=_power(sizes.width), ACC=sizes.flags["ACC"], num_warps=4
        )
    before, norms, _ = sizes.scan(key, value, sizes.shift, state, level, scales, thirds, back=False)
    blocks = -(-sizes.features // sizes.block)
    to_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    _query_features[(blocks, sizes.chunks * shared, sizes.pairs)](
        key, value, slope, scales, thirds, level, before, norms, to_query, *f, *v, *g, sizes.shift, sizes.tokens, sizes.chunks, **cut, **more
    )
    del before, norms
    behind, norms, to_state = sizes.scan(query, slope, 0, slope_state, level, scales, thirds, back=True)
    to_key = sizes.new(query, *key.shape[:2], own, *key.shape[2:], dtype=key.dtype if own == 1 else None)
    _key_features[(blocks, sizes.chunks, sizes.states)](
        query, value, slope, scales, thirds, level, behind, norms, to_key, *x, *v, *g, sizes.shift, sizes.tokens, sizes.chunks, **cut, **more
    )
    losses, to_near_query, to_near_key, to_share, to_fall = (sizes.new(query, 0) for _ in range(5))
    q, k, alive, part = near = _near(query, key, near_query, near_key, live, share)
    *strides, l_b, l_t = near.strides
    if windowed:
        losses = sizes.new(query, *query.shape[:-1])
        to_near_query, to_near_key = (torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in (q, k))
        _near_queries[(sizes.chunks * shared, sizes.pairs)](
            q, k, value, alive, slope, scales, thirds, part, top, place, losses, to_near_query, *strides, *v, l_b, l_t, *g,
            sizes.tokens, sizes.before, sizes.size, **groups, D=sizes.width, C=sizes.chunk, SCALE=scaling, ACC=sizes.flags["ACC"], **more, **sizes.near,
        )  # fmt: skip
        _near_keys[(-(-(sizes.tokens + sizes.before) // sizes.chunk), sizes.pairs)](
            q, k, value, alive, slope, scales, thirds, part, top, place, losses, to_near_key, *strides, *v, l_b, l_t, *g,
            sizes.tokens, sizes.before, sizes.size, **groups, D=sizes.width, C=sizes.chunk, SCALE=scaling, ACC=sizes.flags["ACC"], **more, **sizes.near,
        )  # fmt: skip
        to_share = losses.sum((0, 3)) / part
    to_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    _values[(-(-(sizes.tokens + sizes.before + sizes.shift) // sizes.chunk), sizes.pairs, -(-sizes.width // sizes.columns))](
        query, key, slope, scales, level, behind, *near, top, to_value,
        *x, *f, *near.strides, *g, sizes.shift, sizes.tokens, sizes.before, sizes.size, sizes.chunks,
        SCALE=scaling, WINDOW=windowed, **cut, **more, **sizes.near,
    )  # fmt: skip
    if fall is not None:  # a decay is a factor of all weights across its place: what queries gain by it from there on, but for those that stay behind
        gains = (query * to_query).to(sizes.precise).sum(-1)
        gains = (gains.sum(2, keepdim=True) if own == 1 else gains) - (key[:, :, None] * to_key).to(sizes.precise).sum(-1)
        to_fall = gains.flip(-1).cumsum(-1).flip(-1) + (slope_state * after).sum((-1, -2))[..., None]
    return to_query, to_key.sum(2).to(key.dtype) if own > 1 else to_key[:, :, 0].clone(), to_value, to_state, to_fall, to_near_query, to_near_key, to_share


@_backward.register_fake
def _(slope, slope_state, query, key, value, state, fall, near_query, near_key, live, share, *_):  # type: ignore[no-untyped-def]
    some = (query, key, value, state, fall, near_query, near_key, share)
    return tuple(state.new_empty(0) if given is None else torch.empty_like(given, memory_format=torch.contiguous_format) for given in some)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.numbers = inputs[9:]
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, slope: Tensor, slope_state: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    slope = slope.to(ctx.saved_tensors[2].dtype)  # outputs are rounded to the type of the values, or these would be float32
    slope = slope if slope.stride(-1) == 1 else slope.contiguous()
    gradients = torch.ops.effconvert.chunked_attention_backward(slope, slope_state.contiguous(), *saved, *ctx.numbers)
    query, key, value, state, fall, near_query, near_key, share = gradients
    given = [None if saved[index] is None else tensor for index, tensor in ((4, fall), (5, near_query), (6, near_key), (8, share))]
    return query, key, value, state, given[0], given[1], given[2], None, given[3], None, None, None, None


_operation.register_autograd(_gradients, setup_context=_keep)
