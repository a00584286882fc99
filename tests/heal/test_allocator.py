"""Memory of a training on a CPU stays in the process, where glibc would give it back after each step."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from effconvert.heal._allocator import CHOICES

ROUNDS = """
import resource
import torch
from effconvert.heal._allocator import keep_freed_memory

{begin}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    first = torch.ones(12_500_000)  # 50 MB
    second = first + 1
    del first, second
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # where pages are huge, few are fetched
LIBRARY, VERSION = platform.libc_ver()
pytestmark = [
    pytest.mark.skipif(LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="about glibc from 2.35 on"),
    pytest.mark.skipif(resource.getpagesize() > 4096 or (HUGE.exists() and "[always]" in HUGE.read_text()), reason="counts pages of 4 kB"),
]


def fetched(begin, **environment):
    """Count the pages that a process fetches from the system which makes large tensors and frees them again."""
    environment |= {name: value for name, value in os.environ.items() if name not in CHOICES}
    process = subprocess.run([sys.executable, "-c", ROUNDS.format(begin=begin)], env=environment, capture_output=True, text=True, check=True)
    return int(process.stdout)


def test_a_freed_tensor_makes_room_for_the_next():
    assert fetched("keep_freed_memory()") < fetched("") / 3


def test_the_environment_decides_before_it():
    assert fetched("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="131072") > fetched("") / 2
