"""Convert a model by several commands and measure the perplexity of each on a held-out text: the tables of docs/mixers.md.

    python benchmarks/mixers.py MODEL --calibrate CALIBRATION.txt --heldout HELDOUT.txt -o results/mixers-….csv \\
        --command "streaming --window 64 --sinks 4" --command "linear --window 64" --heal "" --heal "--refit" --heal "--transfer"

Each conversion is a process of its own, as a user would run it; what it measured is read from its manifest. Quality does not depend on what else the
machine does; seconds do, and are only to be read as such.
"""

import csv
import json
import math
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import click

FIELDS = ["model", "command", "heal", "before", "after", "kl", "agreement", "seconds", "peak_gb", "calibration", "calibration_tokens", "heldout", "tokens"]
FIELDS += ["context", "date", "cores", "versions"]


@click.command()
@click.argument("model")
@click.option("--command", "commands", multiple=True, required=True, help="Technique and options, as on the command line.")
@click.option("--heal", multiple=True, default=["", "--refit", "--transfer"], help="Options added to each command.")
@click.option("--calibrate", type=Path, required=True, help="Text to calibrate on.")
@click.option("--calibration-tokens", default=8192)
@click.option("--heldout", type=Path, required=True, help="Text to measure on.")
@click.option("--tokens", default=4096)
@click.option("--context", default=512)
@click.option("-o", "--output", type=Path, required=True)
def main(model, commands, heal, calibrate, calibration_tokens, heldout, tokens, context, output):
    """Measure and append to a CSV."""
    fresh = not output.exists()
    with output.open("a", newline="") as file, TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for command in commands:
            for healing in heal:
                place = Path(scratch) / "out"
                asked = ["--calibrate", calibrate, "--calibration-tokens", calibration_tokens, "--text", heldout, "--tokens", tokens, "--context", context]
                asked = [*command.split(), *healing.split(), *map(str, asked), "--overwrite", model, "-o", str(place)]
                begin = time.perf_counter()
                process = subprocess.Popen([sys.executable, "-m", "effconvert", *asked], stdout=subprocess.DEVNULL)
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.perf_counter() - begin
                if status:
                    raise SystemExit(f"effconvert {' '.join(asked)} failed")
                manifest = json.loads((place / "effconvert.json").read_text())
                before, after = (manifest["report"][side]["quality"] for side in ("before", "after"))
                row = {"before": math.exp(before["loss"]), "after": math.exp(after["loss"]), "kl": after["kl"], "agreement": after["agreement"]}
                row = {key: f"{value:.4f}" for key, value in row.items()}
                about = {"model": Path(model).name, "command": command, "heal": healing, "seconds": f"{seconds:.0f}", "peak_gb": f"{usage.ru_maxrss / 1e6:.2f}"}
                about |= {
                    "calibration": calibrate.name,
                    "calibration_tokens": calibration_tokens,
                    "heldout": heldout.name,
                    "tokens": tokens,
                    "context": context,
                }
                versions = " ".join(f"{name} {number}" for name, number in manifest["versions"].items())
                writer.writerow({**row, **about, "date": datetime.now(UTC).date(), "cores": os.cpu_count(), "versions": versions})
                file.flush()
                click.echo(f"{command:45} {healing:22} {row['before']:>9} {row['after']:>14} {seconds:6.0f} s")


if __name__ == "__main__":
    main()
