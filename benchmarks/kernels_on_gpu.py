"""Hold every kernel to its reference in float64 on a GPU, at sizes that models have: `python benchmarks/kernels_on_gpu.py`. Exits with 1 where one is wrong."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.chunked_attention import SHAPES, doubled, given, leaves
from effconvert.kernels._divergences import outcomes
from effconvert.kernels._kinds import KINDS, SPARSE_KINDS
from effconvert.kernels.chunked_attention import chunked_attention, chunked_attention_reference
from effconvert.kernels.decode_attention import decode_attention, decode_attention_reference
from effconvert.kernels.divergence import divergence, divergence_reference
from effconvert.kernels.experts import ACTIVATIONS, experts, experts_reference
from effconvert.kernels.sparse_divergence import sparse_divergence, sparse_divergence_reference

TWICE = 2  # times the error of plain PyTorch in the same type


def of_divergence():
    """Yield the name of each case of the distillation loss, the largest error of the kernel, and that of the reference in the same type."""
    sizes = ((64, 49152, 49152), (64, 128256, 128000), (33, 1001, 1001), (1, 32000, 32064))
    for kind, dtype, (rows, columns, theirs) in itertools.product(KINDS, (torch.float32, torch.float16, torch.bfloat16), sizes):
        draw = torch.Generator("cuda").manual_seed(0)
        student, teacher = (3 * torch.randn(rows, count, generator=draw, device="cuda") for count in (columns, theirs))
        labels = torch.arange(rows, device="cuda") % min(columns, theirs)
        results = []
        for function, kept in ((divergence_reference, torch.float64), (divergence, dtype), (divergence_reference, dtype)):
            given = student.to(dtype).to(kept).detach().requires_grad_()  # one of its own, whatever the types
            losses = function(given, teacher.to(dtype).to(kept), labels, kind, 2.0, 0.75, 0.25)
            losses.sum().backward()
            results.append((losses.detach().double(), given.grad.double()))
        for what, exact, kernel, plain in zip(("losses", "gradient"), *results, strict=True):
            errors = [float((some - exact).abs().max() / exact.abs().max()) for some in (kernel, plain)]
            yield f"divergence {kind} {dtype} {rows} x {columns}, {theirs} {what}", *errors


def of_sparse_divergence():
    """The same of the loss towards samples, or the likeliest ids and a tail."""
    sizes = ((64, 49152, 49152, 64), (64, 128256, 128000, 64), (33, 1001, 1001, 1000), (5, 49152, 49152, 3000))
    for kind, dtype, (rows, columns, vocabulary, count) in itertools.product(SPARSE_KINDS, (torch.float32, torch.float16, torch.bfloat16), sizes):
        draw = torch.Generator("cuda").manual_seed(0)
        student, teacher = (3 * torch.randn(rows, count, generator=draw, device="cuda") for count in (columns, vocabulary))
        labels, ids = torch.arange(rows, device="cuda") % vocabulary, teacher.topk(count).indices
        weights = torch.rand(rows, count, generator=draw, device="cuda") + 0.1
        numbers = weights / weights.sum(-1, keepdim=True) if kind == "samples" else outcomes(teacher.log_softmax(-1), ids)
        results = []
        for function, kept in ((sparse_divergence_reference, torch.float64), (sparse_divergence, dtype), (sparse_divergence_reference, dtype)):
            given = student.to(dtype).to(kept).detach().requires_grad_()  # one of its own, whatever the types
            losses = function(given, ids, numbers, labels, kind, vocabulary, 2.0, 0.75, 0.25)
            losses.sum().backward()
            results.append((losses.detach().double(), given.grad.double()))
        for what, exact, kernel, plain in zip(("losses", "gradient"), *results, strict=True):
            errors = [float((some - exact).abs().max() / exact.abs().max()) for some in (kernel, plain)]
            yield f"sparse_divergence {kind} {dtype} {rows} x {columns}, {count} ids of {vocabulary} {what}", *errors


def of_decode_attention():
    """The same of a decoding step: odd groups, unequal widths, lengths, a window with sinks, masks, a soft-cap; at last a replayed CUDA graph."""
    limits = {"start": [0, 700], "stop": [4000, 3001]}
    cases = [  # KV heads, query heads for each, tokens, keys, widths, options
        *((8, shared, 1, 4096, 128, 128, {}) for shared in (1, 3, 6, 9, 12, 36)),
        (3, 3, 1, 4001, 64, 64, limits),
        (2, 6, 3, 4096, 80, 80, {**limits, "window": 1000, "sinks": 4}),
        (1, 32, 1, 4096, 96, 48, {"softcap": 20.0}),
        (1, 128, 1, 2048, 576, 512, {}),
        (2, 9, 1, 4096, 100, 60, {"window": 512, "sinks": [4, 0], "sink_query": True}),
        (8, 3, 4, 3000, 128, 128, {"mask": True}),
        (8, 9, 1, 3000, 64, 64, {"mask": True}),
        (1, 9, 1, 131072, 64, 64, {}),
    ]
    types = [(torch.bfloat16, cases), (torch.float16, cases[6:9]), (torch.float32, [cases[1], *cases[6:8]])]  # each is compiled anew, for a second or two
    for dtype, (kv_heads, shared, tokens, keys, width, value_width, how) in [(dtype, case) for dtype, some in types for case in some]:
        draw = torch.Generator("cuda").manual_seed(0)
        sizes = (kv_heads * shared, tokens, width), (kv_heads, keys, width), (kv_heads, keys, value_width), (kv_heads * shared, tokens, width)
        *inputs, far = (torch.randn(2, *size, generator=draw, device="cuda").to(dtype) for size in sizes)
        options = {name: torch.tensor(value, device="cuda") if isinstance(value, list) else value for name, value in how.items()}
        if "mask" in how:
            options["mask"] = torch.rand(2, tokens, keys, generator=draw, device="cuda") > 0.3
        results = []
        for function, kept in ((decode_attention, dtype), (decode_attention_reference, dtype), (decode_attention_reference, torch.float64)):
            others = {"sink_query": far.to(kept)} if "sink_query" in how else {}
            results.append(function(*(tensor.to(kept) for tensor in inputs), **{**options, **others}))
        kernel, plain, exact = results
        name = f"decode_attention {dtype} {kv_heads} x {shared} heads, {tokens} of {keys} tokens, {width} + {value_width}, {', '.join(how)}"
        yield name, *(float((some.double() - exact).abs().max() / exact.abs().max()) for some in (kernel, plain))
    kernel, graph = decode_attention(*inputs), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = decode_attention(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    yield "decode_attention in a CUDA graph, from the same without", float((again - kernel).abs().max()), 0.0


def of_chunked_attention():
    """The same of linear attention, with and without a window: outputs, state and each gradient, behind left padding; and a step."""
    cases = [(shape, tokens, torch.bfloat16) for tokens in (1000, 1) for shape in SHAPES] + [(next(iter(SHAPES)), 1000, torch.float32)]
    for shape, tokens, dtype in cases:
        arguments = given(*SHAPES[shape], 2, tokens, "cuda", dtype)
        if "window" in arguments and tokens > 1:
            arguments["window"].live[1, :500] = False
            arguments["key"][1, :, :500] = 0
        results = []
        for function, kept in ((chunked_attention, arguments), (chunked_attention_reference, arguments), (chunked_attention_reference, doubled(arguments))):
            for some in leaves(kept):
                some.requires_grad_(tokens > 1)
            out, state = function(**kept)
            weights = (8 * torch.arange(out.numel(), device="cuda").view(out.shape).cos()).round() / 8  # which all types have exactly
            weights[1, ..., :500, :] *= tokens == 1 or "window" not in kept  # the reference's gradients of padding are those of a division by nearly 0
            loss = (out * weights).sum() + state.sum() * 0.01
            results.append([out.detach(), state.detach(), *(torch.autograd.grad(loss, leaves(kept)) if tokens > 1 else [])])
        whats = ("outputs", "state", *(f"gradient {number}" for number in range(len(results[0]) - 2)))
        for what, kernel, plain, exact in zip(whats, *results, strict=True):
            errors = [float((some.double() - exact).abs().max() / exact.abs().max()) for some in (kernel, plain)]
            yield f"chunked_attention {shape}, {dtype}, {tokens} tokens, {what}", errors[0], max(errors[1], torch.finfo(arguments["value"].dtype).eps / 2)


def of_experts():
    """The same of the experts of a decoding step, and whether a CUDA graph can be made of it."""
    sizes = ((1, 6, 2, 576, 192), (16, 8, 2, 2048, 1408), (5, 60, 4, 1000, 700))  # tokens, experts, choices, M, I
    cases = [
        *zip(sizes, ("silu", "silu", "gelu"), (torch.bfloat16,) * 3, strict=True),
        (sizes[2], "relu", torch.float32),
        (sizes[0], "gelu-tanh", torch.float16),
    ]
    assert {activation for _, activation, _ in cases} == ACTIVATIONS.keys()
    for (tokens, count, choices, hidden, width), activation, dtype in cases:
        draw = torch.Generator("cuda").manual_seed(0)
        shapes = ((tokens, hidden), (count, 2 * width, hidden), (count, hidden, width))
        tensors = [(torch.randn(*shape, generator=draw, device="cuda") * shape[-1] ** (-0.5 * (len(shape) > 2))).to(dtype) for shape in shapes]
        weights, chosen = torch.rand(tokens, count, generator=draw, device="cuda").topk(choices)
        results = []
        for function, kept in ((experts, dtype), (experts_reference, dtype), (experts_reference, torch.float64)):
            results.append(function(*(tensor.to(kept) for tensor in tensors), chosen, weights.to(dtype).to(kept), activation).double())
        kernel, plain, exact = results
        name = f"experts {dtype} {tokens} tokens, {choices} of {count}, {hidden} x {width}, {activation}"
        yield name, *(float((some - exact).abs().max() / exact.abs().max()) for some in (kernel, plain))
    given = (*tensors, chosen, weights.to(dtype), activation)
    kernel, graph = experts(*given), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = experts(*given)
    graph.replay()
    torch.cuda.synchronize()
    yield "experts in a CUDA graph, from the same without", float((again - kernel).abs().max()), 0.0


def main():
    """Print each case, and exit."""
    wrong = 0
    for name, error, plain in itertools.chain(of_decode_attention(), of_chunked_attention(), of_divergence(), of_sparse_divergence(), of_experts()):
        bad = not error <= max(TWICE * plain, 1e-6)
        wrong += bad
        print(f"{'WRONG' if bad else 'right'}  {name}: {error:.1e}, PyTorch {plain:.1e}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
