"""Time and peak memory of the loss of one distillation step, with its gradients, in several forms on one GPU.

Needs torch and triton alone, so that it runs on a bare machine; Liger is measured beside it where it is installed. benchmarks/on_gpu.py has its command line.
With --rest also other divergences, shapes, and what a cache keeps of a teacher (64 samples, or the 64 likeliest ids and a tail). All forms of a loss get the
same numbers; how far their loss and gradients are from the first one's stands in their rows.
"""

import gc
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.on_gpu import Table, baselines, left_out
from effconvert.heal import _in_pieces
from effconvert.kernels._divergences import outcomes
from effconvert.kernels.divergence import divergence, divergence_reference
from effconvert.kernels.sparse_divergence import sparse_divergence, sparse_divergence_reference

FIELDS = ["loss", "form", "tokens", "hidden", "vocabulary", "dtype", "ms", "ms_p20", "ms_p80", "peak_mb", "loss_error", "gradient_error", "tflops"]
SHAPES = {"SmolLM2-135M": (8192, 576, 49152), "Llama-3.2-1B": (8192, 2048, 128256)}  # tokens, hidden width, vocabulary
REST_SHAPES = SHAPES | {"SmolLM2-135M, few tokens": (1024, 576, 49152), "Qwen3-0.6B": (8192, 1024, 151936), "Llama-3.1-8B": (4096, 4096, 128256)}
TINY = {"tiny": (6, 16, 96)}
LOSSES, REST_LOSSES = ("kl",), ("kl", "reverse-kl", "jsd", "samples", "kl of 64 ids")
BETAS = {"kl": 0.0, "reverse-kl": 1.0, "jsd": 0.5}  # as Liger calls them
KEPT = 64
REPEATS, WARMUP = (20, 3) if torch.cuda.is_available() else (1, 1)


def whole(function, hidden, weight, their_hidden, their_weight):
    """All logits at once."""
    return function(hidden @ weight.T, their_hidden @ their_weight.T, torch.full((len(hidden),), -100, device=hidden.device)).sum() / len(hidden)


def in_pieces(rows, function, hidden, weight, their_hidden, their_weight):
    """The loss of effconvert, so many tokens at a time."""
    labels = torch.full((len(hidden),), -100, device=hidden.device)

    def part(own, at):
        with torch.no_grad():
            theirs = their_hidden[at] @ their_weight.T
        return function(own @ weight.T, theirs, labels[at]).sum()

    _in_pieces.ROWS = rows
    return _in_pieces.summed(part, hidden, [weight]) / len(hidden)


def whole_kept(function, known, hidden, weight, *_):
    """The same two towards what a cache has of a teacher."""
    return function(hidden @ weight.T, *known, torch.full((len(hidden),), -100, device=hidden.device)).sum() / len(hidden)


def kept_in_pieces(rows, function, known, hidden, weight, *_):
    """So many tokens at a time."""
    labels = torch.full((len(hidden),), -100, device=hidden.device)
    _in_pieces.ROWS = rows
    return _in_pieces.summed(lambda own, at: function(own @ weight.T, *(some[at] for some in known), labels[at]).sum(), hidden, [weight]) / len(hidden)


def liger(beta):
    """Liger's chunked loss with gradients in the forward pass, half of it on the teacher (beta 0 is KL(teacher || student))."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(beta=beta, weight_hard_loss=0.0, weight_soft_loss=1.0)

    def loss(hidden, weight, their_hidden, their_weight):
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        return function(hidden, weight, their_hidden, their_weight, labels, None, None)

    return loss


def kept_of(loss, inputs):
    """Return ids and numbers of the teacher's distributions, as a cache has them."""
    with torch.no_grad():
        chunks = []
        for hidden in inputs[2].split(1024):
            log_probs = (hidden @ inputs[3].T).float().log_softmax(-1)
            ids = log_probs.topk(KEPT).indices
            numbers = outcomes(log_probs, ids)
            chunks.append((ids, numbers[:, :-1].softmax(-1) if loss == "samples" else numbers))
        return [torch.cat(some) for some in zip(*chunks, strict=True)]


def forms(loss, inputs):
    """Yield the name and the function of each form of a loss that can be run here."""
    if loss in BETAS:
        reference, kernel = partial(divergence_reference, kind=loss), partial(divergence, kind=loss)
        all_at_once, few = partial(whole, reference), partial(partial, in_pieces)
    else:
        known, kind = kept_of(loss, inputs), loss.partition(" ")[0]
        reference, kernel = partial(sparse_divergence_reference, kind=kind), partial(sparse_divergence, kind=kind)
        all_at_once, few = partial(whole_kept, reference, known), lambda rows, function: partial(kept_in_pieces, rows, function, known)
    yield "all logits", all_at_once
    if inputs[0].is_cuda:
        yield "all logits, torch.compile", torch.compile(all_at_once)
    for rows in (256, 1024, 4096):
        for name, function in (("", reference), (", kernel", kernel)):
            yield f"effconvert, {rows} at a time{name}", few(rows, function)
    if loss in BETAS:
        yield from baselines(("Liger", lambda: liger(BETAS[loss])))


def step(function, inputs):
    """Return the loss, and leave the gradients."""
    for tensor in inputs[:2]:
        tensor.grad = None
    loss = function(*inputs)
    loss.backward()
    return loss.detach()


def timed(function, inputs, cuda):
    """Return the milliseconds of each repetition."""
    found = []
    for number in range(WARMUP + REPEATS):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step(function, inputs)
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            step(function, inputs)
            found.append(1e3 * (time.perf_counter() - began))
        if number == WARMUP and found[-1] > 2000:  # milliseconds: a few are enough
            break
    return found[WARMUP:]


def main():
    """Measure, and append to a CSV."""
    table = Table(FIELDS)
    shapes, losses = (REST_SHAPES, REST_LOSSES) if table.rest else (SHAPES, LOSSES)
    for sizes in (TINY if table.tiny else shapes).values():
        tokens, width, vocabulary = sizes
        draw = torch.Generator(table.device).manual_seed(0)
        inputs = [
            torch.randn(shape, generator=draw, device=table.device, dtype=table.dtype) / width**0.25 for shape in ((tokens, width), (vocabulary, width)) * 2
        ]
        for tensor in inputs[:2]:
            tensor.requires_grad_()
        for loss in losses:
            measure(table, loss, inputs)


def measure(table, loss, inputs):
    """Measure every form of a loss."""
    (tokens, width), vocabulary, cuda = inputs[0].shape, len(inputs[1]), table.cuda
    exact = None
    for name, function in forms(loss, inputs):
        try:
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if cuda else 0
            value = step(function, inputs)
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else 0
            found = [value.double(), *(tensor.grad.double() for tensor in inputs[:2])]
            exact = exact or found
            errors = [float((some - other).norm() / other.norm()) for some, other in zip(found, exact, strict=True)]
            times = timed(function, inputs, cuda)
        except Exception as error:
            left_out(f"{name}, {loss}", error)
            continue
        row = {"loss": loss, "form": name, "tokens": tokens, "hidden": width, "vocabulary": vocabulary, "dtype": str(table.dtype).removeprefix("torch.")}
        row |= {"peak_mb": f"{peak:.0f}", "loss_error": f"{errors[0]:.1e}", "gradient_error": f"{max(errors[1:]):.1e}"}
        products = 4 if loss in BETAS else 3  # logits of both, and two gradients
        table.add(times, row | {"tflops": f"{2 * products * tokens * width * vocabulary / statistics.median(times) / 1e9:.1f}"})


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    main()
