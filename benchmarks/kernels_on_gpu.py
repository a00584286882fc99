"""Hold every kernel to its reference in float64 on a GPU, at sizes that models have: `python benchmarks/kernels_on_gpu.py`. Exits with 1 where one is wrong."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from effconvert.kernels.divergence import KINDS, divergence, divergence_reference

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
            given = student.to(dtype).to(kept).requires_grad_()
            losses = function(given, teacher.to(dtype).to(kept), labels, kind, 2.0, 0.75, 0.25)
            losses.sum().backward()
            results.append((losses.detach().double(), given.grad.double()))
        for what, exact, kernel, plain in zip(("losses", "gradient"), *results, strict=True):
            errors = [float((some - exact).abs().max() / exact.abs().max()) for some in (kernel, plain)]
            yield f"divergence {kind} {dtype} {rows} x {columns}, {theirs} {what}", *errors


def main():
    """Print each case, and exit."""
    wrong = 0
    for name, error, plain in of_divergence():
        bad = not error <= max(TWICE * plain, 1e-6)
        wrong += bad
        print(f"{'WRONG' if bad else 'right'}  {name}: {error:.1e}, PyTorch {plain:.1e}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
