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
from pathlib import Path
import torch
from effconvert.heal._allocator import freed_memory_is_kept

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

def fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        first = torch.ones(12_500_000)  # 50 MB
        second = first + 1
        del first, second
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside, start = fetched(), resident()
with freed_memory_is_kept():
    inside, kept = fetched(), resident() - start
print(outside, inside, kept, resident() - start)
"""
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # where pages are huge, few are fetched
LIBRARY, VERSION = platform.libc_ver()
pytestmark = [
    pytest.mark.skipif(LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="about glibc from 2.35 on"),
    pytest.mark.skipif(resource.getpagesize() > 4096 or (HUGE.exists() and "[always]" in HUGE.read_text()), reason="counts pages of 4 kB"),
]


def pages(**environment):
    """Count pages of a process that makes large tensors and frees them again: fetched from the system before and while memory is kept, kept, and left."""
    environment |= {name: value for name, value in os.environ.items() if name not in CHOICES}
    process = subprocess.run([sys.executable, "-c", ROUNDS], env=environment, capture_output=True, text=True, check=True)
    return [int(count) for count in process.stdout.split()]


def test_a_freed_tensor_makes_room_for_the_next_and_only_meanwhile():
    outside, inside, kept, left = pages()
    assert inside < outside / 3  # how often a hole is too small for the next tensor depends on where the system puts the process
    assert left < kept / 3


@pytest.mark.slow
def test_the_environment_decides_before_it():
    outside, inside, *_ = pages(MALLOC_MMAP_THRESHOLD_="131072")
    assert inside > outside / 2
