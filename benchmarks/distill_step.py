"""Time and peak memory of the loss of one distillation step, with its gradients, in several forms on one GPU.

    python benchmarks/distill_step.py -o benchmarks/results/distill-step-DATE.csv
    python benchmarks/distill_step.py --tiny      # on a CPU, to see that it runs; the kernel then needs TRITON_INTERPRET=1

Needs torch and triton alone, so that it runs on a bare machine; Liger and TRL are measured beside it where they are installed. All forms get the same
numbers; how far their loss and gradients are from the first one's stands in their rows, which are written as they come.
"""

import argparse
import csv
import datetime
import gc
import os
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn.functional import kl_div

sys.path.insert(0, str(Path(__file__).parents[1]))
from effconvert.heal import _in_pieces
from effconvert.kernels.divergence import divergence, divergence_reference

FIELDS = ["form", "tokens", "hidden", "vocabulary", "dtype", "ms", "ms_p20", "ms_p80", "peak_mb", "loss_error", "gradient_error", "tflops"]
FIELDS += ["card", "date", "versions"]
SHAPES = {"SmolLM2-135M": (8192, 576, 49152), "Llama-3.2-1B": (8192, 2048, 128256)}  # tokens, hidden width, vocabulary
TINY = {"tiny": (64, 16, 96)}
REPEATS, WARMUP = 20, 3


def whole(hidden, weight, their_hidden, their_weight):
    """All logits at once."""
    own, theirs = (hidden @ weight.T).float(), (their_hidden @ their_weight.T).float()
    return kl_div(own.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True) / len(hidden)


def in_pieces(rows, function):
    """The loss of effconvert, so many tokens at a time."""

    def loss(hidden, weight, their_hidden, their_weight):
        labels = torch.full((len(hidden),), -100, device=hidden.device)

        def part(own, at):
            with torch.no_grad():
                theirs = their_hidden[at] @ their_weight.T
            return function(own @ weight.T, theirs, labels[at]).sum()

        _in_pieces.ROWS = rows
        return _in_pieces.summed(part, hidden, [weight]) / len(hidden)

    return loss


def liger():
    """Liger's chunked loss with gradients in the forward pass, half of it on the teacher (beta 0 is KL(teacher || student))."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(beta=0.0, weight_hard_loss=0.0, weight_soft_loss=1.0)

    def loss(hidden, weight, their_hidden, their_weight):
        return function(hidden, weight, their_hidden, their_weight, torch.zeros(len(hidden), dtype=torch.long, device=hidden.device))

    return loss


def forms():
    """Yield the name and the function of each form that can be run here."""
    yield "all logits", whole
    yield "all logits, torch.compile", torch.compile(whole)
    for rows in (256, 1024, 4096):
        yield f"effconvert, {rows} at a time", in_pieces(rows, divergence_reference)
        yield f"effconvert, {rows} at a time, kernel", in_pieces(rows, divergence)
    try:
        yield "Liger", liger()
    except ImportError as error:
        print(f"left out: {error}", flush=True)


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


def versions():
    """Return the versions of what is measured."""
    names = []
    for name in ("torch", "triton", "liger-kernel", "trl"):
        try:
            names.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return " ".join(names)


def main():
    """Measure, and append to a CSV."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    card = torch.cuda.get_device_name() if cuda else "CPU"
    file = chosen.output.open("a", newline="") if chosen.output else sys.stdout
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    for tokens, width, vocabulary in (TINY if chosen.tiny else SHAPES).values():
        draw = torch.Generator(device).manual_seed(0)
        shapes = ((tokens, width), (vocabulary, width)) * 2
        inputs = [torch.randn(shape, generator=draw, device=device, dtype=dtype) / width**0.25 for shape in shapes]
        for tensor in inputs[:2]:
            tensor.requires_grad_()
        exact = None
        for name, function in forms():
            try:
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() if cuda else 0
                loss = step(function, inputs)
                peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else 0
                found = [loss.double(), *(tensor.grad.double() for tensor in inputs[:2])]
                exact = exact or found
                errors = [float((some - other).norm() / other.norm()) for some, other in zip(found, exact, strict=True)]
                times = sorted(timed(function, inputs, cuda))
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            middle = statistics.median(times)
            row = {"form": name, "tokens": tokens, "hidden": width, "vocabulary": vocabulary, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"ms": f"{middle:.3f}", "ms_p20": f"{times[len(times) // 5]:.3f}", "ms_p80": f"{times[len(times) * 4 // 5]:.3f}", "peak_mb": f"{peak:.0f}"}
            row |= {"loss_error": f"{errors[0]:.1e}", "gradient_error": f"{max(errors[1:]):.1e}"}
            row |= {"tflops": f"{8 * tokens * width * vocabulary / middle / 1e9:.1f}", "card": card}
            writer.writerow({**row, "date": datetime.datetime.now(datetime.UTC).date(), "versions": versions()})
            file.flush()


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    main()
