"""Distil a converted model in several ways, and write down how far each comes: the tables of docs/distill-results.md.

    python benchmarks/distill.py MODEL --convert "gqa --groups 1 --refit" --options "" --options "--rate 1e-3" -o results/distill-….csv

Each run is a process of its own, as a user would start it. Its curve, on held-out windows of the text, is a row for each point. With --random-start the
matrices that the conversion changed are random numbers before the training, as if there were no closed form.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from safetensors.torch import load_file, save_file

FIELDS = ["model", "convert", "start", "options", "data", "tokens", "measure", "held_out", "loss", "seconds", "peak_gb", "date", "cores", "threads", "versions"]


@click.command()
@click.argument("model")
@click.option("--convert", required=True, help="The conversion before it: a technique with its options.")
@click.option("--options", multiple=True, required=True, help="Options of distill; once for each run.")
@click.option("--random-start", is_flag=True, help="Begin with random numbers in all matrices that the conversion changed.")
@click.option("--data", default="docstrings", help="Text to train on.")
@click.option("--keep", type=Path, help="Folder for the distilled models.")
@click.option("-o", "--output", type=Path, required=True)
def main(model, convert, options, random_start, data, keep, output):
    """Measure and append to a CSV."""
    fresh = not output.exists()
    with output.open("a", newline="") as file, TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        student, place = Path(scratch) / "student", keep or Path(scratch)
        run([*convert.split(), "--no-verify", model, "-o", str(student)])
        if random_start:
            randomise(student, Path(model))
        for number, chosen in enumerate(options):
            result = place / f"{number}"
            peak = run(["distill", str(student), "--teacher", model, "--data", data, *chosen.split(), "--no-verify", "-o", str(result)])
            written = json.loads((result / "effconvert.json").read_text())
            about = {
                "model": Path(model).name,
                "convert": convert,
                "start": "random" if random_start else "fitted",
                "options": chosen,
                "data": Path(data).name,
                "measure": written["distillation"]["measure"],
            }
            here = {"date": datetime.now(UTC).date(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", ""), "versions": versions(written)}
            for point in written["distillation"]["curve"]:
                rounded = {"held_out": f"{point['held_out']:.5f}", "loss": "" if point["loss"] is None else f"{point['loss']:.5f}"}
                writer.writerow({**about, **rounded, "tokens": point["tokens"], "seconds": point["seconds"], "peak_gb": f"{peak:.2f}", **here})
            file.flush()
            curve = written["distillation"]["curve"]
            click.echo(f"{chosen:60} {curve[0]['held_out']:.4f} -> {written['distillation']['after']:.4f}  {curve[-1]['seconds']:.0f} s  {peak:.2f} GB")


def versions(written):
    """Return what the manifest says of the software."""
    return " ".join(f"{name} {number}" for name, number in written.get("versions", {}).items())


def randomise(student, original):
    """Put random numbers into the matrices of a model that the original does not have, as transformers initialises them."""
    known = {fingerprint(tensor) for file in original.glob("*.safetensors") for tensor in load_file(file).values()}
    scale = json.loads((student / "config.json").read_text()).get("initializer_range", 0.02)
    draw = torch.Generator().manual_seed(0)
    for file in student.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim > 1 and fingerprint(tensor) not in known:
                tensors[name] = (scale * torch.randn(tensor.shape, generator=draw)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})


def fingerprint(tensor):
    """Return the shape of a tensor and a hash of its numbers."""
    return (*tensor.shape, hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest())


def run(command):
    """Run effconvert, and return the gigabytes that it took at most."""
    child = subprocess.Popen([sys.executable, "-m", "effconvert", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise click.ClickException(f"effconvert {' '.join(command)}: {error}")
    return usage.ru_maxrss / 1e6


if __name__ == "__main__":
    main()
