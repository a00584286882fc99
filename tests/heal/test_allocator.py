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
from effconvert.heal._allocator import freed_memory_is_kept

def fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        first = torch.ones(12_500_000)  # 50 MB
        second = first + 1
        del first, second
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_is_kept():
    inside = fetched()
print(inside, fetched())
"""
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # where pages are huge, few are fetched
LIBRARY, VERSION = platform.libc_ver()
pytestmark = [
    pytest.mark.skipif(LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="about glibc from 2.35 on"),
    pytest.mark.skipif(resource.getpagesize() > 4096 or (HUGE.exists() and "[always]" in HUGE.read_text()), reason="counts pages of 4 kB"),
]


def fetched(**environment):
    """Count the pages that a process fetches from the system which makes large tensors and frees them again, while memory is kept and after that."""
    environment |= {name: value for name, value in os.environ.items() if name not in CHOICES}
    process = subprocess.run([sys.executable, "-c", ROUNDS], env=environment, capture_output=True, text=True, check=True)
    return [int(count) for count in process.stdout.split()]


def test_a_freed_tensor_makes_room_for_the_next_and_only_meanwhile():
    inside, after = fetched()
    assert inside < after / 3


@pytest.mark.slow
def test_the_environment_decides_before_it():
    inside, after = fetched(MALLOC_MMAP_THRESHOLD_="131072")
    assert inside > after / 2
