"""Print the table of docs/kernels.md: `python -m tests.kernels.table`. It takes a minute, and no GPU."""

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

from tests.kernels import test_decode_attention as decode
from tests.kernels import test_divergence as divergence
from tests.kernels import test_experts as experts
from tests.kernels import test_sparse_divergence as sparse
from tests.kernels.compiling import compiled
from tests.kernels.launches import launched


def of_divergence(dtype):
    """Yield the error of each case, and PyTorch's."""
    for kind, how in itertools.product(divergence.KINDS, divergence.WEIGHTS):
        yield from divergence.errors(kind, dtype, *how)


def of_sparse(dtype):
    """Yield the same."""
    for kind, how in itertools.product(sparse.SPARSE_KINDS, divergence.WEIGHTS):
        yield from sparse.errors(kind, dtype, *how)


def of_decoding(dtype):
    """Yield the same."""
    for case in decode.CASES:
        yield decode.errors(case, dtype)


def of_experts(dtype):
    """Yield the same."""
    for case in experts.CASES:
        yield experts.errors(case, dtype)


def of_kernel(name):
    """Return what a kernel of `experts` takes, for each call in bfloat16."""
    return [found for found in launched(experts.__name__) if found["kernel"] == name and found["call"] < len(experts.SHIPPED)]


KERNELS = {  # how far each is from float64, and what it takes
    "divergence": (of_divergence, lambda: compiled(divergence.cases())),
    "sparse_divergence": (of_sparse, lambda: compiled([*sparse.cases()])),
    "decode_attention, a split": (of_decoding, lambda: compiled([decode.case(*shape) for shape in decode.SHIPPED])),
    "decode_attention, the sum of splits": (None, lambda: compiled([decode.sums(64), decode.sums(96)])),
    "experts, neurons": (of_experts, lambda: of_kernel("inner")),
    "experts, the sum over experts": (None, lambda: of_kernel("outer")),
}


def worst(pairs):
    """The largest error, and how many times PyTorch's in the same type it is at most."""
    pairs = list(pairs)
    return f"{max(error for error, _ in pairs):.1e} ({max(error / theirs for error, theirs in pairs):.1f} x)"


def main():
    """Print a row for each kernel."""
    print("| kernel | fp32 | fp16 | bf16 | registers | shared memory, bytes | stack, bytes |\n|---|---|---|---|---|---|---|")
    for name, (errors, compile_all) in KERNELS.items():
        made = compile_all()
        sizes = [sorted(found[what] for found in made) for what in ("registers", "shared", "stack")]
        spans = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, *_, last in sizes]
        print(f"| {name} | {' | '.join(worst(errors(dtype)) if errors else '' for dtype in decode.LEAST)} | {' | '.join(spans)} |", flush=True)


if __name__ == "__main__":
    main()
