"""Convert a decoder by each technique that shrinks its KV cache, heal it without training, and measure the loss on a held-out text: docs/share-kv.md.

    python benchmarks/frontier.py effconvert/demo/model -o frontier.csv
    python benchmarks/frontier.py MODEL --calibrate CALIBRATION.txt --heldout HELDOUT.txt -o results/frontier-….csv

A row is one command or several, one after the other; each is a process of its own, as a user would run it. What the CSV has already is not measured
again. The size of a cache follows from the shape: it is what a plan promises and verification measures.
"""

import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from refit import loss_of, timed

FIELDS = ["model", "commands", "cache", "parameters", "loss", "seconds", "peak_gb", "calibration", "calibration_tokens", "tokens", "heldout", "date"]
FIELDS += ["cores", "versions"]
CONTEXT = 512  # tokens at which a cache is counted
HEAL = "refit --teacher {model}"


@click.command()
@click.argument("model")
@click.option("--row", "rows", multiple=True, help="Commands of one row, with ; between them. Default: all of `ladder`.")
@click.option("--calibrate", default="docstrings", help="Text to calibrate on: docstrings, self or a file.")
@click.option("--calibration-tokens", default=16384)
@click.option("--heldout", type=Path, help="Text to measure on; by default docstrings of other modules.")
@click.option("--tokens", default=4096)
@click.option(
    "--jobs", default=1, help="Rows at a time, each with so many processor threads as OMP_NUM_THREADS says. Seconds are then those of a busy machine."
)
@click.option("-o", "--output", type=Path, required=True)
def main(model, rows, calibrate, calibration_tokens, heldout, tokens, jobs, output):
    """Measure and append to a CSV."""
    done = list(csv.DictReader(output.open(newline=""))) if output.exists() else []
    asked = ["--calibrate", calibrate, "--calibration-tokens", str(calibration_tokens), "--no-verify", "--overwrite"]
    about = {"model": Path(model).name, "calibration": Path(calibrate).name, "calibration_tokens": calibration_tokens, "tokens": tokens}
    about |= {"date": datetime.now(UTC).date(), "cores": os.cpu_count()}
    measured = {row["commands"] for row in done if all(row[key] == str(value) for key, value in key_of(about).items())}
    missing = [row for row in ["", *(rows or apart(ladder, model))] if row not in measured]
    with output.open("a", newline="") as file, ThreadPoolExecutor(jobs) as pool:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for row in pool.map(lambda row: measure(model, row, asked, heldout, tokens), missing):
            writer.writerow({**about, **row})
            file.flush()
            click.echo("{cache:>7} kB  {parameters:>10}  {loss}  {seconds:>5} s  {commands}".format(**row))


def measure(model, row, asked, heldout, tokens):
    """Run the commands of a row one after the other, and return its part of the CSV."""
    place, seconds, peak = model, 0.0, 0.0
    with TemporaryDirectory() as scratch:
        for number, command in enumerate(filter(None, row.split(";"))):
            target = Path(scratch) / str(number)
            spent, most = timed([sys.executable, "-m", "effconvert", *command.format(model=model).split(), *asked, str(place), "-o", str(target)])
            place, seconds, peak = target, seconds + spent, max(peak, most)
        cache, parameters = apart(size, place)
        loss, name, installed = apart(loss_of, str(place), heldout, tokens)
    sizes = {"cache": f"{cache:.3f}", "parameters": parameters, "seconds": f"{seconds:.0f}", "peak_gb": f"{peak:.2f}"}
    return {**sizes, "commands": row, "loss": f"{loss:.4f}", "heldout": name, "versions": installed}


def key_of(about):
    """Return what tells a row from others with the same commands. A row of the original needs no calibration, but is kept with each."""
    return {name: about[name] for name in ("model", "calibration", "calibration_tokens")}


def ladder(model):
    """Return the rows for a model: fewer heads, fewer layers with a cache, fewer layers that attend, fewer numbers, and several of these together."""
    from effconvert.checkpoint.reading import read_config

    config = read_config(Path(model))
    counts = [count for count in range(config.kv_heads - 1, 0, -1) if config.kv_heads % count == 0]
    pairs, half = f"share-kv --layers 1-{config.layers - 1}/2", config.layers // 2
    gqa = [f"gqa --groups {count}" for count in counts]
    sharing = [pairs, f"share-kv --last {half}", f"share-kv --last {half // 2}"]
    skipping = [f"prune-layers --drop {count} --only attention --by influence" for count in (config.layers // 4, half)]
    narrow = [f"narrow-kv --keep {share}" for share in (0.75, 0.5, 0.333, 0.25, 0.125)]
    latent = [mla for share in (0.5, 0.333, 0.25) if (mla := latents(config, share))]
    both = [f"gqa --groups {count} --refit;{pairs};{HEAL}" for count in counts]
    begin = half - half % 2  # from here on pairs of layers share a cache, and the layers before keep half of their numbers: both cannot be in one layer
    both += [f"narrow-kv --keep 0.5 --layers 0-{begin - 1};share-kv --layers {begin + 1}-{config.layers - 1}/2;{HEAL}"]
    both += [f"{first};{skipping[0]};{HEAL}" for first in latent[:1]]
    both += [f"{skipping[0]};narrow-kv --keep 0.5;{HEAL}"]
    return [f"{row} --refit" for row in [*gqa, *sharing, *skipping, *narrow, *latent]] + both


def latents(config, share):
    """Return the `mla` command that keeps a share of the cache, three numbers of values to two of keys; "" for models that it refuses."""
    from effconvert import steps
    from effconvert.errors import ModelError

    numbers = round(share * config.cached_numbers)
    width = max(2 * round(0.2 * numbers), config.rotary)
    sizes = f"--rank {numbers - 1 - width} --rope-dims {width}"
    one_each = f" --frequencies {','.join(['1'] * (width // 2))}" if width == config.rotary else ""
    try:
        steps.load("mla")(rank=1).check(config)
    except ModelError:
        return ""
    return f"mla {sizes}{one_each}"


def size(folder):
    """Return kB of cache a token, and parameters."""
    from effconvert.modeling.caches import kv_bytes
    from effconvert.modeling.size import size_of
    from effconvert.surgery._placed import open_checked

    checkpoint = open_checked(Path(folder))
    return kv_bytes(checkpoint.config, 2, CONTEXT) / CONTEXT / 1000, size_of(checkpoint).parameters


def apart(function, *arguments):
    """Call a function in a process of its own: this one imports no torch, as the memory of a child begins at what its parent holds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
