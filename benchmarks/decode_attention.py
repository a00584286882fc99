"""Time of a decoding step's attention in several forms on one GPU, beside the time to copy as many bytes.

Needs torch and triton alone; benchmarks/on_gpu.py has its command line. Every form is held to the reference in float32 before it is timed; the L2 cache is
cold. `ms` is a call from Python, `ms_graph` a replay of it as a CUDA graph. `share` is the least bytes of the step (`cost`) a second, by ms_graph, of the
bytes a second that a copy moves here. Rows are written as they come, the most telling first. --rest adds other backends of flex_attention.
"""

import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.on_gpu import Table, left_out
from effconvert.kernels.decode_attention import cost, decode_attention, decode_attention_reference

FIELDS = ["form", "shape", "batch", "heads", "kv_heads", "keys", "width", "value_width", "ms", "ms_p20", "ms_p80", "ms_graph", "share", "error"]
FIELDS += ["copy_tbps"]
STREAM = {"window": 1024, "sinks": 4}
SHAPES = [  # name, batch, KV heads, query heads for each, keys, widths, options, whether slow compilers are tried
    ("G 3", 16, 8, 3, 4096, 128, 128, {}, True),
    ("G 9, D 64", 16, 8, 9, 4096, 64, 64, {}, True),
    ("G 6", 16, 8, 6, 4096, 128, 128, {}, False),
    ("G 12", 16, 8, 12, 4096, 128, 128, {}, False),
    ("G 36", 16, 8, 36, 4096, 128, 128, {}, False),
    ("G 4", 16, 8, 4, 4096, 128, 128, {}, False),
    ("one text", 1, 8, 3, 32768, 128, 128, {}, True),
    ("mqa, one text", 1, 1, 9, 32768, 64, 64, {}, False),
    ("one narrow head", 16, 1, 32, 8192, 96, 48, {}, False),
    ("latents", 16, 1, 128, 4096, 576, 512, {}, False),
    ("window and sinks", 16, 8, 3, 32768, 128, 128, STREAM, False),
    ("left padding by a mask", 16, 8, 3, 4096, 128, 128, {"mask": True}, False),
    ("short", 16, 8, 3, 512, 128, 128, {}, False),
    ("many texts", 64, 8, 3, 4096, 128, 128, {}, False),
]
REST = [  # the same of every number of query heads, from short to long, for one text and for many
    *(
        (f"G {shared}, D {width}", batch, 8, shared, keys, width, width, {}, (shared, width) == (3, 128) and batch < 64)
        for keys, batch, width, shared in itertools.product((1024, 4096, 16384, 131072), (1, 16, 64), (64, 128), (1, 2, 3, 4, 6, 8, 9, 12, 36))
        if keys * batch <= 2**21
    ),
    *(("latents", batch, 1, 128, keys, 576, 512, {}, False) for keys, batch in ((4096, 1), (32768, 1), (131072, 1), (16384, 16))),
    *(("one narrow head", batch, 1, 32, keys, 96, 48, {}, False) for keys, batch in ((4096, 1), (32768, 1), (131072, 1), (32768, 16))),
    *(("window and sinks", batch, 8, shared, keys, 128, 128, STREAM, False) for batch, shared, keys in itertools.product((1, 16), (3, 9), (4096, 131072))),
    *(("left padding by a mask", 16, 8, shared, 4096, 128, 128, {"mask": True}, False) for shared in (1, 6, 9)),
]
TINY = [("tiny", 1, 2, 3, 40, 16, 16, {}, False), ("tiny window", 1, 2, 3, 40, 16, 16, {"window": 8, "sinks": 2}, False)]
REPEATS, WARMUP = (25, 3) if torch.cuda.is_available() else (1, 1)
COLD = 2**29  # bytes that are written between two calls: ten times an L2 cache, and long enough for Python to be ahead of the card


def sdpa(query, key, value, mask=None, **_):
    """As transformers calls it: grouped without a mask and with equal widths, packed otherwise."""
    if mask is None and key.shape[-1] == value.shape[-1] <= 256:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)
    packed = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    return scaled_dot_product_attention(packed, key, value, None if mask is None else mask[:, None]).flatten(1, 2)[:, :, None]


def flex(**how):
    """flex_attention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value, **_: compiled(query, key, value, enable_gqa=True, kernel_options=how or None)


def forms(options, slow, rest):
    """Yield the name and the function of each form for a shape; those that are compiled for seconds only where asked for."""
    yield "effconvert", decode_attention
    if "window" not in options:
        yield "sdpa", sdpa
    if slow:
        yield "flex_attention", flex()
        for backend in ("FLASH", "TRITON_DECODE") if rest else ():
            yield f"flex_attention, {backend}", flex(BACKEND=backend)
        yield "reference, torch.compile", torch.compile(decode_attention_reference, dynamic=False)
    yield "reference", decode_attention_reference


def timed(function, cold):
    """Return the milliseconds of each repetition, with a cold cache."""
    found, cuda = [], cold.is_cuda
    for _ in range(WARMUP + REPEATS):
        cold.zero_()
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            function()
            found.append(1e3 * (time.perf_counter() - began))
    return sorted(found[WARMUP:])


def copy_rate(count, cold):
    """Return the bytes a second that a copy of so many reads and writes, in TB/s."""
    source, target = (torch.empty(count, dtype=torch.uint8, device=cold.device) for _ in range(2))
    return 2 * count / statistics.median(timed(lambda: target.copy_(source), cold)) / 1e9


def as_graph(function):
    """Return a replay of a call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def main():
    """Measure, and append to a CSV."""
    table = Table(FIELDS)
    cuda, device, dtype = table.cuda, table.device, table.dtype
    cold = torch.empty(COLD if cuda else 16, dtype=torch.uint8, device=device)
    copied = copy_rate(2**30 if cuda else 2**20, cold)
    for shape, batch, kv_heads, shared, keys, width, value_width, options, slow in TINY if table.tiny else REST if table.rest else SHAPES:
        draw = torch.Generator(device).manual_seed(0)
        sizes = (kv_heads * shared, 1, width), (kv_heads, keys, width), (kv_heads, keys, value_width)
        inputs = [torch.randn(batch, *size, generator=draw, device=device, dtype=dtype) for size in sizes]
        if "mask" in options:
            begins = torch.arange(batch, device=device) * keys // (2 * batch)
            options = {"mask": torch.arange(keys, device=device) >= begins[:, None, None]}
        exact = decode_attention_reference(*(tensor.float() for tensor in inputs), **options)
        seen = min(keys, options["window"] + options["sinks"]) if "window" in options else keys
        least = cost(batch, kv_heads * shared, kv_heads, seen, width, value_width, itemsize=dtype.itemsize).bytes
        row = {"shape": shape, "batch": batch, "heads": kv_heads * shared, "kv_heads": kv_heads, "keys": keys, "width": width, "value_width": value_width}
        for form, function in forms(options, slow and cuda, table.rest):
            try:

                def call(function=function, inputs=inputs, options=options):
                    return function(*inputs, **options)

                with torch.no_grad():
                    error = float((call().float() - exact).abs().max() / exact.abs().max())
                    times = timed(call, cold)
                    graph = statistics.median(timed(as_graph(call), cold)) if cuda else statistics.median(times)
            except Exception as problem:
                left_out(f"{form}, {shape}", problem)
                continue
            found = {"ms_graph": f"{graph:.4f}", "share": f"{least / graph / 1e9 / copied:.3f}", "error": f"{error:.1e}", "copy_tbps": f"{copied:.3f}"}
            table.add(times, {"form": form, **row, **found})


if __name__ == "__main__":
    main()
