"""The Triton kernels of `experts`, and how they are cut into programs: see there for the formula."""
# T = tokens, K = experts that each of them takes, E = experts, M = hidden width, F = width of an expert.

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from effconvert.kernels._decode import dot

PROGRAMS = 2 * 132  # as many as keep an H100 busy


class Tiles(NamedTuple):
    """How a kernel is cut: outputs of a program, inputs at a time, warps, stages of its pipeline."""

    outputs: int
    inputs: int
    warps: int
    stages: int


@lru_cache(None)
def tiles(outputs: int, inputs: int, matrices: int, itemsize: int) -> Tiles:
    """Return the tiles for `outputs` rows and `inputs` columns of each of `matrices`: fewer rows where that makes too few programs."""
    rows = next((rows for rows in (64, 32) if matrices * -(-outputs // rows) >= PROGRAMS), 16)
    widest = 2**13 // (rows * itemsize)  # columns, for 8 KB of a matrix at a time, and at least two times
    return Tiles(rows, max(16, min(256, widest, triton.next_power_of_2(inputs) // 2)), 4, 3)


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply the activation function to float32."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu-tanh":
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        return tl.maximum(gate, 0.0)


@triton.jit(do_not_specialize=["T"])
def inner(  # type: ignore[no-untyped-def]
    hidden, gate_up, chosen, weights, middle, h_t, g_e, g_i, c_t, w_t, T,
    M: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Compute some neurons of an expert for the tokens that take it, times their weights; 0 for others. No expert is read that no token takes."""
    expert = tl.program_id(1).to(tl.int64)
    rows, choices = tl.arange(0, ROWS), tl.arange(0, KP)
    there = (rows < T)[:, None] & (choices < K)[None, :]
    mine = there & (tl.load(chosen + rows[:, None] * c_t + choices[None, :], mask=there, other=-1) == expert)  # [ROWS, KP]
    takes = tl.max(mine.to(tl.int32), 1) != 0  # [ROWS]
    if tl.max(takes.to(tl.int32), 0) != 0:
        share = tl.sum(tl.load(weights + rows[:, None] * w_t + choices[None, :], mask=mine, other=0.0).to(tl.float32), 1)  # [ROWS]
        neurons = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = neurons < F
        own = gate_up + expert * g_e + neurons[None, :] * g_i  # [1, OUTPUTS]
        gate, up = tl.zeros((ROWS, OUTPUTS), tl.float32), tl.zeros((ROWS, OUTPUTS), tl.float32)
        for at in range(0, M, INPUTS):
            columns = at + tl.arange(0, INPUTS)
            here = columns < M
            inputs = tl.load(hidden + rows[:, None] * h_t + columns[None, :], mask=takes[:, None] & here[None, :], other=0.0)
            gate += dot(inputs, tl.load(own + columns[:, None], mask=here[:, None] & inside[None, :], other=0.0))
            up += dot(inputs, tl.load(own + F * g_i + columns[:, None], mask=here[:, None] & inside[None, :], other=0.0))
        values = tl.where(takes[:, None], _activated(gate, ACTIVATION) * up * share[:, None], 0.0)
        where = middle + (expert * T + rows)[:, None] * F + neurons[None, :]
        tl.store(where, values.to(middle.dtype.element_ty), mask=(rows < T)[:, None] & inside[None, :])


@triton.jit
def _either(a, b):  # type: ignore[no-untyped-def]
    return a | b


@triton.jit(do_not_specialize=["T", "E"])
def outer(  # type: ignore[no-untyped-def]
    middle, down, chosen, out, d_e, d_m, c_t, T, E,
    M: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Sum some outputs of all tokens over the experts that any of them takes."""
    rows, outputs = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    real, inside = rows < T, outputs < M
    pairs = tl.arange(0, ROWS * KP)  # of a token and a choice
    there = (pairs // KP < T) & (pairs % KP < K)
    numbers = tl.load(chosen + pairs // KP * c_t + pairs % KP, mask=there, other=0).to(tl.int64)
    taken = tl.reduce(tl.where(there, tl.full((ROWS * KP,), 1, tl.int64) << numbers, 0), 0, _either)  # a bit for each expert
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for expert in range(E):
        if (taken >> expert) & 1:
            number = tl.program_id(0).to(tl.int64) * 0 + expert  # products with strides may be larger than int32
            for at in range(0, F, INPUTS):
                neurons = at + tl.arange(0, INPUTS)
                here = neurons < F
                values = tl.load(middle + (number * T + rows)[:, None] * F + neurons[None, :], mask=real[:, None] & here[None, :], other=0.0)
                own = down + number * d_e + outputs[None, :].to(tl.int64) * d_m + neurons[:, None]
                total += dot(values, tl.load(own, mask=here[:, None] & inside[None, :], other=0.0))
    tl.store(out + rows[:, None] * M + outputs[None, :], total.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])
