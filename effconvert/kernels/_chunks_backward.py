"""The Triton kernels of the gradients of `chunked_attention`. `_scan` gives the states before chunks, and with BACK the gradients of those after them.

The weight w of a value for a query is that of a state, of a key of the chunk, or of the window; the gradient of w is g v - g o where all weights are divided
by their sum, with outputs o and their gradients g, and g v where not. `thirds` has -g o, and `scales` what weights are divided by, inverted.
No accumulator is transposed for a product: on Hopper that was seen to go wrong in some versions of triton. What is transposed is loaded twice.
"""
# Letters as in `_chunks`.

import triton
import triton.language as tl

from effconvert.kernels._chunks import VARYING, _across, _dot, _dot_weights, _down, _fades, _scores, _store


@triton.jit(do_not_specialize=VARYING)
def _totals(out, slope, thirds, g_b, g_g, g_r, g_t, T, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store minus the products of outputs and their gradients, `thirds` [B, G, R, T]: the gradient of a normaliser, a value of 1, but for its scale."""
    tokens, columns, head = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, BD), tl.program_id(1).to(tl.int64)
    slope += head // (G * R) * g_b + head // R % G * g_g + head % R * g_r
    outputs = _down(out, head * T + tokens, D, tokens < T, columns, D, ACC).to(ACC)
    slopes = _down(slope, tokens, g_t, tokens < T, columns, D, ACC).to(ACC)
    tl.store(thirds + head * T + tokens, -tl.sum(outputs * slopes, 1), mask=tokens < T)


@triton.jit(do_not_specialize=VARYING)
def _query_features(  # type: ignore[no-untyped-def]
    key, value, slope, scales, thirds, level, states, norms, to, f_b, f_g, f_t, v_b, v_g, v_t, g_b, g_g, g_r, g_t, shift, T, chunks,
    G: tl.constexpr, R: tl.constexpr, RS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr, MUL: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of some features of a chunk's queries of one head: from the keys of the chunk, and from the state before it."""
    features = tl.program_id(0) * BM + tl.arange(0, BM)
    chunk, r, pair = tl.program_id(1) // R, tl.program_id(1) % R, tl.program_id(2).to(tl.int64)
    batch, group, head = pair // G, pair % G, pair * RS + (r if RS > 1 else 0)
    tokens = chunk * C + tl.arange(0, C)
    there = tokens - shift
    level += head * chunks * C
    here = (pair * R + r) * T + tokens
    before = (head * chunks + chunk) * M + features
    weights, total = tl.zeros((C, C), ACC), tl.zeros((C, BM), ACC)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)
        g = _down(slope + batch * g_b + group * g_g + r * g_r, tokens, g_t, tokens < T, columns, D, ACC)
        v = _across(value + batch * v_b + group * v_g, there, v_t, (there >= 0) & (tokens < T), columns, D, ACC)  # [BD, C]
        weights = _dot(g, v, weights, NEAR)
        total = _dot(g, _across(states, before, D, features < M, columns, D, ACC), total, MUL)
    if NORM:
        third = tl.load(thirds + here, mask=tokens < T, other=0.0)[:, None]
        weights += third
        total += third * tl.load(norms + before, mask=features < M, other=0.0)[None, :]
    if DECAY:
        levels = tl.load(level + tokens)
        weights *= _fades(levels[:, None], levels[None, :])
        total *= tl.exp(levels)[:, None]
    weights = tl.where(tokens[:, None] >= tokens[None, :], weights, 0.0)
    k = _down(key + batch * f_b + group * f_g, tokens, f_t, (there >= 0) & (tokens < T), features, M, ACC)
    total = _dot(weights, k, total, MUL)
    if NORM:
        total *= tl.load(scales + here, mask=tokens < T, other=0.0)[:, None]
    _store(to + here[:, None] * M + features[None, :], total, (tokens < T)[:, None] & (features < M)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _key_features(  # type: ignore[no-untyped-def]
    query, value, slope, scales, thirds, level, states, norms, to, x_b, x_g, x_r, x_t, v_b, v_g, v_t, g_b, g_g, g_r, g_t, shift, T, chunks,
    G: tl.constexpr, R: tl.constexpr, RS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr, MUL: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of some features of a chunk's keys, for each of their states: from the queries of the chunk, and from the state after it."""
    features, chunk, head = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair, own = head // RS, head % RS
    batch, group = pair // G, pair % G
    tokens = chunk * C + tl.arange(0, C)
    there = tokens - shift
    level += head * chunks * C
    after = (head * chunks + chunk) * M + features
    value += batch * v_b + group * v_g
    total = tl.zeros((C, BM), ACC)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)
        v = _down(value, there, v_t, (there >= 0) & (tokens < T), columns, D, ACC)
        total = _dot(v, _across(states, after, D, features < M, columns, D, ACC), total, MUL)
    if NORM:
        total += tl.load(norms + after, mask=features < M, other=0.0)[None, :]
    if DECAY:
        total *= tl.exp(tl.load(level + chunk * C + C - 1) - tl.load(level + tokens))[:, None]
    for h in range(R // RS):
        r = own + h
        line = (pair * R + r) * T + tokens
        weights = tl.zeros((C, C), ACC)  # of keys and queries
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)
            v = _down(value, there, v_t, (there >= 0) & (tokens < T), columns, D, ACC)
            g = _across(slope + batch * g_b + group * g_g + r * g_r, tokens, g_t, tokens < T, columns, D, ACC)
            weights = _dot(v, g, weights, NEAR)
        if NORM:
            weights += tl.load(thirds + line, mask=tokens < T, other=0.0)[None, :]
            weights *= tl.load(scales + line, mask=tokens < T, other=0.0)[None, :]
        if DECAY:
            levels = tl.load(level + tokens)
            weights *= _fades(levels[None, :], levels[:, None])
        weights = tl.where(tokens[:, None] <= tokens[None, :], weights, 0.0)
        q = _down(query + batch * x_b + group * x_g + r * x_r, tokens, x_t, tokens < T, features, M, ACC)
        total = _dot(weights, q, total, MUL)
    total = tl.where((there >= 0)[:, None], total, 0.0)
    _store(to + (head * T + tokens)[:, None] * M + features[None, :], total, (tokens < T)[:, None] & (features < M)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _near_queries(  # type: ignore[no-untyped-def]
    query, key, value, live, slope, scales, thirds, share, top, place, losses, to,
    q_b, q_g, q_r, q_t, k_b, k_g, k_t, v_b, v_g, v_t, l_b, l_t, g_b, g_g, g_r, g_t, T, P, W,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the window's queries, a chunk of one head, and `losses` [B, G, R, T]: the sum of weights times their gradients."""
    chunk, r, pair = tl.program_id(0) // R, tl.program_id(0) % R, tl.program_id(1).to(tl.int64)
    batch, group = pair // G, pair % G
    tokens, wide = chunk * C + tl.arange(0, C), tl.arange(0, BK)
    real, here = tokens < T, (pair * R + r) * T + tokens
    q = _down(query + batch * q_b + group * q_g + r * q_r, tokens, q_t, real, wide, K, ACC)
    third, high = tl.load(thirds + here, mask=real, other=0.0), tl.load(top + here, mask=real, other=0.0)
    part = tl.load(scales + here, mask=real, other=0.0) * tl.load(share + group * R + r)
    key += batch * k_b + group * k_g
    total, loss = tl.zeros((C, BK), ACC), tl.zeros((C,), ACC)
    for start in range(tl.maximum(0, P + chunk * C - W + 1), tl.minimum(P + chunk * C + C, P + T), BN):
        keys = start + tl.arange(0, BN)
        scores, counted = _scores(q, key, live + batch * l_b, keys, tokens, k_t, l_t, T, P, W, K, BK, SCALE, ACC, NEAR)
        slopes = tl.zeros((C, BN), ACC) + third[:, None]
        for first in range(0, D, BD):
            columns = first + tl.arange(0, BD)
            g = _down(slope + batch * g_b + group * g_g + r * g_r, tokens, g_t, real, columns, D, ACC)
            v = _across(value + batch * v_b + group * v_g, keys, v_t, keys < P + T, columns, D, ACC)  # [BD, BN]
            slopes = _dot(g, v, slopes, NEAR)
        slopes *= tl.where(counted, tl.exp(tl.minimum(scores - high[:, None], 0.0)), 0.0) * part[:, None]
        loss += tl.sum(slopes, 1)
        k = _down(key, keys, k_t, keys < P + T, wide, K, ACC)
        total = _dot(slopes, k, total, NEAR)
    # All weights are relative to that of the largest score, so that score has a share in their gradients.
    highest = tl.load(place + here, mask=real, other=0).to(tl.int64)
    k = _down(key, highest, k_t, real, wide, K, ACC)
    total = (total - loss[:, None] * k) * SCALE
    tl.store(losses + here, loss, mask=real)
    _store(to + here[:, None] * K + wide[None, :], total, real[:, None] & (wide < K)[None, :])


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    k, query, late, there, alive, top, scales, line, q_t, T, P, W, some,
    K: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Return the weights of keys for later queries, divided as outputs are: [C of keys, BN of queries]."""
    real = late < T
    q = _across(query, late, q_t, real, tl.arange(0, BK), K, ACC)  # [BK, BN]
    far = P + late[None, :] - there[:, None]
    counted = (far >= 0) & (far < W) & (alive[:, None] & real[None, :])
    scores = _dot(k, q, tl.zeros((k.shape[0], late.shape[0]), ACC), NEAR) * SCALE
    weights = tl.where(counted, tl.exp(tl.minimum(scores - tl.load(top + line, mask=real, other=0.0)[None, :], 0.0)), 0.0)
    return weights * (tl.load(scales + line, mask=real, other=0.0) * some)[None, :]


@triton.jit(do_not_specialize=VARYING)
def _near_keys(  # type: ignore[no-untyped-def]
    query, key, value, live, slope, scales, thirds, share, top, place, losses, to,
    q_b, q_g, q_r, q_t, k_b, k_g, k_t, v_b, v_g, v_t, l_b, l_t, g_b, g_g, g_r, g_t, T, P, W,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of C of the window's keys: from the queries of all heads whose window they are in."""
    pair, there = tl.program_id(1).to(tl.int64), tl.program_id(0) * C + tl.arange(0, C)
    batch, group, kept = pair // G, pair % G, there < P + T
    wide = tl.arange(0, BK)
    alive = tl.load(live + batch * l_b + there * l_t, mask=kept, other=0) != 0
    k = _down(key + batch * k_b + group * k_g, there, k_t, kept, wide, K, ACC)
    value += batch * v_b + group * v_g
    first = tl.program_id(0) * C - P  # the query that stands at the first of these keys
    total = tl.zeros((C, BK), ACC)
    for r in range(R):
        some = tl.load(share + group * R + r)
        q = query + batch * q_b + group * q_g + r * q_r
        for start in range(tl.maximum(0, first), tl.minimum(first + C - 1 + W, T), BN):
            late = start + tl.arange(0, BN)
            real, line = late < T, (pair * R + r) * T + late
            weights = _weights(k, q, late, there, alive, top, scales, line, q_t, T, P, W, some, K, BK, SCALE, ACC, NEAR)
            slopes = tl.zeros((C, BN), ACC) + tl.load(thirds + line, mask=real, other=0.0)[None, :]
            for begin in range(0, D, BD):
                columns = begin + tl.arange(0, BD)
                v = _down(value, there, v_t, kept, columns, D, ACC)
                g = _across(slope + batch * g_b + group * g_g + r * g_r, late, g_t, real, columns, D, ACC)  # [BD, BN]
                slopes = _dot(v, g, slopes, NEAR)
            weights *= slopes
            highest = tl.load(place + line, mask=real, other=-1)[None, :] == there[:, None]
            weights -= tl.where(highest & alive[:, None], tl.load(losses + line, mask=real, other=0.0)[None, :], 0.0)
            total = _dot(weights, _down(q, late, q_t, real, wide, K, ACC), total, NEAR)
    _store(to + (pair * (P + T) + there)[:, None] * K + wide[None, :], total * SCALE, kept[:, None] & (wide < K)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _values(  # type: ignore[no-untyped-def]
    query, key, slope, scales, level, states, near_query, near_key, live, share, top, to,
    x_b, x_g, x_r, x_t, f_b, f_g, f_t, q_b, q_g, q_r, q_t, k_b, k_g, k_t, l_b, l_t, g_b, g_g, g_r, g_t, shift, T, P, W, chunks,
    G: tl.constexpr, R: tl.constexpr, RS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, MUL: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of some columns of C values: those whose features are a chunk of the sequence, or come after it."""
    chunk, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, group = pair // G, pair % G
    tokens, columns = chunk * C + tl.arange(0, C), tl.program_id(2) * BD + tl.arange(0, BD)  # from these tokens on features of the values are seen
    there = tokens - shift
    slope += batch * g_b + group * g_g
    total = tl.zeros((C, BD), ACC)
    if chunk < chunks:
        key += batch * f_b + group * f_g
        for own in range(RS):
            head = pair * RS + own
            levels, fade = level + head * chunks * C, tl.zeros((C,), ACC)
            if DECAY:
                fade = tl.exp(tl.load(levels + chunk * C + C - 1) - tl.load(levels + tokens))
            for start in range(0, M, BM):
                features = start + tl.arange(0, BM)
                k = _down(key, tokens, f_t, (there >= 0) & (tokens < T), features, M, ACC)
                if DECAY:
                    k = k * fade[:, None]
                state = _down(states, (head * chunks + chunk) * M + features, D, features < M, columns, D, ACC)
                total = _dot(k, state, total, MUL)
            for h in range(R // RS):
                r = own + h
                line = (pair * R + r) * T + tokens
                within = tl.zeros((C, C), ACC)  # of keys and queries
                for start in range(0, M, BM):
                    features = start + tl.arange(0, BM)
                    x = _down(key, tokens, f_t, (there >= 0) & (tokens < T), features, M, ACC)
                    q = _across(query + batch * x_b + group * x_g + r * x_r, tokens, x_t, tokens < T, features, M, ACC)
                    within = _dot(x, q, within, MUL)
                if DECAY:
                    within *= _fades(tl.load(levels + tokens)[None, :], tl.load(levels + tokens)[:, None])
                if NORM:
                    within *= tl.load(scales + line, mask=tokens < T, other=0.0)[None, :]
                within = tl.where(tokens[:, None] <= tokens[None, :], within, 0.0)
                g = _down(slope + r * g_r, tokens, g_t, tokens < T, columns, D, ACC)
                # Weights that nothing has divided may be too large for float16.
                total = _dot_weights(within, g, total, MUL if NEAR == tl.float16 and not NORM else NEAR)  # noqa: SIM300
    kept = (there >= 0) & (there < P + T)
    if WINDOW:
        alive = tl.load(live + batch * l_b + there * l_t, mask=kept, other=0) != 0
        near = _down(near_key + batch * k_b + group * k_g, there, k_t, kept, tl.arange(0, BK), K, ACC)
        for r in range(R):
            some = tl.load(share + group * R + r)
            late_query = near_query + batch * q_b + group * q_g + r * q_r
            for start in range(tl.maximum(0, chunk * C - W), tl.minimum(chunk * C + C - 1, T), BN):
                late = start + tl.arange(0, BN)
                line = (pair * R + r) * T + late
                weights = _weights(near, late_query, late, there, alive, top, scales, line, q_t, T, P, W, some, K, BK, SCALE, ACC, NEAR)
                total = _dot(weights, _down(slope + r * g_r, late, g_t, late < T, columns, D, ACC), total, NEAR)
    _store(to + (pair * (P + T) + there)[:, None] * D + columns[None, :], total, kept[:, None] & (columns < D)[None, :])
