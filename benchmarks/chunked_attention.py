"""Time and peak memory of linear attention, with and without a window of softmax, by its kernels and by the reference, on one GPU.

Needs torch and triton alone; benchmarks/on_gpu.py has its command line. With --rest also the reference by torch.compile, and where there is no window
flash-linear-attention, if it is installed. `error` is how far outputs are from the reference in float64, relative to the largest (2,048 tokens at most);
`tbps` and `tflops` are the least bytes and operations of a forward pass (`cost`) a second. Rows are written as they come, the most telling first.
"""

import gc
import itertools
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.on_gpu import Table, baselines, left_out
from effconvert.kernels.chunked_attention import chunked_attention, chunked_attention_reference, cost
from effconvert.kernels.linear_attention import Window

FIELDS = ["shape", "pass", "form", "batch", "tokens", "ms", "ms_p20", "ms_p80", "peak_mb", "tbps", "tflops", "error"]
SHAPES = {  # KV heads, query heads that share one, width, features, window, states for a KV head
    "lolcats, 9 heads of 64": (3, 3, 64, 128, 64, 0),
    "lolcats, 32 heads of 128": (8, 4, 128, 256, 64, 0),
    "retention, 9 heads of 64": (3, 3, 64, 64, 0, 3),
}
CELLS = [  # pass, batch, tokens
    ("forward", 1, 2048),
    ("with gradients", 1, 2048),
    ("forward", 1, 32768),
    ("step", 64, 1),
    ("with gradients", 1, 8192),
    ("forward", 1, 8192),
    ("with gradients", 1, 32768),
    ("step", 1, 1),
]
REST_SHAPES = SHAPES | {
    "lolcats, 8 of 32 heads of 64": (8, 4, 64, 128, 64, 0),
    "lolcats, window of 256": (8, 4, 128, 256, 256, 0),
    "retention, 16 heads of 128": (16, 1, 128, 128, 0, 1),
    "retention, 8 of 32 heads of 128": (8, 4, 128, 128, 0, 4),
}
REST = [
    *itertools.product(("forward", "with gradients"), (1,), (512, 2048, 8192, 32768, 131072)),
    *itertools.product(("forward", "with gradients"), (16,), (512, 2048)),
    *itertools.product(("step",), (1, 4, 16, 64, 256), (1,)),
]
TINY_SHAPES, TINY = {"tiny": (1, 2, 16, 16, 8, 0), "tiny retention": (1, 2, 16, 16, 0, 2)}, [("forward", 1, 20), ("with gradients", 1, 20), ("step", 2, 1)]
REPEATS, WARMUP = (10, 2) if torch.cuda.is_available() else (1, 1)


def given(groups, shared, width, features, window, states, batch, tokens, device, dtype):
    """Return the arguments of a call, as a mixer makes them: features in float32, of which hedgehog's are a softmax."""
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape, kind=dtype):
        return torch.randn(*shape, generator=draw, device=device).to(kind)

    kind = torch.float32 if states else dtype
    some = {
        "query": random(batch, groups, shared, tokens, features, kind=torch.float32),
        "key": random(batch, groups, tokens, features, kind=torch.float32),
        "value": random(batch, groups, window + tokens, width, kind=kind),
        "state": torch.zeros(batch, groups, max(1, states), features, width + (not states), device=device),
    }
    if states:
        reach = torch.linspace(3, 12, groups * shared, device=device).view(1, groups, shared, 1)
        return some | {"fall": torch.log1p(-(2**-reach)).expand(batch, -1, -1, tokens).contiguous()}
    some |= {name: some[name].softmax(-1) for name in ("query", "key")} | {"least": 1e-30}
    live = torch.ones(batch, window + tokens, dtype=torch.bool, device=device)
    share = torch.full((groups, shared), 0.1, device=device)
    rows = random(batch, groups, shared, tokens, width), random(batch, groups, window + tokens, width)
    return some | {"window": Window(*rows, live, share, window, width**-0.5)}


def doubled(arguments):
    """Return the arguments in float64."""

    def double(some):
        return some.double() if isinstance(some, torch.Tensor) and some.is_floating_point() else some

    return {name: Window(*map(double, some)) if isinstance(some, Window) else double(some) for name, some in arguments.items()}


def leaves(arguments):
    """Return the tensors that have gradients in a mixer that is trained."""
    window = arguments.get("window")
    return [arguments[name] for name in ("query", "key", "value")] + ([window.query, window.key, window.share] if window else [])


def timed(function, cuda):
    """Return the milliseconds of each repetition, and the peak of memory beyond what there was, in MB."""
    found, before = [], torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP + REPEATS):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - began))
    return sorted(found[WARMUP:]), (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else 0


def fla(dtype):
    """The same by flash-linear-attention, where there is a decay and no window: a state for each query head, tokens before heads."""
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    def attend(query, key, value, state, fall):
        shared, tokens = query.shape[2], query.shape[3]
        queries = query.flatten(1, 2).transpose(1, 2).to(dtype)  # [B, T, H, m]
        keys, values = (rows.repeat_interleave(shared, 1).transpose(1, 2).to(dtype) for rows in (key, value))
        function = chunk_simple_gla if tokens > 1 else fused_recurrent_simple_gla
        how = {"scale": 1.0, "initial_state": state.flatten(1, 2), "output_final_state": True}
        out, after = function(queries, keys, values, fall.flatten(1, 2).mT, **how)
        return out.transpose(1, 2).unflatten(1, (-1, shared)), after.unflatten(1, (-1, shared))

    return attend


def forms(windowed, tokens, table):
    """Yield the name and the function of each form; each chunk of the reference is compiled for itself, so few of them."""
    yield "effconvert", chunked_attention
    yield "reference", chunked_attention_reference
    if table.rest and table.cuda and tokens <= 2048:
        yield "reference, torch.compile", torch.compile(chunked_attention_reference, dynamic=False)
    if table.rest and not windowed:
        yield from baselines(("fla", lambda: fla(torch.float32)), ("fla, bfloat16", lambda: fla(torch.bfloat16)))


def call(function, arguments, trained):
    """Return a pass: forward, or with gradients."""

    def forward():
        with torch.no_grad():
            return function(**arguments)

    def both():
        out, state = function(**arguments)
        torch.autograd.grad((out.sum(), state.sum()), leaves(arguments))

    for some in leaves(arguments):
        some.requires_grad_(trained)
    return both if trained else forward


def main():
    """Measure, and append to a CSV."""
    table = Table(FIELDS)
    cuda, shapes, cells = table.cuda, REST_SHAPES if table.rest else SHAPES, REST if table.rest else CELLS
    if table.tiny:
        shapes, cells = TINY_SHAPES, TINY
    for which, batch, tokens in cells:
        for shape, sizes in shapes.items():
            measure(table, which, batch, tokens, shape, sizes, cuda)


def measure(table, which, batch, tokens, shape, sizes, cuda):
    """Measure every form of a cell."""
    for form, function in forms(sizes[4] > 0, tokens, table):
        gc.collect()
        try:
            arguments = given(*sizes, batch, tokens, table.device, table.dtype)
            with torch.no_grad():
                error = float("nan")
                if tokens <= 2048:
                    exact = chunked_attention_reference(**doubled(arguments))[0]
                    error = float((function(**arguments)[0] - exact).abs().max() / exact.abs().max())
            times, peak = timed(call(function, arguments, which == "with gradients"), cuda)
        except Exception as problem:
            left_out(f"{form}, {shape}, {which}, {tokens} tokens", problem)
            continue
        groups, shared, width, features, window, states = sizes
        least = cost(batch, groups, shared, tokens, features, width, window, max(1, states), of_value=arguments["value"].itemsize)
        rates = {"tbps": least.bytes, "tflops": least.flops} if which != "with gradients" else {}
        row = {"shape": shape, "pass": which, "form": form, "batch": batch, "tokens": tokens, "peak_mb": f"{peak:.1f}", "error": f"{error:.1e}"}
        table.add(times, row | {name: f"{value / times[len(times) // 2] / 1e9:.3f}" for name, value in rates.items()})
        del arguments


if __name__ == "__main__":
    main()
