"""The type of numbers that a model is run in."""

import psutil
import torch

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.modeling.size import size_of

MOST = 0.25  # of the machine's memory, for weights in float32


def type_on(device: str | None, own: torch.dtype, parameters: int) -> torch.dtype:
    """Return the type to run a model in on `device` (None: this machine's accelerator, or the CPU), whose weights are `own`.

    It is `own`, but for bfloat16 on a CPU without instructions for it, which is several times faster in float32. Models whose weights in float32 would take
    more than a quarter of the machine's memory stay as they are, and so does float16: its overflow has to be seen.
    docs/decisions/0050-bfloat16-where-a-cpu-has-it.md has the numbers.
    """
    fits = parameters * torch.float32.itemsize <= MOST * psutil.virtual_memory().total
    return torch.float32 if own == torch.bfloat16 and _on_cpu(device) and not computes(own) and fits else own


def type_of(checkpoint: Checkpoint) -> torch.dtype:
    """Return the type to run a checkpoint in on this machine: see `type_on`."""
    return type_on(None, checkpoint.computing, size_of(checkpoint).parameters)


def slow(device: str | None, dtype: torch.dtype, option: str) -> str:
    """Say that `device` is slow in a type, and which option changes it; "" where it is not."""
    if not _on_cpu(device) or computes(dtype):
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"torch has no fast {name} on this CPU, and reads texts several times as fast with {option} float32"


def fast(device: str | None, option: str) -> str:
    """Say that `device` is a CPU which multiplies bfloat16 faster than float32, and which option has it do so; "" elsewhere."""
    if not _on_cpu(device) or not multiplies_bfloat16():
        return ""
    return f"this CPU has instructions for bfloat16, and computes faster with {option} bfloat16"


def _on_cpu(device: str | None) -> bool:
    return torch.device(device).type == "cpu" if device else not torch.accelerator.is_available()


def multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX; AVX512 alone emulates bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def computes(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions to multiply matrices of such numbers (bfloat16: from AVX512 on, in part emulated; float16: AVX512-FP16)."""
    asks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in asks or (torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, asks[dtype])()))
