"""What the benchmarks of kernels share: their command line, and a table that is written row by row, so that a run that is cut off still tells.

python benchmarks/NAME.py -o FILE.csv                    # the most telling cells, which benchmarks/gpu.sh asks for
python benchmarks/NAME.py --rest -o FILE.csv             # the other cells and baselines, which benchmarks/gpu-rest.sh asks for
TRITON_INTERPRET=1 python benchmarks/NAME.py --tiny      # on a CPU, to see that it runs; with --rest too
"""

import argparse
import csv
import datetime
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "flash-linear-attention")


class Table:
    """A CSV of measurements on this card, or on the CPU."""

    def __init__(self, fields):
        parser = argparse.ArgumentParser()
        parser.add_argument("-o", "--output", type=Path)
        parser.add_argument("--tiny", action="store_true")
        parser.add_argument("--rest", action="store_true")
        chosen = parser.parse_args()
        self.tiny, self.rest, self.cuda = chosen.tiny, chosen.rest, torch.cuda.is_available()
        self.device, self.dtype = ("cuda", torch.bfloat16) if self.cuda else ("cpu", torch.float32)
        self.file = chosen.output.open("a", newline="") if chosen.output else sys.stdout
        self.common = {"card": torch.cuda.get_device_name() if self.cuda else "CPU", "date": datetime.datetime.now(datetime.UTC).date(), "versions": versions()}
        self.writer = csv.DictWriter(self.file, [*fields, *self.common], lineterminator="\n")
        self.writer.writeheader()

    def add(self, times, row):
        """Write a row with the median and the percentiles of some milliseconds."""
        times = sorted(times)
        spread = {"ms": statistics.median(times), "ms_p20": times[len(times) // 5], "ms_p80": times[len(times) * 4 // 5]}
        self.writer.writerow({**{name: f"{value:.4f}" for name, value in spread.items()}, **row, **self.common})
        self.file.flush()


def versions():
    """Return the versions of what is measured."""
    names = []
    for name in PACKAGES:
        try:
            names.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return " ".join(names)


def left_out(what, why):
    """Say what is not measured."""
    print(f"left out: {what}: {type(why).__name__}: {str(why)[:200]}", flush=True)


def baselines(*pairs):
    """Yield the name and the function of baselines; those whose library is not installed are left out with a word."""
    for name, function in pairs:
        try:
            yield name, function()
        except ImportError as error:
            left_out(name, error)
