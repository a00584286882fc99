"""Convert the embedded model by each design that mixes tokens, heal it step by step, and write down how far it is from the original: docs/designs.md.

    python benchmarks/designs.py quality -o results/designs-….csv
    python benchmarks/designs.py starts -o results/designs-starts-….csv

`quality`: the conversion alone, with --refit, with --transfer, and distilled after that. `starts`: --transfer on more and more text, from the closed form
and from random numbers in place of all that attention had and the design adds. Each conversion is a process of its own, as a user would run it. Quality
does not depend on what else the machine does; seconds do. What a CSV has already is not measured again. benchmarks/plot_designs.py draws the page.
"""

import csv
import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from frontier import apart
from refit import timed

FIELDS = ["model", "command", "start", "heal", "tokens", "kl", "loss", "state", "seconds", "peak_gb", "date", "cores", "threads", "versions"]
KEY = ("command", "start", "heal", "tokens")  # what tells a row from others
CONTEXT = 512  # tokens of the windows that are measured, and of the text whose cache is counted
MEASURED = 4096  # tokens
CALIBRATION = 8192
DISTILLED = 65536
BUDGETS = (0, 2048, 8192, 32768)  # tokens of transfer
DESIGNS = (
    "streaming --window 64 --sinks 4",
    "linear --window 64",
    "linear",
    "performer --features 256",
    "retnet",
    "deltanet",
    "rwkv --version 7",
    "rwkv --version 4",
    "aft --form conv",
    "hyena",
    "monarch-mixer --blocks 64",
    "linformer-causal --block 64 --rank 8",
    "sparse --pattern strided --block 60",
    "sparse --pattern fixed --block 64",
    "sparse --pattern log --block 12",
    "longnet --segments 64,256,512 --dilations 1,2,4",
    "lsh --buckets 16 --rounds 4 --chunk 16",
)
RANDOM = "random start"  # in a chain of commands: random numbers in place of what the conversion fitted


@click.command()
@click.argument("what", type=click.Choice(["quality", "starts"]))
@click.option("--model", default=str(Path(__file__).parent.parent / "effconvert" / "demo" / "model"), help="Default: the embedded model.")
@click.option("--command", "commands", multiple=True, help="A technique with its options. Default: every design.")
@click.option("-o", "--output", type=Path, required=True)
def main(what, model, commands, output):
    """Measure and append to a CSV."""
    done = list(csv.DictReader(output.open(newline=""))) if output.exists() else []
    measured = {tuple(row[key] for key in KEY) for row in done}
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        cells = [cell for command in commands or DESIGNS for cell in (quality if what == "quality" else starts)(command)]
        for row, chain in sorted(cells, key=lambda cell: (int(cell[0]["tokens"]), "--transfer" in cell[0]["heal"])):  # quick ones first
            if tuple(row[key] for key in KEY) not in measured:
                writer.writerow({**row, **measure(model, chain, int(row["tokens"]) if what == "starts" else CALIBRATION)})
                file.flush()


def quality(command):
    """Yield a row for each way of healing a design, and the commands that make the model."""
    for heal in ("", "--refit", "--transfer"):
        yield {"command": command, "start": "fitted", "heal": heal, "tokens": str(CALIBRATION)}, [f"{command} {heal} {{model}}"]
    distill = f"distill --teacher {{model}} --train-tokens {DISTILLED}"
    yield {"command": command, "start": "fitted", "heal": "--transfer --distill", "tokens": str(DISTILLED)}, [f"{command} --transfer {{model}}", distill]


def starts(command):
    """Yield a row for each start of a design and each number of tokens, and the commands that make the model."""
    for start in ("fitted", "random"):
        for tokens in BUDGETS:
            heal = "--transfer" if tokens else ""
            chain = [f"{command} {{model}}", *([RANDOM] if start == "random" else []), *(["transfer --teacher {model}"] if tokens else [])]
            yield {"command": command, "start": start, "heal": heal, "tokens": str(tokens)}, chain


def measure(model, chain, tokens):
    """Run commands one after the other, each on what the one before it wrote, and return the part of a row that is measured."""
    seconds = peak = 0.0
    with TemporaryDirectory() as scratch:
        place = None
        for number, command in enumerate(chain):
            if command == RANDOM:
                apart(randomise, place)
                continue
            target = Path(scratch) / str(number)
            asked = [*command.format(model=model).split(), *([str(place)] if place else []), "-o", str(target)]
            calibration = ["--calibrate", "docstrings", "--calibration-tokens", str(tokens or CALIBRATION), "--no-verify"]
            spent, most = timed([sys.executable, "-P", "-m", "effconvert", *asked, *calibration])
            place, seconds, peak = target, seconds + spent, max(peak, most)
        kl, loss, state, installed = apart(distance, model, place)
    numbers = {"model": Path(model).name, "kl": f"{kl:.5f}", "loss": f"{loss:.4f}", "state": state, "seconds": f"{seconds:.0f}", "peak_gb": f"{peak:.2f}"}
    click.echo(f"{chain[0]:60} {' '.join(chain[1:]):60} {kl:8.4f} {seconds:5.0f} s")
    return {**numbers, "date": datetime.now(UTC).date(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", ""), "versions": installed}


def randomise(folder):
    """Draw anew the matrices of each layer's attention and of what took its place, as transformers initialises them."""
    import torch
    from safetensors.torch import load_file, save_file

    from effconvert.surgery._placed import open_checked

    config = open_checked(folder).config
    scale, draw = json.loads((folder / "config.json").read_text()).get("initializer_range", 0.02), torch.Generator().manual_seed(0)
    drawn = re.compile(rf"{config.layer_pattern}\.(?:{re.escape(config.attention)}\.|.*effconvert\.)")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim > 1 and drawn.search(name):
                tensors[name] = (scale * torch.randn(tensor.shape, generator=draw)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})


def distance(original, folder):
    """Return KL(original || model) and the loss in nats a token, the bytes of the cache after `CONTEXT` tokens of one text, and what is installed."""
    import torch

    from effconvert.eval.quality.perplexity import LogitsFile, measure, summary, vocabulary, windows
    from effconvert.eval.quality.text import default_text
    from effconvert.eval.results import versions
    from effconvert.modeling import loading
    from effconvert.modeling.caches import kv_bytes
    from effconvert.quiet import quiet_transformers
    from effconvert.surgery._placed import open_checked

    with quiet_transformers(), torch.inference_mode(), TemporaryDirectory() as scratch:
        logits = Path(scratch) / "logits"
        before = loading.load(Path(original), open_checked(Path(original)).config, torch.float32)
        batch = list(windows(loading.load_tokenizer(Path(original)), default_text(), CONTEXT, MEASURED, vocabulary(before)))
        measure(before, batch, logits)
        config = open_checked(folder).config
        after = loading.load(folder, config, torch.float32)
        found = summary(measure(after, batch, reference=LogitsFile(logits, torch.float32, vocabulary(before))), CONTEXT)
    return found.kl, found.loss, kv_bytes(config, 2, CONTEXT), versions()


if __name__ == "__main__":
    main()
