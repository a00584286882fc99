"""Softmax attention of the newest tokens to cached keys and values: a decoding step.

Query t of T stands at the key p_t = stop - T + t. With W = window, and s = sinks,

    seen(t, j)  =  start <= j <= p_t  and  (j > p_t - W  or  j < start + s),      or what `mask` says in place of all this
    x_tj        =  scaling q_t k_j,  with a soft-cap  cap tanh(x / cap)
    o_t         =  sum_j softmax_j(x_tj) v_j  over the keys that are seen; 0 where none is

Keys and values are read once. The queries of all heads that share a KV head are rows of one tile, padded to a power of two, whatever their number. Keys are
split among programs, each of which keeps a maximum m, a sum l and an output o in float32; a second kernel adds them up with weights l exp(m). The order of
keys does not matter, so a full ring of the last tokens is a cache like any other. No gradient: decoding needs none.
"""
# B = batch, H = query heads, Hk = KV heads, G = H/Hk, T = new tokens, S = keys, D = width of queries and keys, V = that of values, N = splits.

from functools import lru_cache

import torch
import triton
from torch import Tensor

from effconvert.kernels._cost import Cost
from effconvert.kernels._decode import add_up, part, splits_for, tiles

MEASURED = ()  # cards on which it agreed with the reference and was faster
TYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 2048  # bytes of the widest keys and values
PROCESSORS = 132  # of an H100 or H200, where no card can be asked
LOG2E = 1.4426950408889634


def cost(batch: int, heads: int, kv_heads: int, seen: int, width: int, value_width: int, tokens: int = 1, itemsize: int = 2, splits: int = 1) -> Cost:
    """Return the bytes that a step reads and writes, with `seen` keys a sequence, and its FLOPs."""
    rows = batch * heads * tokens
    cached = batch * kv_heads * seen * (width + value_width) * itemsize
    parts = 2 * rows * splits * (value_width + 1) * 4 if splits > 1 else 0  # written and read
    return Cost(cached + rows * (width + value_width) * itemsize + parts, 2 * rows * seen * (width + value_width))


def decode_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None = None, stop: Tensor | None = None, window: int | None = None, sinks: Tensor | int = 0,
    mask: Tensor | None = None, scaling: float | None = None, softcap: float | None = None, sink_query: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what `decode_attention` does, in plain PyTorch: its specification."""
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, tokens, kv_heads, keys = len(query), query.shape[2], key.shape[1], torch.arange(key.shape[2], device=key.device)
    first, end, firsts = (torch.zeros(batch, 1, 1, dtype=torch.int64, device=key.device) + _column(given) for given in (start, stop, sinks))
    if stop is None:
        end = end + len(keys)
    last = end - tokens + torch.arange(tokens, device=key.device)[:, None]  # [B, T, 1]
    near = torch.ones_like(last, dtype=torch.bool) if window is None else keys > last - window
    seen = (keys >= first) & (keys <= last) & (near | (keys < first + firsts)) if mask is None else mask.expand(batch, tokens, -1)
    scores = _scores(query, key, precise)
    if sink_query is not None:
        scores = torch.where(near[:, None, None], scores, _scores(sink_query, key, precise))
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = seen[:, None, None]  # [B, 1, 1, T, S]
    weights = torch.where(seen, scores.masked_fill(~seen, torch.finfo(precise).min).softmax(-1), 0).to(value.dtype)
    known = torch.where(seen.any(-2)[:, 0, :, :, None], value, 0)  # whatever stands where nobody looks
    out: Tensor = (weights.flatten(2, 3) @ known).view(batch, kv_heads, -1, tokens, value.shape[-1]).flatten(1, 2)
    return out


def _column(given: Tensor | int | None) -> Tensor | int:
    return given[:, None, None] if isinstance(given, Tensor) else given or 0


def _scores(query: Tensor, key: Tensor, precise: torch.dtype) -> Tensor:
    """Return the products of queries and keys, [B, Hk, G, T, S]."""
    rows: Tensor = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3) @ key.mT
    scores: Tensor = rows.unflatten(2, (-1, query.shape[2])).to(precise)
    return scores


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None = None, stop: Tensor | None = None, window: int | None = None, sinks: Tensor | int = 0,
    mask: Tensor | None = None, scaling: float | None = None, softcap: float | None = None, sink_query: Tensor | None = None, processors: int | None = None,
) -> Tensor:  # fmt: skip
    """Return the outputs of T new tokens, [B, H, T, V], by Triton kernels. They lie in memory as [B, T, H, V].

    Args:
        query: [B, H, T, D], T few.
        key: [B, Hk, S, D], the new tokens' own among them; any strides but the last, as views of caches have them.
        value: [B, Hk, S, V].
        start: the first key of each sequence, [B], int32 or int64: left padding is before it. None: 0.
        stop: the end of the keys of each sequence, [B]: a static cache has more. None: S.
        window: how many of the last keys a token sees, its own among them; None: all.
        sinks: how many of the first keys all tokens see beside them, or one such number for each sequence, [B].
        mask: which keys each token sees, bool [B or 1, T, S], in place of start, stop, window and sinks.
        scaling: of scores; None: D ** -0.5.
        softcap: the cap of scores; None: none.
        sink_query: queries [B, H, 1, D] for the keys outside the window, in place of `query`; only for one token.
        processors: multiprocessors of the card, which decide the number of splits; None: as many as it has.

    Raises:
        ValueError: an argument has another shape, type, stride or device, or another range; the message names it.
    """
    _check(query, key, value, start, stop, window, sinks, mask, softcap, sink_query)
    counts, count = (sinks, 0) if isinstance(sinks, Tensor) else (None, sinks)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    result: Tensor = torch.ops.effconvert.decode_attention(
        query, key, value, start, stop, window or 0, count, counts, mask, scaling, softcap or 0.0, sink_query, processors or 0
    )
    return result


def uncovered(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Return why no kernel computes a step of these shapes and types; empty where one does."""
    width, widest = max(key.shape[-1], value.shape[-1]), WIDEST // query.itemsize
    if query.dtype not in TYPES:
        return f"query is {query.dtype}, and it should be float32, float16 or bfloat16"
    if width > widest:
        return f"{'key' if key.shape[-1] == width else 'value'} is {width} wide, and it should be at most {widest} in {query.dtype}"
    return ""


def _check(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, stop: Tensor | None, window: int | None, sinks: Tensor | int, mask: Tensor | None,
    softcap: float | None, sink_query: Tensor | None,
) -> None:  # fmt: skip
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} is {[*tensor.shape]}, and it should have four dimensions")
    (batch, heads, tokens, width), (kv_heads, keys) = query.shape, key.shape[1:3]
    if why := uncovered(query, key, value):
        raise ValueError(why)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise ValueError("query, key or value wants a gradient, and there is none; decode in torch.no_grad()")
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"query has {heads} heads, and key {kv_heads}, which does not divide them")
    if not keys or not tokens:
        raise ValueError(f"{'key' if tokens else 'query'} has no token")
    if mask is not None and (start is not None or stop is not None or window is not None or isinstance(sinks, Tensor) or sinks):
        raise ValueError("mask stands in place of start, stop, window and sinks; give it alone")
    shapes = [("key", key, [batch, kv_heads, keys, width]), ("value", value, [batch, kv_heads, keys, value.shape[-1]])]
    for name, tensor, shape in [*shapes, *([] if sink_query is None else [("sink_query", sink_query, [batch, heads, 1, width])])]:
        if [*tensor.shape] != shape:
            raise ValueError(f"{name} is {[*tensor.shape]}, and it should be {shape}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, and query {query.dtype}; they should be the same")
    if sink_query is not None and (tokens != 1 or window is None):
        raise ValueError("sink_query is for one token with a window")
    for name, given in (("start", start), ("stop", stop), ("sinks", sinks)):
        if isinstance(given, Tensor) and (given.shape != (batch,) or given.dtype not in (torch.int32, torch.int64) or not given.is_contiguous()):
            raise ValueError(f"{name} is {given.dtype} {[*given.shape]}, and it should be int32 or int64 [{batch}] without gaps")
    if mask is not None and (mask.dtype != torch.bool or [*mask.shape] not in ([batch, tokens, keys], [1, tokens, keys])):
        raise ValueError(f"mask is {mask.dtype} {[*mask.shape]}, and it should be torch.bool [{batch} or 1, {tokens}, {keys}]")
    tensors = {"query": query, "key": key, "value": value, "sink_query": sink_query, "mask": mask, "start": start, "stop": stop, "sinks": sinks}
    for name, some in tensors.items():
        if isinstance(some, Tensor) and some.device != query.device:
            raise ValueError(f"{name} is on {some.device}, and query on {query.device}")
        if isinstance(some, Tensor) and some.ndim > 1 and some.stride(-1) != 1 and some.shape[-1] > 1:
            raise ValueError(f"{name} has a stride of {some.stride(-1)} in its last dimension, and it should be 1; give {name}.contiguous()")
    for name, number, least in (("window", window, 1), ("sinks", sinks, 0)):
        if isinstance(number, int) and number < least:
            raise ValueError(f"{name} is {number}, and it should be at least {least}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, and it should be more than 0")


@lru_cache(None)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


@torch.library.custom_op("effconvert::decode_attention", mutates_args=())
def _operation(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, stop: Tensor | None, window: int, sinks: int, counts: Tensor | None, mask: Tensor | None,
    scaling: float, softcap: float, sink_query: Tensor | None, processors: int,
) -> Tensor:  # fmt: skip
    """Run the kernels. A window, a soft-cap and processors of 0 are none."""
    (batch, heads, tokens, width), (kv_heads, keys), value_width = query.shape, key.shape[1:3], value.shape[-1]
    out = torch.empty(batch, tokens, heads, value_width, dtype=query.dtype, device=query.device)
    rows = heads // kv_heads * tokens
    cut = tiles(rows, width, value_width, query.itemsize)
    blocks = -(-rows // cut.rows)
    length = min(keys, window + tokens - 1) if window else keys
    splits = splits_for(batch * kv_heads * blocks, length // (2 * cut.block), processors or _processors(query.device))  # of two tiles of keys at least
    parts = torch.empty(batch, tokens, heads, splits, value_width, device=query.device, dtype=torch.float32) if splits > 1 else out
    norms = torch.empty(batch, tokens, heads, splits, device=query.device, dtype=torch.float32) if splits > 1 else out
    far = query if sink_query is None else sink_query
    seen = query if mask is None else mask.view(torch.uint8).expand(batch, -1, -1)
    if not out.numel():
        return out.transpose(1, 2)
    with torch.cuda.device_of(query):  # where triton launches
        part[(blocks * splits * batch * kv_heads,)](
            query, far, key, value, seen, start, stop, counts, parts, norms,
            *query.stride()[:3], *far.stride()[:3], *key.stride()[:3], *value.stride()[:3], *seen.stride()[:2],
            keys, splits, window, sinks, scaling / softcap if softcap else scaling * LOG2E, softcap * LOG2E,
            HK=kv_heads, G=heads // kv_heads, T=tokens, D=width, V=value_width, MASKED=mask is not None, WINDOW=window > 0,
            SINKS=bool(sinks) or counts is not None, FAR=sink_query is not None, CAPPED=softcap > 0, ALONE=splits == 1,
            ROWS=cut.rows, BLOCKS=blocks, BLOCK=cut.block, D1=cut.widths[0], D2=cut.widths[1], V1=cut.value_widths[0], V2=cut.value_widths[1],
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        if splits > 1:
            columns = min(64, triton.next_power_of_2(value_width))
            add_up[(batch * tokens * heads, -(-value_width // columns))](
                parts, norms, out, splits, V=value_width, PARTS=triton.next_power_of_2(splits), COLUMNS=columns, num_warps=4
            )
    return out.transpose(1, 2)


@_operation.register_fake
def _(query, key, value, *_):  # type: ignore[no-untyped-def]
    batch, heads, tokens = query.shape[:3]
    return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
