"""How the C library keeps the memory of a training on a CPU."""

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in malloc.h
LARGE = 2**30  # bytes
CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # by which a user may have decided


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor, until the process ends: fetching new pages for each large one takes a fifth of a step on a CPU.

    Nothing is done where the C library is another one, or the environment decides.
    """
    if platform.libc_ver()[0] == "glibc" and not any(name in os.environ for name in CHOICES):
        libc = ctypes.CDLL(None)
        if libc.mallopt(MMAP_THRESHOLD, LARGE):  # older versions than 2.35 refuse so much, and one threshold alone would only do harm
            libc.mallopt(TRIM_THRESHOLD, LARGE)
