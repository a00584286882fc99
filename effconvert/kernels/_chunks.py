"""The Triton kernels of `chunked_attention`: sums over chunks, the outputs of a chunk, and a decoding step. Those of its gradients are `_chunks_backward`.

Sums are of type ACC; products are taken in the type of the features, MUL, where one of a pair is a feature or a state, and in that of the values, NEAR.
Features and values of the same token are `shift` rows apart: a key's features begin to count when it leaves the window.
"""
# C = tokens in a chunk, N = chunks, G = KV heads, R = query heads that share one, RS = states for a KV head, M = features, D, K = widths of values and keys.
# BM, BD, BK = the features, and the two widths, that a program has at a time, powers of two; BN = keys of the window at a time.

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(-1e30)  # what stands for minus infinity
VARYING = ["T", "P", "W", "shift", "chunks"]  # for which no kernel is compiled again


@triton.jit
def _rounded(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round to a type as a GPU does, and keep the result as it is: bfloat16 is cut off in the interpreter, and what is computed with it is wrong."""
    if KIND == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True).to(x.dtype)
    else:
        return x.to(KIND).to(x.dtype)


@triton.jit
def _dot(a, b, total, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return total + a b, with factors of a type; float32 is three products of tensor cores, which is as good as float32."""
    if INTERPRETED:
        return tl.dot(_rounded(a.to(total.dtype), KIND), _rounded(b.to(total.dtype), KIND), total, input_precision="ieee", out_dtype=total.dtype)
    else:
        return tl.dot(a.to(KIND), b.to(KIND), total, input_precision="tf32x3")


@triton.jit
def _dot_weights(weights, b, total, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return total + weights b. Weights by features, which PyTorch has in float32, are two factors of a shorter type: rounded, and what that leaves out."""
    total = _dot(weights, b, total, KIND)
    if KIND != tl.float32 and KIND != tl.float64:  # noqa: SIM300
        rest = weights - (_rounded(weights, KIND) if INTERPRETED else weights.to(KIND).to(weights.dtype))
        total = _dot(rest, b, total, KIND)
    return total


@triton.jit
def _load(pointers, mask, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load some numbers, 0 where the mask says no. The interpreter gets them as ACC before any arithmetic."""
    values = tl.load(pointers, mask=mask, other=0.0)
    return values.to(ACC) if INTERPRETED else values


@triton.jit
def _down(base, lines, stride, kept, columns, WIDTH: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load some columns of some lines, [lines, columns]: 0 for lines that are not kept, and beyond the WIDTH of a line."""
    return _load(base + lines.to(tl.int64)[:, None] * stride + columns[None, :], kept[:, None] & (columns < WIDTH)[None, :], ACC)


@triton.jit
def _across(base, lines, stride, kept, columns, WIDTH: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same, [columns, lines]."""
    return _load(base + lines.to(tl.int64)[None, :] * stride + columns[:, None], kept[None, :] & (columns < WIDTH)[:, None], ACC)


@triton.jit
def _store(pointers, values, mask):  # type: ignore[no-untyped-def]
    kind: tl.constexpr = pointers.dtype.element_ty
    if INTERPRETED:
        values = _rounded(values, kind)
    tl.store(pointers, values.to(kind), mask=mask)


@triton.jit
def _fades(late, early):  # type: ignore[no-untyped-def]
    """Return by how much has decayed what tokens at one level see of those at an earlier one."""
    return tl.exp(tl.minimum(late - early, 0.0))


@triton.jit(do_not_specialize=VARYING)
def _scan(  # type: ignore[no-untyped-def]
    rows, values, scales, thirds, level, first, states, norms, last, x_b, x_g, x_r, x_t, y_b, y_g, y_r, y_t, shift, T, chunks,
    G: tl.constexpr, RS: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    BACK: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr, MUL: tl.constexpr,
):  # fmt: skip
    """Sum x y over chunks, one after the other, and store the sum before each: states [B, G, RS, N, M, D] and their normalisers [B, G, RS, N, M].

    Forward x are features of keys, and y values and a 1. BACK, from the last chunk to the first: features of queries, gradients of outputs, and `thirds`.
    """
    features, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BD + tl.arange(0, BD)
    head = tl.program_id(2).to(tl.int64)
    own, batch, group = head % RS, head // (RS * G), head // RS % G
    rows += batch * x_b + group * x_g + own * x_r
    values += batch * y_b + group * y_g + own * y_r
    level += head * chunks * C
    width: tl.constexpr = D + NORM
    inside = (features < M)[:, None] & (columns < D)[None, :]
    place = (head * M + features) * width
    state = tl.load(first + place[:, None] + columns[None, :], mask=inside, other=0.0).to(ACC)
    norm = tl.zeros((BM,), ACC)
    if NORM:
        norm = tl.load(first + place + D, mask=features < M, other=0.0).to(ACC)
    for step in range(0, chunks):
        chunk = step
        if BACK:
            chunk = chunks - 1 - step
        kept = (head * chunks + chunk) * M + features
        tl.store(states + kept[:, None] * D + columns[None, :], state, mask=inside)
        if NORM and tl.program_id(1) == 0:
            tl.store(norms + kept, norm, mask=features < M)
        tokens = chunk * C + tl.arange(0, C)
        weight = tl.full((C,), 1.0, ACC)
        if DECAY:
            levels, end = tl.load(level + tokens), tl.load(level + chunk * C + C - 1)
            weight = tl.exp(levels) if BACK else tl.exp(end - levels)
            state *= tl.exp(end)
            norm *= tl.exp(end)
        for h in range(HEADS):
            there = tokens - shift
            x = _across(rows + h * x_r, tokens, x_t, (there >= 0) & (tokens < T), features, M, ACC)  # [BM, C]
            y = _down(values + h * y_r, there, y_t, (there >= 0) & (tokens < T), columns, D, ACC)
            if BACK:
                x = x * weight[None, :]
                if NORM:
                    x *= tl.load(scales + (head * HEADS + h) * T + tokens, mask=tokens < T, other=0.0)[None, :]
                    norm += tl.sum(x * tl.load(thirds + (head * HEADS + h) * T + tokens, mask=tokens < T, other=0.0)[None, :], 1)
            else:
                if DECAY:
                    x = x * weight[None, :]
                if NORM:
                    norm += tl.sum(x.to(ACC), 1)
            state = _dot(x, y, state, MUL)
    tl.store(last + place[:, None] + columns[None, :], state, mask=inside)
    if NORM and tl.program_id(1) == 0:
        tl.store(last + place + D, norm, mask=features < M)


@triton.jit
def _scores(q, key, live, keys, tokens, k_t, l_t, T, P, W, K: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, NEAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scores of queries with keys, [C, BN], and which of them count."""
    wide = tl.arange(0, BK)
    real = (keys >= 0) & (keys < P + T)
    k = _across(key, keys, k_t, real, wide, K, ACC)  # [BK, BN]
    alive = tl.load(live + keys * l_t, mask=real, other=0) != 0
    far = P + tokens[:, None] - keys[None, :]
    counted = (far >= 0) & (far < W) & alive[None, :] & (tokens < T)[:, None]
    return _dot(q, k, tl.zeros((q.shape[0], keys.shape[0]), ACC), NEAR) * SCALE, counted


@triton.jit(do_not_specialize=VARYING)
def _outputs(  # type: ignore[no-untyped-def]
    query, key, value, states, norms, level, near_query, near_key, live, share, out, scales, top, place,
    x_b, x_g, x_r, x_t, f_b, f_g, f_t, v_b, v_g, v_t, q_b, q_g, q_r, q_t, k_b, k_g, k_t, l_b, l_t, shift, T, P, W, chunks,
    G: tl.constexpr, R: tl.constexpr, RS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr, SCALE: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, MUL: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Compute some columns of the outputs of a chunk of one query head: the window with its running maximum, the state before, the chunk."""
    chunk, r, pair = tl.program_id(0) // R, tl.program_id(0) % R, tl.program_id(1).to(tl.int64)
    batch, group = pair // G, pair % G
    tokens, columns, first = chunk * C + tl.arange(0, C), tl.program_id(2) * BD + tl.arange(0, BD), tl.program_id(2) == 0
    here = (pair * R + r) * T + tokens
    value += batch * v_b + group * v_g
    total, norm = tl.zeros((C, BD), ACC), tl.zeros((C,), ACC)
    if WINDOW:
        wide = tl.arange(0, BK)
        near = _down(near_query + batch * q_b + group * q_g + r * q_r, tokens, q_t, tokens < T, wide, K, ACC)
        high, at = tl.full((C,), LOWEST, ACC), tl.zeros((C,), tl.int32)
        for start in range(tl.maximum(0, P + chunk * C - W + 1), tl.minimum(P + chunk * C + C, P + T), BN):
            keys = start + tl.arange(0, BN)
            scores, counted = _scores(near, near_key + batch * k_b + group * k_g, live + batch * l_b, keys, tokens, k_t, l_t, T, P, W, K, BK, SCALE, ACC, NEAR)
            scores = tl.where(counted, scores, LOWEST)
            best = tl.max(scores, 1)
            at = tl.where(best > high, start + tl.argmax(scores, 1).to(tl.int32), at)
            new = tl.maximum(high, best)
            weights = tl.where(counted, tl.exp(scores - new[:, None]), 0.0)
            fade = tl.exp(high - new)
            v = _down(value, keys, v_t, keys < P + T, columns, D, ACC)
            total = _dot(weights, v, total * fade[:, None], NEAR)
            norm = norm * fade + tl.sum(weights, 1)
            high = new
        some = tl.load(share + group * R + r).to(ACC)
        total *= some
        norm *= some
        if first:
            tl.store(top + here, high, mask=tokens < T)
            tl.store(place + here, at, mask=tokens < T)

    query += batch * x_b + group * x_g + r * x_r
    key += batch * f_b + group * f_g
    head = pair * RS + (r if RS > 1 else 0)
    level += head * chunks * C
    there = tokens - shift
    within = tl.zeros((C, C), ACC)
    for start in range(0, M, BM):
        features = start + tl.arange(0, BM)
        q = _down(query, tokens, x_t, tokens < T, features, M, ACC)
        k = _across(key, tokens, f_t, (there >= 0) & (tokens < T), features, M, ACC)
        within = _dot(q, k, within, MUL)
        if DECAY:
            q = q * tl.exp(tl.load(level + tokens))[:, None]
        before = (head * chunks + chunk) * M + features
        state = _down(states, before, D, features < M, columns, D, ACC)
        total = _dot(q, state, total, MUL)
        if NORM:
            norm += tl.sum(q * tl.load(norms + before, mask=features < M, other=0.0)[None, :], 1)
    if DECAY:
        levels = tl.load(level + tokens)
        within *= _fades(levels[:, None], levels[None, :])
    within = tl.where(tokens[:, None] >= tokens[None, :], within, 0.0)
    v = _down(value, there, v_t, (there >= 0) & (tokens < T), columns, D, ACC)
    # Weights that nothing has divided yet may be too large for float16.
    total = _dot_weights(within, v, total, MUL if NEAR == tl.float16 else NEAR)  # noqa: SIM300
    if NORM:
        norm += tl.sum(within, 1)
        total = total / tl.maximum(norm, LEAST)[:, None]
        if first:
            tl.store(scales + here, tl.where(norm >= LEAST, 1.0 / tl.maximum(norm, LEAST), 0.0), mask=tokens < T)
    _store(out + here[:, None] * D + columns[None, :], total, (tokens < T)[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _step(  # type: ignore[no-untyped-def]
    query, key, value, fall, first, near_query, near_key, live, share, out, last,
    x_b, x_g, x_r, f_b, f_g, v_b, v_g, v_t, q_b, q_g, q_r, k_b, k_g, k_t, l_b, l_t, shift, P, W,
    G: tl.constexpr, R: tl.constexpr, RS: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr, SCALE: tl.constexpr, DECAY: tl.constexpr,
    NORM: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr, MUL: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Take one token into a state, and compute some columns of its outputs for all query heads that have it: they are the rows of a tile."""
    columns, head, rows = tl.program_id(0) * BD + tl.arange(0, BD), tl.program_id(1).to(tl.int64), tl.arange(0, ROWS)
    own, batch, group = head % RS, head // (RS * G), head // RS % G
    value += batch * v_b + group * v_g
    total, norm, real = tl.zeros((ROWS, BD), ACC), tl.zeros((ROWS,), ACC), rows < HEADS
    if WINDOW:
        wide = tl.arange(0, BK)
        near = _down(near_query + batch * q_b + group * q_g, own + rows, q_r, real, wide, K, ACC)
        high = tl.full((ROWS,), LOWEST, ACC)
        for start in range(tl.maximum(0, P - W + 1), P + 1, BN):
            keys = start + tl.arange(0, BN)
            now = tl.zeros((ROWS,), tl.int32)
            scores, counted = _scores(near, near_key + batch * k_b + group * k_g, live + batch * l_b, keys, now, k_t, l_t, 1, P, W, K, BK, SCALE, ACC, NEAR)
            scores = tl.where(counted, scores, LOWEST)
            new = tl.maximum(high, tl.max(scores, 1))
            weights = tl.where(counted, tl.exp(scores - new[:, None]), 0.0)
            v = _down(value, keys, v_t, keys <= P, columns, D, ACC)
            total = _dot(weights, v, total * tl.exp(high - new)[:, None], NEAR)
            norm = norm * tl.exp(high - new) + tl.sum(weights, 1)
            high = new
        some = tl.load(share + group * R + own + rows, mask=real, other=0.0).to(ACC)
        total *= some[:, None]
        norm *= some
    width: tl.constexpr = D + NORM
    fade = tl.exp(tl.load(fall + head)).to(ACC) if DECAY else 1.0
    v = _load(value - shift * v_t + columns, (columns < D) & (columns >= shift * D), ACC)
    for start in range(0, M, BM):
        features = start + tl.arange(0, BM)
        inside = (features < M)[:, None] & (columns < D)[None, :]
        place = (head * M + features) * width
        k = _load(key + batch * f_b + group * f_g + features, (features < M) & (features >= shift * M), ACC).to(ACC)
        state = tl.load(first + place[:, None] + columns[None, :], mask=inside, other=0.0) * fade + k[:, None] * v.to(ACC)[None, :]
        tl.store(last + place[:, None] + columns[None, :], state, mask=inside)
        q = _down(query + batch * x_b + group * x_g, own + rows, x_r, real, features, M, ACC)
        total = _dot(q, state, total, MUL)
        if NORM:
            sums = tl.load(first + place + D, mask=features < M, other=0.0) * fade + k
            norm += tl.sum(q * sums[None, :], 1)
            if tl.program_id(0) == 0:
                tl.store(last + place + D, sums, mask=features < M)
    if NORM:
        total = total / tl.maximum(norm, LEAST)[:, None]
    line = ((batch * G + group) * R + own + rows) * D
    _store(out + line[:, None] + columns[None, :], total, real[:, None] & (columns < D)[None, :])
