"""What a card is to be asked runs, at tiny sizes, in Triton's interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_rest_of_the_sweeps_runs_without_a_card():
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(Path.cwd()), "TRITON_INTERPRET": "1"}
    done = subprocess.run(["sh", "benchmarks/gpu-rest.sh", "--tiny"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    assert all(line.endswith(("No module named 'fla'", "No module named 'liger_kernel'")) for line in done.stdout.splitlines())
    found = {}
    for file in Path.cwd().glob("*-rest-*.csv"):
        rows = [*csv.DictReader(file.read_text().splitlines())]
        found[file.name.partition("-rest-")[0]] = rows
        assert all(float(value) < 1e-5 for row in rows for name, value in row.items() if name.endswith("error"))
    assert not any(row.get("failure") for rows in found.values() for row in rows)
    cells = {"distill-step": 5 * 7, "decode-attention": 5, "chunked-attention": 3 * 2 * 2, "experts": 3 * 3, "generation": (2 + 5) * 2 * 2}
    assert {name: len(rows) for name, rows in found.items()} == cells
