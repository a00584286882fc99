"""Time and peak memory of linear attention, with and without a window of softmax, by its kernels and by the reference, on one GPU.

    python benchmarks/chunked_attention.py -o benchmarks/results/chunked-attention-DATE.csv
    TRITON_INTERPRET=1 python benchmarks/chunked_attention.py --tiny      # on a CPU, to see that it runs

Needs torch and triton alone. `error` is how far outputs are from the reference in float64, relative to the largest (2,048 tokens at most); `tbps` and
`tflops` are the least bytes and operations of a forward pass (`cost`) a second. Rows are written as they come, the most telling first.
"""

import argparse
import csv
import datetime
import gc
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.distill_step import versions
from effconvert.kernels.chunked_attention import chunked_attention, chunked_attention_reference, cost
from effconvert.kernels.linear_attention import Window

FIELDS = ["shape", "pass", "form", "batch", "tokens", "ms", "ms_p20", "ms_p80", "peak_mb", "tbps", "tflops", "error", "card", "date", "versions"]
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
REPEATS, WARMUP = 10, 2


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
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    shapes = {"tiny": (1, 2, 16, 16, 8, 0), "tiny retention": (1, 2, 16, 16, 0, 2)} if chosen.tiny else SHAPES
    cells = [("forward", 1, 20), ("with gradients", 1, 20), ("step", 2, 1)] if chosen.tiny else CELLS
    file = chosen.output.open("a", newline="") if chosen.output else sys.stdout
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    common = {"card": torch.cuda.get_device_name() if cuda else "CPU", "date": datetime.datetime.now(datetime.UTC).date(), "versions": versions()}
    for which, batch, tokens in cells:
        for shape, sizes in shapes.items():
            for form, function in (("effconvert", chunked_attention), ("reference", chunked_attention_reference)):
                gc.collect()
                try:
                    arguments = given(*sizes, batch, tokens, device, dtype)
                    with torch.no_grad():
                        error = float("nan")
                        if tokens <= 2048:
                            exact = chunked_attention_reference(**doubled(arguments))[0]
                            error = float((function(**arguments)[0] - exact).abs().max() / exact.abs().max())
                    times, peak = timed(call(function, arguments, which == "with gradients"), cuda)
                except Exception as problem:
                    print(f"{form}, {shape}, {which}, {tokens} tokens: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
                    continue
                groups, shared, width, features, window, states = sizes
                item = arguments["value"].itemsize
                least = cost(batch, groups, shared, tokens, features, width, window, max(1, states), of_value=item)
                middle = times[len(times) // 2]
                numbers = {"ms": middle, "ms_p20": times[len(times) // 5], "ms_p80": times[len(times) * 4 // 5]}
                row = {
                    "shape": shape,
                    "pass": which,
                    "form": form,
                    "batch": batch,
                    "tokens": tokens,
                    "peak_mb": f"{peak:.1f}",
                    "error": f"{error:.1e}",
                    **common,
                }
                rates = {"tbps": least.bytes, "tflops": least.flops} if which != "with gradients" else {}
                row |= {name: f"{value:.4f}" for name, value in numbers.items()} | {name: f"{value / middle / 1e9:.3f}" for name, value in rates.items()}
                writer.writerow(row)
                file.flush()
                del arguments


if __name__ == "__main__":
    main()
