"""Time of the experts of a decoding step in several forms on one GPU, beside the time to copy as many bytes.

Needs torch and triton; transformers' own forms are timed where it is installed. benchmarks/on_gpu.py has the command line. Every form is held to the
reference in float32 before it is timed; the L2 cache is cold. `share` is the least bytes of the step (`cost`) a second, by a replay as a CUDA graph
(`ms_graph`), of the bytes a second that a copy moves here. All cells are for benchmarks/gpu-rest.sh.
"""

import itertools
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.decode_attention import COLD, as_graph, copy_rate, timed
from benchmarks.on_gpu import Table, baselines, left_out
from effconvert.kernels.experts import cost, experts, experts_reference

FIELDS = ["form", "shape", "tokens", "experts", "choices", "hidden", "width", "ms", "ms_p20", "ms_p80", "ms_graph", "share", "error", "copy_tbps"]
SHAPES = {  # experts, choices, hidden width, width of an expert
    "SmolLM2, moe-split of 8, 4 active, 2 of them shared": (6, 2, 576, 192),
    "a 1B model, moe-split of 8, 4 active": (8, 4, 2048, 1024),
    "mixtral": (8, 2, 4096, 14336),
    "qwen2_moe": (60, 4, 2048, 1408),
    "half of a qwen3_moe": (64, 8, 2048, 768),
}
TINY = {"tiny": (4, 2, 32, 16)}


def of_transformers(name, gate_up, down):
    """Return a form of transformers, of hidden states, ids and weights."""
    from transformers.integrations import moe

    module = SimpleNamespace(
        gate_up_proj=gate_up, down_proj=down, num_experts=len(down), act_fn=silu, has_gate=True, has_bias=False, is_transposed=False,
        is_concatenated=True, has_post_expert_norm=False, _is_expert_parallel=False,
    )  # fmt: skip
    module._apply_gate = lambda both: silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]
    function = getattr(moe, f"{name}_experts_forward")
    return lambda hidden, _, __, chosen, weights: function(module, hidden, chosen, weights)


def forms(gate_up, down, slow):
    """Yield the name and the function of each form; compiled ones only where asked for."""
    yield "effconvert", experts
    names = ("grouped_mm", "batched_mm")
    yield from baselines(*((name, lambda name=name: of_transformers(name, gate_up, down)) for name in names))
    if slow:
        yield from baselines(("batched_mm, torch.compile", lambda: torch.compile(of_transformers("batched_mm", gate_up, down), dynamic=False)))


def main():
    """Measure, and append to a CSV."""
    table = Table(FIELDS)
    device, dtype = table.device, table.dtype
    cold = torch.empty(COLD if table.cuda else 16, dtype=torch.uint8, device=device)
    copied = copy_rate(2**30 if table.cuda else 2**20, cold)
    for (shape, sizes), tokens in itertools.product((TINY if table.tiny else SHAPES).items(), (1, 4, 16)):
        count, choices, hidden, width = sizes
        draw = torch.Generator(device).manual_seed(0)
        gate_up, down = (0.02 * torch.randn(count, *form, generator=draw, device=device, dtype=dtype) for form in ((2 * width, hidden), (hidden, width)))
        inputs = torch.randn(tokens, hidden, generator=draw, device=device, dtype=dtype)
        scores = torch.rand(tokens, count, generator=draw, device=device)
        weights, chosen = scores.topk(choices)
        given = (inputs, gate_up, down, chosen, weights.to(dtype))
        exact = experts_reference(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in given))
        least = cost(tokens, len(chosen.unique()), hidden, width, choices, dtype.itemsize).bytes
        row = {"shape": shape, "tokens": tokens, "experts": count, "choices": choices, "hidden": hidden, "width": width}
        for form, function in forms(gate_up, down, table.cuda and tokens == 1):
            try:

                def call(function=function, given=given):
                    return function(*given)

                with torch.no_grad():
                    error = float((call().float() - exact).abs().max() / exact.abs().max())
                    times = timed(call, cold)
                    graph = statistics.median(timed(as_graph(call), cold)) if table.cuda else statistics.median(times)
            except Exception as problem:
                left_out(f"{form}, {shape}, {tokens} tokens", problem)
                continue
            found = {"ms_graph": f"{graph:.4f}", "share": f"{least / graph / 1e9 / copied:.3f}", "error": f"{error:.1e}", "copy_tbps": f"{copied:.3f}"}
            table.add(times, {"form": form, **row, **found})


if __name__ == "__main__":
    main()
