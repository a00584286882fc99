"""The Triton kernels of `decode_attention`, and how they are cut into programs: see there for the formula."""
# H = query heads, Hk = KV heads, G = H/Hk, T = new tokens, S = keys, D = width of queries and keys, V = that of values, N = splits.

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

PROGRAMS = 2  # that a multiprocessor runs at a time, at least
SPLITS = 128  # at most
LOWEST = tl.constexpr(-1e30)  # what stands for minus infinity
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Tiles(NamedTuple):
    """How the kernel is cut: rows of queries and keys in a tile, the widths of keys and of values in two powers of two, warps, stages of its pipeline."""

    rows: int
    block: int
    widths: tuple[int, int]
    value_widths: tuple[int, int]
    warps: int
    stages: int


@lru_cache(None)
def tiles(rows: int, width: int, value_width: int, itemsize: int) -> Tiles:
    """Return the tiles for G T rows: those of keys and values that are on the way take 64 KB, or a little more if they are very wide."""
    widths, value_widths = _parts(width), _parts(value_width)
    bytes_of_key = (sum(widths) + sum(value_widths)) * itemsize
    room = 2**15 // (sum(value_widths) * itemsize)  # for the outputs of all rows in registers
    most = max(16, min(64, 1 << max(0, room.bit_length() - 1)))
    own = min(most, max(16, triton.next_power_of_2(rows)))
    block = next((block for block in (128, 64, 32) if block * bytes_of_key <= 2**15 and block * own <= 2**12), 16)
    numbers, narrow = sum(widths) + sum(value_widths), 512 if itemsize == 2 else 128  # float32 is not for tensor cores, and needs more registers
    warps = 4 if numbers <= narrow else 8 if numbers * itemsize < 2**12 or itemsize == 2 else 16
    return Tiles(own, block, widths, value_widths, warps, 3 if block * bytes_of_key < 2**16 else 2)


def _parts(width: int) -> tuple[int, int]:
    """Return two powers of two, at least 16, whose sum is little more than a width; the second may be 0."""
    if width <= 16:
        return 16, 0
    first = 1 << (width.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(width - first)) if width > first else 0


@lru_cache(None)
def splits_for(programs: int, most: int, processors: int) -> int:
    """Return among how many programs the keys of a sequence are split, at most `most`: the fewest that keep nearly all multiprocessors busy to the end."""
    places = PROGRAMS * processors
    busy = [programs * splits / places / -(-programs * splits // places) for splits in range(1, max(1, min(SPLITS, most)) + 1)]
    return 1 + next(index for index, share in enumerate(busy) if share >= 0.85 * max(busy))


@triton.jit
def dot(a, b):  # type: ignore[no-untyped-def]
    """Multiply into float32. In the interpreter products of bfloat16 are wrong, so it gets float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _queries(rows, real, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load WIDTH columns of queries from FIRST on, [ROWS, WIDTH]."""
    columns = FIRST + tl.arange(0, WIDTH)
    return tl.load(rows[:, None] + columns[None, :], mask=real[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _take(  # type: ignore[no-untyped-def]
    q1, q2, key, value, k_s, v_s, at, wanted, seen, top, total, out1, out2, sharpness, cap,
    D: tl.constexpr, V: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
):  # fmt: skip
    """Take the keys from `at` on into the running maximum, sum and outputs of all rows; only wanted ones are read."""
    keys = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * 0 + at  # products of positions and strides may be larger than int32
    key += at * k_s
    value += at * v_s
    d1, v1 = tl.arange(0, D1), tl.arange(0, V1)
    scores = dot(q1, tl.load(key + keys[None, :] * k_s + d1[:, None], mask=wanted[None, :] & (d1 < D)[:, None], other=0.0))  # [ROWS, BLOCK]
    if D2:
        d2 = D1 + tl.arange(0, D2)
        scores += dot(q2, tl.load(key + keys[None, :] * k_s + d2[:, None], mask=wanted[None, :] & (d2 < D)[:, None], other=0.0))
    scores *= sharpness
    if CAPPED:
        scores = cap * (2 * tl.sigmoid(2 * scores) - 1)
    scores = tl.where(seen, scores, LOWEST)
    new = tl.maximum(top, tl.max(scores, 1))
    fade = tl.exp2(top - new)
    weights = tl.where(seen, tl.exp2(scores - new[:, None]), 0.0)
    total = total * fade + tl.sum(weights, 1)
    values = tl.load(value + keys[:, None] * v_s + v1[None, :], mask=wanted[:, None] & (v1 < V)[None, :], other=0.0)
    weights = weights if INTERPRETED else weights.to(values.dtype)
    out1 = out1 * fade[:, None] + dot(weights, values)
    if V2:
        v2 = V1 + tl.arange(0, V2)
        values = tl.load(value + keys[:, None] * v_s + v2[None, :], mask=wanted[:, None] & (v2 < V)[None, :], other=0.0)
        out2 = out2 * fade[:, None] + dot(weights, values)
    return new, total, out1, out2


@triton.jit(do_not_specialize=["S", "splits", "window", "sinks"])
def part(  # type: ignore[no-untyped-def]
    query, far, key, value, mask, start, stop, counts, parts, norms,
    q_b, q_h, q_t, f_b, f_h, f_t, k_b, k_h, k_s, v_b, v_h, v_s, m_b, m_t, S, splits, window, sinks, sharpness, cap,
    HK: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    FAR: tl.constexpr, CAPPED: tl.constexpr, ALONE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
):  # fmt: skip
    """Attend with the rows of one KV head, or some of them, to one split of its keys."""
    program = tl.program_id(0)
    split, pair = program // BLOCKS % splits, program // (BLOCKS * splits)
    batch, kv = (pair // HK).to(tl.int64), (pair % HK).to(tl.int64)
    rows = program % BLOCKS * ROWS + tl.arange(0, ROWS)  # [ROWS]
    real, head, token = rows < G * T, kv * G + rows // T, rows % T
    own = query + batch * q_b + head * q_h + token * q_t
    q1 = _queries(own, real, D, 0, D1)
    q2 = _queries(own, real, D, D1, D2) if D2 else q1
    key += batch * k_b + kv * k_h
    value += batch * v_b + kv * v_h
    mask += batch * m_b

    first, end = tl.program_id(0) * 0, tl.program_id(0) * 0 + S
    if start is not None:
        first = tl.maximum(tl.load(start + batch).to(tl.int32), 0)
    if stop is not None:
        end = tl.minimum(tl.load(stop + batch).to(tl.int32), S)
    if counts is not None:
        sinks = tl.load(counts + batch).to(tl.int32)
    last = end - T + token  # [ROWS], the last key that each row sees
    low = tl.maximum(first, end - T - window + 1) if WINDOW else first  # the first key in a window

    top, total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    out1, out2 = tl.zeros((ROWS, V1), tl.float32), tl.zeros((ROWS, V2 if V2 else 1), tl.float32)
    if SINKS and WINDOW:  # those before every window, which all rows see
        f1, f2 = q1, q2
        if FAR:
            others = far + batch * f_b + head * f_h + token * f_t
            f1 = _queries(others, real, D, 0, D1)
            f2 = _queries(others, real, D, D1, D2) if D2 else f1
        stop_sinks = tl.minimum(first + sinks, low) if split == 0 else first
        for at in range(first, stop_sinks, BLOCK):
            wanted = at + tl.arange(0, BLOCK) < stop_sinks
            seen = wanted[None, :] & real[:, None]
            top, total, out1, out2 = _take(
                f1, f2, key, value, k_s, v_s, at, wanted, seen, top, total, out1, out2, sharpness, cap, D, V, CAPPED, BLOCK, D1, D2, V1, V2
            )
    length = tl.cdiv(tl.cdiv(tl.maximum(end - low, 0), BLOCK), splits) * BLOCK  # of a split
    begin = low + split * length
    end = tl.minimum(begin + length, end)
    for at in range(begin, end, BLOCK):
        keys = at + tl.arange(0, BLOCK)
        wanted = keys < end
        if MASKED and T == 1:
            wanted = tl.load(mask + keys, mask=wanted, other=0) != 0
            seen = wanted[None, :] & real[:, None]
        elif MASKED:
            seen = tl.load(mask + token[:, None] * m_t + keys[None, :], mask=real[:, None] & wanted[None, :], other=0) != 0
            wanted = tl.max(seen.to(tl.int32), 0) != 0
        else:
            seen = wanted[None, :] & (keys[None, :] <= last[:, None])
            if WINDOW:
                near = keys[None, :] > last[:, None] - window
                seen = seen & ((near | (keys < first + sinks)[None, :]) if SINKS else near)
        top, total, out1, out2 = _take(
            q1, q2, key, value, k_s, v_s, at, wanted, seen, top, total, out1, out2, sharpness, cap, D, V, CAPPED, BLOCK, D1, D2, V1, V2
        )

    place = ((batch * T + token) * (HK * G) + head) * splits + split  # [ROWS], of [B, T, H, N]
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    columns = tl.arange(0, V1)
    tl.store(parts + place[:, None] * V + columns[None, :], (out1 / total[:, None]).to(parts.dtype.element_ty), mask=real[:, None] & (columns < V)[None, :])
    if V2:
        columns = V1 + tl.arange(0, V2)
        values = (out2 / total[:, None]).to(parts.dtype.element_ty)
        tl.store(parts + place[:, None] * V + columns[None, :], values, mask=real[:, None] & (columns < V)[None, :])
    if not ALONE:
        tl.store(norms + place, tl.where(empty, LOWEST, top + tl.log2(total)), mask=real)


@triton.jit(do_not_specialize=["splits"])
def add_up(parts, norms, out, splits, V: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up the splits of one row, weighted by their sums of exponentials."""
    row, split = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = split < splits
    norm = tl.load(norms + row * splits + split, mask=real, other=LOWEST)
    weights = tl.where(real, tl.exp2(norm - tl.max(norm, 0)), 0.0)
    values = tl.load(parts + (row * splits + split)[:, None] * V + columns[None, :], mask=real[:, None] & (columns < V)[None, :], other=0.0)
    result = tl.sum(weights[:, None] * values, 0) / tl.sum(weights, 0)
    tl.store(out + row * V + columns, result.to(out.dtype.element_ty), mask=columns < V)
