"""What a technique saves, and what it costs to run: sizes, and the speed of decoding beside the original's: docs/cheaper-layers.md.

    python benchmarks/cheaper.py SmolLM2-135M-Instruct --calibrate ARTICLES.txt -o results/cheaper-….csv
    python benchmarks/cheaper.py --random gpt2 --row "glu --activation geglu" -o results/cheaper-….csv

A row is one command. Speed does not depend on how well layers were fitted, so little text is calibrated on, and nothing is healed or verified: the results are
not for use. Each stands beside the original in one process; they take turns with every step, and the seconds are those of the processor, so that other jobs
on the machine hit both alike. What the CSV has already is not measured again, and what `--work` has already is not converted again.
"""

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from effconvert import steps
from effconvert.checkpoint.reading import read_config
from effconvert.eval.results import machine, versions
from effconvert.eval.subject import load_model, open_model
from effconvert.modeling.size import size_of
from effconvert.modeling.transformers_internals import cache_among, cache_name

FIELDS = ["model", "command", "class", "parameters", "active", "disk_bytes", "kv_bytes", "dtype", "kernels", "context", "rounds", "decode_original"]
FIELDS += ["decode", "decode_ratio", "decode_ratio_low", "decode_ratio_high", "prefill_ratio", "threads", "load", "date", "machine", "versions"]
ROWS = [  # at the sizes of the tables in docs/
    "gqa --groups 3",  # changes nothing: how far two equal models seem apart
    "gqa --groups 1 --pool mean",
    "narrow-kv --keep 0.5",
    "mla --rank 115 --rope-dims 76",
    "share-kv --layers 1-29/2 --pool first",
    "prune-layers --layers 14,16,17,18",
    "prune-layers --layers 5,6,7,8,20,25,26,28 --only attention",
    "narrow --ffn 1152",
    "narrow --heads 6",
    "moe-split --experts 8 --active 6",
    "moe-split --experts 8 --active 4",
    "low-rank --form plain --rank 192 --layers 12-17",
    "low-rank --ratio 0.75",
    "monarch --blocks 192 --layers 12-17",
    "factor-embed --rank 384",
    "factor-embed --rank 128",
    "share-layers --groups 4 --layers 13-20 --pool first",
    "recursive --groups 4 --layers 13-20 --lora-rank 64",
    "share-ffn --layers 13-20 --group 2",
]
CALIBRATION = 2048  # tokens: few, as no quality is measured
WARM = 3  # steps before those that count
READS = 3  # times that each model reads the prompt


@click.command()
@click.argument("model", required=False)
@click.option("--random", help="In place of MODEL: a model_type, in transformers' default shape with random weights.")
@click.option("--row", "rows", multiple=True, help="Commands to measure. Default: all techniques for a llama of SmolLM2's shape.")
@click.option("--calibrate", default="docstrings", help="Text to calibrate on: docstrings, self or a file.")
@click.option("--work", type=Path, help="Folder to keep the converted models in.")
@click.option("--context", default=512, help="Tokens in the prompt.")
@click.option("--rounds", default=48, help="Steps of each model; results are medians.")
@click.option("--dtype", default="bfloat16", type=click.Choice(["bfloat16", "float32"]))
@click.option("--kernels", default="reference", help="How converted models decode: as in transformers (reference), or as effconvert.load has it (auto: mla).")
@click.option("-o", "--output", type=Path, required=True)
def main(model, random, rows, calibrate, work, context, rounds, dtype, kernels, output):
    """Convert, measure, and append to a CSV."""
    done = list(csv.DictReader(output.open(newline=""))) if output.exists() else []
    with output.open("a", newline="") as file, TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        work = work or Path(scratch)
        model = Path(model) if model else write_random(random, work / f"random-{random}")
        about = {"model": model.name, "dtype": dtype, "context": context, "rounds": rounds, "threads": torch.get_num_threads(), "machine": machine("cpu")}
        about["kernels"] = kernels
        original = load_model(open_model(str(model)), dtype, "cpu", "reference")
        for row in rows or ROWS:
            if any((old["model"], old["command"], old["dtype"]) == (model.name, row, dtype) for old in done):
                continue
            target = work / f"{model.name}-{re.sub('[^a-z0-9]+', '-', row)}"
            if not target.exists():
                asked = ["--calibrate", calibrate, "--calibration-tokens", str(CALIBRATION)] if calibrates(model, row) else []
                command = [sys.executable, "-m", "effconvert", *row.split(), *asked, "--no-verify", str(model), "-o", str(target)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            opened = open_model(str(target))
            size = size_of(opened.checkpoint)
            sizes = {
                "class": json.loads((target / "config.json").read_text())["architectures"][0],
                "parameters": size.parameters,
                "active": size.active,
                "disk_bytes": size.bytes,
                "kv_bytes": size.kv_bytes,
            }
            speed = compare(original, load_model(opened, dtype, "cpu", kernels), context, rounds)
            here = {"load": f"{os.getloadavg()[0]:.1f}", "date": datetime.now(UTC).date(), "versions": versions()}
            writer.writerow({**about, "command": row, **sizes, **speed, **here})
            file.flush()
            click.echo(f"{size.parameters / 1e6:7.2f} M  {size.kv_bytes / 1e3:6.2f} kB  {speed['decode_ratio']} x  {row}")


def calibrates(model, row):
    """Whether a command takes a calibration text for this model: one that needs none refuses the option."""
    name, *words = row.split()
    step = steps.load(name)(**{key.removeprefix("--").replace("-", "_"): value for key, value in zip(words[::2], words[1::2], strict=True)})
    config = read_config(model)
    return step.undecided or step.needs_calibration(config) or step.needs_survey(config)


@torch.inference_mode()
def compare(original, converted, context, rounds):
    """Return tokens a second of both, as far as the processor works on them, and how many times faster the converted model is."""
    prompt = torch.randint(1, original.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    models, prefill, decode = (original, converted), [], []
    for _ in range(READS):
        reads = [timed(lambda model=model: model(prompt, use_cache=True, logits_to_keep=1)) for model in models]
        prefill.append([seconds for seconds, _ in reads])
    caches = [cache_among(output.values()) for _, output in reads]
    token = prompt[:, :1]  # which one does not matter
    for number in range(rounds + WARM):
        steps_of = [0.0, 0.0]
        for index in (0, 1) if number % 2 else (1, 0):
            model, cache = models[index], caches[index]
            steps_of[index], _ = timed(lambda model=model, cache=cache: model(token, use_cache=True, **{cache_name(model): cache}))
        decode.append(steps_of)
    decode = decode[WARM:]
    before, after = (statistics.median(pair[index] for pair in decode) for index in (0, 1))
    ratios = statistics.quantiles((first / second for first, second in decode), n=4)
    return {
        **{"decode_original": f"{1 / before:.1f}", "decode": f"{1 / after:.1f}", "decode_ratio": f"{ratios[1]:.3f}"},
        **{"decode_ratio_low": f"{ratios[0]:.3f}", "decode_ratio_high": f"{ratios[2]:.3f}"},  # quartiles
        "prefill_ratio": f"{statistics.median(first / second for first, second in prefill):.3f}",
    }


def timed(run):
    """Return the processor's seconds, and what `run` returns."""
    begin = time.process_time()
    output = run()
    return time.process_time() - begin, output


def write_random(kind, folder):
    """Write a model of a model_type in transformers' default shape with random weights, and return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if not folder.exists():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind)).to(torch.bfloat16).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
