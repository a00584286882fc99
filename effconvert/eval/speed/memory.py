"""Memory of a device: free bytes, the need of a pass, its peak, and the errors of a full device."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from effconvert.checkpoint.config import Config
from effconvert.errors import EffconvertError
from effconvert.modeling.caches import kv_bytes

SELF = Path("/proc/self")  # Linux's data about this process
FRAGMENTS = 3  # factor on a layer's activations, as malloc keeps freed memory; measured on SmolLM2: 1.2 to 2.2


def free(device: str) -> int:
    """Return the bytes that are free on `device`."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available


def release(device: str) -> None:
    """Free memory that is no longer used."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def needed(config: Config, model: Any, batch: int, context: int, new_tokens: int) -> int:
    """Estimate the bytes that a pass of `model` takes beside its weights: cache, activations of a layer, logits.

    An upper estimate: it adds up all activations of a layer as if none were freed, with norms and softmax in float32.
    """
    from effconvert.modeling.transformers_internals import implementation

    rows, itemsize = batch * context, int(model.dtype.itemsize)
    cache = batch * kv_bytes(config, itemsize, context + new_tokens)
    layer = rows * itemsize * (4 * config.hidden + (3 * config.heads + 2 * config.kv_heads) * config.head_dim + 4 * config.ffn) + rows * 8 * config.hidden
    logits = (batch if config.decoder else rows) * config.vocabulary * itemsize
    scores = rows * context * config.heads * (4 + 2 * itemsize) if implementation(model.config) == "eager" else 0
    return cache + 2 * cache // config.layers + FRAGMENTS * layer + scores + logits


def check(config: Config, model: Any, batch: int, context: int, new_tokens: int) -> None:
    """Refuse a pass that needs more than the free main memory: the kernel would kill the process, where a GPU raises an error.

    Raises:
        EffconvertError: there is not enough memory.
    """
    need, available = needed(config, model, batch, context, new_tokens), free("cpu")
    if need > available:
        raise EffconvertError(f"needs about {need / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free; give a smaller --batch or --context")


def peak(device: str, run: Callable[[], object]) -> int | None:
    """Call `run`, and return its peak memory above the memory in use before; None where the system does not count it.

    On CUDA these are the bytes of torch's tensors. On a CPU they are the pages of this process, which Linux counts; freed memory is first returned
    to the system, as far as the C library can.
    """
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    is_counted = device == "cpu" and _reset_peak()
    before = _status("VmRSS") if is_counted else 0
    run()
    return max(0, _status("VmHWM") - before) if is_counted else None


def _reset_peak() -> bool:
    """Reset Linux's peak counter of this process; return whether that worked."""
    try:
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)  # of glibc
        (SELF / "clear_refs").write_text("5")
    except (OSError, TypeError):  # another system, or a container without it
        return False
    return True


def _status(key: str) -> int:
    line = next(line for line in (SELF / "status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def explain(error: Exception) -> str:
    """Return in one sentence why a pass failed."""
    if isinstance(error, EffconvertError):
        return str(error)
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text or "can't allocate memory" in text:
        return "out of memory; give a smaller --batch or --context"
    return f"transformers or torch refused ({type(error).__name__}: {text.strip().splitlines()[0][:200] if text.strip() else 'no reason given'})"
