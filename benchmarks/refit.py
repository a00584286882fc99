"""Convert a model by each pooling rule, before and after refit, and measure the loss on a held-out text: the tables of docs/gqa.md.

    python benchmarks/refit.py MODEL --groups 1 --calibrate CALIBRATION.txt --heldout HELDOUT.txt -o results/refit-….csv

Each conversion is a process of its own, as a user would run it, so that its time and its peak memory are its own.
"""

import csv
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

# This process imports no torch: the ru_maxrss of a child begins at what its parent held.
FIELDS = ["model", "groups", "options", "calibration", "calibration_tokens", "loss", "seconds", "peak_gb", "tokens", "heldout", "date", "cores", "versions"]


@click.command()
@click.argument("model")
@click.option("--groups", multiple=True, type=int, required=True)
@click.option("--options", multiple=True, default=["--pool mean", "--pool first", "--pool aligned", "--pool pca"], help="One conversion each.")
@click.option("--refit/--no-refit", "both", default=True, help="Each of them with --refit as well.")
@click.option("--calibrate", help="Text to calibrate on; by default docstrings.")
@click.option("--calibration-tokens", default=16384)
@click.option("--heldout", type=Path, help="Text to measure on; by default docstrings of other modules.")
@click.option("--tokens", default=8192)
@click.option("-o", "--output", type=Path, required=True)
def main(model, groups, options, both, calibrate, calibration_tokens, heldout, tokens, output):
    """Measure and append to a CSV."""
    rows = [(None, "original")] + [(count, f"{chosen}{refit}") for count in groups for chosen in options for refit in ([""] + [" --refit"] * both)]
    fresh = not output.exists()
    with output.open("a", newline="") as file, TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for count, chosen in rows:
            seconds = peak = 0.0
            place = model
            if count is not None:
                place = Path(scratch) / f"{count}{chosen.replace(' ', '')}"
                asked = ["--calibration-tokens", str(calibration_tokens), *(["--calibrate", calibrate] if calibrate else [])]
                command = [sys.executable, "-m", "effconvert", "gqa", "--groups", str(count), *chosen.split(), *asked, "--no-verify", model, "-o", str(place)]
                seconds, peak = timed(command)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                loss, name, installed = pool.submit(loss_of, str(place), heldout, tokens).result()
            about = {"calibration": calibrate and Path(calibrate).name, "heldout": name, "model": Path(model).name}
            measured = {"groups": count, "options": chosen, "loss": f"{loss:.4f}", "seconds": f"{seconds:.1f}", "peak_gb": f"{peak:.2f}", "tokens": tokens}
            here = {"date": datetime.now(UTC).date(), "cores": os.cpu_count(), "versions": installed, "calibration_tokens": calibration_tokens}
            writer.writerow({**about, **measured, **here})
            file.flush()
            click.echo(f"{count or '':>3} {chosen:40} {loss:.3f}  {seconds:.0f} s  {peak:.2f} GB")


def timed(command):
    """Run a command, and return its seconds and its peak memory in GB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - begin, usage.ru_maxrss / 1e6


def loss_of(model, heldout, tokens):
    """Return the cross-entropy in nats a token, in windows of 512 in float32; the text's name; what is installed."""
    import torch

    from effconvert.checkpoint.sources import locate
    from effconvert.eval.quality.perplexity import measure, windows
    from effconvert.eval.quality.text import default_text, read_text
    from effconvert.eval.results import versions
    from effconvert.modeling import loading
    from effconvert.quiet import quiet_transformers
    from effconvert.surgery._placed import open_checked

    text = read_text(heldout) if heldout else default_text()
    folder = locate(model, None, lambda _: None)
    config = open_checked(folder).config
    with quiet_transformers(), torch.inference_mode():
        cut = windows(loading.load_tokenizer(folder), text, min(512, config.longest or 512), tokens, config.vocabulary)
        found = measure(loading.load(folder, config, torch.float32), list(cut))
    return sum(window.loss for window in found) / sum(window.tokens for window in found), text.name, versions()


if __name__ == "__main__":
    main()
