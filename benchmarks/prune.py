"""Drop layers of a model by each way of choosing them, before and after refit, and measure the loss on a held-out text: the tables of docs/prune.md.

    python benchmarks/prune.py MODEL --drop 1 --drop 4 --calibrate CALIBRATION.txt --heldout HELDOUT.txt -o results/prune-….csv

Each conversion is a process of its own, as a user would run it. Search and influence choose the largest number first: fewer are the first of those.
A choice that was made is found again, so the seconds of a refit are its own.
"""

import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from refit import loss_of

# This process imports no torch: the ru_maxrss of a child begins at what its parent held.
FIELDS = [
    "model",
    "drop",
    "options",
    "layers",
    "calibration",
    "calibration_tokens",
    "loss",
    "seconds",
    "peak_gb",
    "tokens",
    "heldout",
    "date",
    "cores",
    "versions",
]


@click.command()
@click.argument("model")
@click.option("--drop", multiple=True, type=int, required=True)
@click.option("--options", multiple=True, default=["--by search", "--by influence", "--by angular"], help="One conversion each.")
@click.option("--refit/--no-refit", "both", default=True, help="Each of them with --refit as well.")
@click.option("--calibrate", help="Text to calibrate on; by default docstrings.")
@click.option("--calibration-tokens", default=4096)
@click.option("--heldout", type=Path, help="Text to measure on; by default docstrings of other modules.")
@click.option("--tokens", default=4096)
@click.option("-o", "--output", type=Path, required=True)
def main(model, drop, options, both, calibrate, calibration_tokens, heldout, tokens, output):
    """Measure and append to a CSV."""
    ordered = sorted(drop, reverse=True)
    rows = [(0, "original", "")] + [(count, chosen, refit) for chosen in options for count in ordered for refit in ([""] + [" --refit"] * both)]
    fresh, order = not output.exists(), {}  # options -> the layers chosen, those that go first first
    with output.open("a", newline="") as file, TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for count, chosen, refit in rows:
            seconds, peak, place, layers = 0.0, 0.0, model, ""
            if count:
                place = Path(scratch) / f"{count}{chosen}{refit}".replace(" ", "")
                asked = ["--calibration-tokens", str(calibration_tokens), *(["--calibrate", calibrate] if calibrate else []), *refit.split()]
                which = ["--drop", str(count), *chosen.split()]
                if chosen in order and "angular" not in chosen:
                    which = ["--layers", ",".join(order[chosen][:count]), *chosen.split("--by")[0].split()]
                step = ["prune-layers", *which]
                begin = time.perf_counter()
                process = subprocess.Popen(
                    [sys.executable, "-m", "effconvert", *step, *asked, "--no-verify", model, "-o", str(place)], stdout=subprocess.DEVNULL
                )
                _, status, usage = os.wait4(process.pid, 0)
                seconds, peak = time.perf_counter() - begin, usage.ru_maxrss / 1e6
                if status:
                    raise SystemExit(f"{' '.join(step)} failed")
                layers = json.loads((place / "effconvert.json").read_text())["recipe"][0]["prune-layers"]["layers"]
                order.setdefault(chosen, layers.split(","))
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                loss, name, installed = pool.submit(loss_of, str(place), heldout, tokens).result()
            about = {"calibration": calibrate and Path(calibrate).name, "heldout": name, "model": Path(model).name, "layers": layers}
            measured = {
                "drop": count,
                "options": chosen + refit,
                "loss": f"{loss:.4f}",
                "seconds": f"{seconds:.1f}",
                "peak_gb": f"{peak:.2f}",
                "tokens": tokens,
            }
            here = {"date": datetime.now(UTC).date(), "cores": os.cpu_count(), "versions": installed, "calibration_tokens": calibration_tokens}
            writer.writerow({**about, **measured, **here})
            file.flush()
            click.echo(f"{count:>3} {chosen + refit:40} {loss:.3f}  {seconds:.0f} s  {peak:.2f} GB  {layers}")


if __name__ == "__main__":
    main()
