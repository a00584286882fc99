"""Memory of a training on a CPU stays in the process, where glibc would give it back after each step."""

import os
import platform
import subprocess
import sys

import pytest

from effconvert.heal._allocator import CHOICES

ROUNDS = """
import resource
import torch
from effconvert.heal._allocator import keep_freed_memory

{begin}
for _ in range(20):
    first = torch.ones(12_500_000)  # 50 MB
    second = first + 1
    del first, second
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")


def fetched(begin, **environment):
    """Count the pages that a process fetches from the system which makes large tensors and frees them again."""
    environment |= {name: value for name, value in os.environ.items() if name not in CHOICES}
    process = subprocess.run([sys.executable, "-c", ROUNDS.format(begin=begin)], env=environment, capture_output=True, text=True, check=True)
    return int(process.stdout)


def test_a_freed_tensor_makes_room_for_the_next():
    assert fetched("keep_freed_memory()") < fetched("") / 3


def test_the_environment_decides_before_it():
    assert fetched("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="131072") > fetched("") / 2
