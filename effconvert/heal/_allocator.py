"""How the C library keeps the memory of a training on a CPU."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in malloc.h
LARGE = 2**30  # bytes
USUAL = 2**25  # bytes: what glibc's own threshold comes to where large blocks are freed
CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # by which a user may have decided


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """Have glibc keep freed memory for the next tensor meanwhile: fetching new pages for each large one takes a fifth of a step on a CPU.

    Nothing is done where the C library is another one, or the environment decides.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in CHOICES):
        yield
        return
    libc = ctypes.CDLL(None)
    if not libc.mallopt(MMAP_THRESHOLD, LARGE):  # older versions than 2.35 refuse so much, and one threshold alone would only do harm
        yield
        return
    libc.mallopt(TRIM_THRESHOLD, LARGE)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, USUAL)
        libc.mallopt(TRIM_THRESHOLD, 2 * USUAL)
        libc.malloc_trim(0)
