"""Causal linear attention in chunks: with a decay, or with a window of softmax in the same normaliser (LoLCATs), or with neither.

    w_tj = fade_tj q_t k_j                       for features q, k; all keys, or those that have left the window; fade_tj = exp(fall_(j+1) + ... + fall_t)
    w_tj = share exp(s_tj - max_j s_tj)          for the W last keys, of which padding does not count
    o_t  = sum_j w_tj v_j / max(least, sum_j w_tj),  or the sum alone

A first kernel adds up k v over chunks and stores the sum before each; a second one has a program for each chunk and query head, which takes the window with
a running maximum, that sum, and the keys of its own chunk. Backward computes the sums again, and others of the queries from the last chunk to the first, so
that nothing but inputs, outputs and three numbers a token is kept. A single token without a gradient is one kernel, which reads and writes the state once.
"""
# B = batch, G = KV heads, R = query heads that share one, RS = R where each has a state of its own, or 1, T = tokens, P = tokens before, m = features,
# D = width of values, K = width of the window's queries and keys, C = tokens in a chunk, N = chunks.

import torch
import triton  # noqa: F401  # by which files with kernels are known
from torch import Tensor

from effconvert.kernels._chunks import INTERPRETED
from effconvert.kernels._chunks_launch import TYPES  # its import registers the operations that are called here
from effconvert.kernels._cost import Cost
from effconvert.kernels.linear_attention import CHUNK, Window, chunked_attention_reference

__all__ = ["chunked_attention", "chunked_attention_reference", "cost", "uncovered"]

MEASURED = ()  # cards on which it agreed with the reference and was faster
WIDEST = 256  # of values, and of the window's queries and keys


def cost(
    batch: int, kv_heads: int, shared: int, tokens: int, features: int, width: int, window: int = 0, states: int = 1, of_features: int = 4, of_value: int = 2,
    chunk: int = CHUNK,
) -> Cost:  # fmt: skip
    """Return the bytes that a forward pass reads and writes, and its FLOPs.

    Args:
        batch: B.
        kv_heads: G.
        shared: R.
        tokens: T; 1 is a decoding step.
        features: m.
        width: D, which is K too.
        window: W, 0 for none; its tokens before the call are read with a step.
        states: RS.
        of_features: bytes of a feature.
        of_value: bytes of a value, and of a query and key of the window.
        chunk: C.
    """
    pairs, rows = batch * kv_heads, batch * kv_heads * shared * tokens
    state = pairs * states * features * (width + 1) * 4
    known = pairs * (tokens + (window - 1 if window and tokens == 1 else 0))
    near = bool(window) * (rows + known) * width * of_value
    moved = (rows + pairs * tokens) * features * of_features + rows * width * 4 + known * width * of_value + near
    if tokens == 1:
        return Cost(moved + 2 * state, 2 * (rows + pairs * states) * features * width + 4 * rows * window * width)
    chunks = -(-tokens // chunk)
    each = features * width + chunk * (features + width) + 2 * window * width
    return Cost(moved + 2 * (chunks + 1) * state, 2 * rows * each + 2 * pairs * states * tokens * features * width)


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, fall: Tensor | None = None, least: float | None = None, window: Window | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `chunked_attention_reference` does, by Triton kernels.

    Gradients reach all tensors but `live`; of them there are no gradients. Where the weights of a token sum up to less than `least`, its outputs have none.
    Among equal scores, the largest ones of a token, the first has all of the gradient that the maximum has. Features may be of another type than values.

    Raises:
        ValueError: an argument has another shape, type, stride or device, or another range; the message names it.
    """
    _check(query, key, value, state, fall, least, window, chunk)
    if fall is not None:
        fall = fall.to(state.dtype).expand(len(query), -1, -1, -1).contiguous()
    near = (None, None, None, None, 0, 0.0) if window is None else window
    given = (query, key, value, state.contiguous(), fall, *near, -1.0 if least is None else least)
    wanted = torch.is_grad_enabled() and any(isinstance(some, Tensor) and some.requires_grad for some in given)
    if query.shape[-2] == 1 and not wanted:
        out, after = torch.ops.effconvert.chunked_attention_step(*given)
    else:
        out, after, *_ = torch.ops.effconvert.chunked_attention(*given, chunk)
    return out, after


def uncovered(query: Tensor, value: Tensor, window: Window | None = None) -> str:
    """Return why no kernel computes a call of these shapes and types; empty where one does."""
    named = {"query": query, "value": value} | ({"window.query": window.query} if window else {})
    for name, tensor in named.items():
        if tensor.dtype not in TYPES or (tensor.dtype == torch.float64 and not INTERPRETED.value):
            return f"{name} is {tensor.dtype}, and it should be float32, float16 or bfloat16"
        if tensor.shape[-1] > WIDEST and name != "query":
            return f"{name} is {tensor.shape[-1]} wide, and it should be at most {WIDEST}"
    return ""


def _check(query: Tensor, key: Tensor, value: Tensor, state: Tensor, fall: Tensor | None, least: float | None, window: Window | None, chunk: int) -> None:
    for name, tensor, count in (("query", query, 5), ("key", key, 4), ("value", value, 4), ("state", state, 5)):
        if tensor.ndim != count:
            raise ValueError(f"{name} is {[*tensor.shape]}, and it should have {count} dimensions")
    if why := uncovered(query, value, window):
        raise ValueError(why)
    batch, groups, shared, tokens, features = query.shape
    width, own = value.shape[-1], 1 if fall is None else fall.shape[-2]
    known = tokens if window is None else value.shape[-2]
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not tokens:
        raise ValueError("query has no token")
    if chunk < 16 or chunk & (chunk - 1):
        raise ValueError(f"chunk is {chunk}, and it should be a power of two, at least 16")
    if own not in (1, shared):
        raise ValueError(f"fall is for {own} heads, and it should be for 1 or {shared}")
    shapes = {
        "key": (key, [batch, groups, tokens, features], query.dtype),
        "value": (value, [batch, groups, known, width], value.dtype),
        "state": (state, [batch, groups, own, features, width + (least is not None)], precise),
    }
    if fall is not None:
        shapes["fall"] = (fall, [fall.shape[0] if fall.shape[0] == 1 else batch, groups, own, tokens], precise)
    if window is not None:
        if least is None:
            raise ValueError("least is None, and a window needs a normaliser; give the least that outputs are divided by")
        if window.size < 1:
            raise ValueError(f"window.size is {window.size}, and it should be at least 1")
        if not tokens <= known <= tokens + window.size:
            raise ValueError(f"value has {known} tokens, and it should have the {tokens} of the queries, and at most {window.size} before them")
        wide = window.key.shape[-1]
        shapes |= {
            "window.query": (window.query, [batch, groups, shared, tokens, wide], value.dtype),
            "window.key": (window.key, [batch, groups, known, wide], value.dtype),
            "window.live": (window.live, [batch, known], torch.bool),
            "window.share": (window.share, [groups, shared], precise),
        }
    for name, (tensor, shape, kind) in shapes.items():
        if [*tensor.shape] != shape:
            raise ValueError(f"{name} is {[*tensor.shape]}, and it should be {shape}")
        if tensor.dtype != kind:
            raise ValueError(f"{name} is {tensor.dtype}, and it should be {kind}")
    if least is not None and not least > 0:
        raise ValueError(f"least is {least}, and it should be more than 0")
    for name, (tensor, *_) in ({"query": (query, 0, 0)} | shapes).items():
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, and query on {query.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and name not in ("state", "fall", "window.live", "window.share"):
            raise ValueError(f"{name} has a stride of {tensor.stride(-1)} in its last dimension, and it should be 1; give {name}.contiguous()")
