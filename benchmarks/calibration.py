"""Refit a model on several texts, and measure the loss on several others: which text is good to calibrate on. The tables of docs/gqa.md.

    python benchmarks/calibration.py MODEL --text docstrings --text self --heldout OTHER.txt --heldout docstrings -o results/calibration-….csv

A text is a file, `docstrings`, `self` (as `--calibrate self` has it), or samples that the model writes, which are read as one text, with docstrings after
every second one if asked for: `samples=48,length=400,temperature=0.8,docstrings=1`.
Gap closed: (loss of the mean of heads - loss) / (loss of the mean of heads - loss of the original). Each conversion is a process of its own.
"""

import csv
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from refit import timed

FIELDS = ["model", "groups", "options", "calibration", "calibration_tokens", "heldout", "loss", "closed", "writing_seconds", "seconds", "peak_gb", "tokens"]
FIELDS += ["date", "cores", "versions"]


@click.command()
@click.argument("model")
@click.option("--groups", default=1)
@click.option("--text", "texts", multiple=True, required=True, help="One conversion each.")
@click.option("--calibration-tokens", default=16384)
@click.option("--heldout", multiple=True, required=True, help="A file, or docstrings of the modules that are measured on.")
@click.option("--tokens", default=4096)
@click.option("-o", "--output", type=Path, required=True)
def main(model, groups, texts, calibration_tokens, heldout, tokens, output):
    """Measure and append to a CSV; what stands there is not measured again."""
    rows = [("original", None), ("--pool mean", None), *[("--pool pca --refit", text) for text in texts]]
    done = list(csv.DictReader(output.open(newline=""))) if output.exists() else []
    with output.open("a", newline="") as file, TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        same = [row for row in done if (row["model"], row["groups"], row["tokens"]) == (Path(model).name, str(groups), str(tokens))]
        losses = {(row["options"], row["heldout"]): float(row["loss"]) for row in same if not row["calibration"]}
        for options, text in rows:
            named = Path(text).name if text else ""
            if any((row["options"], row["calibration"]) == (options, named) for row in same):
                continue
            place, seconds, writing, peak = Path(model), 0.0, 0.0, 0.0
            if options != "original":
                given, writing = _given(model, text, scratch)
                place = Path(scratch) / "converted"
                command = [sys.executable, "-m", "effconvert", "gqa", "--groups", str(groups), *options.split(), "--no-verify", "--overwrite"]
                command += [*given, "--calibration-tokens", str(calibration_tokens), model, "-o", str(place)]
                seconds, peak = timed(command)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                measured, installed = pool.submit(losses_of, str(place), heldout, tokens).result()
            for name, loss in measured.items():
                if not text:
                    losses[options, name] = loss
                mean, original = losses.get(("--pool mean", name)), losses["original", name]
                closed = f"{(mean - loss) / (mean - original):.4f}" if mean else ""
                about = {"model": Path(model).name, "groups": groups, "options": options, "calibration": named, "calibration_tokens": calibration_tokens}
                costs = {"writing_seconds": f"{writing:.1f}", "seconds": f"{seconds:.1f}", "peak_gb": f"{peak:.2f}"}
                here = {"date": datetime.now(UTC).date(), "cores": os.cpu_count(), "versions": installed, "tokens": tokens}
                writer.writerow({**about, "heldout": name, "loss": f"{loss:.4f}", "closed": closed, **costs, **here})
                click.echo(f"{options:20} {named:45} {name:20} {loss:.3f} {closed:7} {writing:.0f} + {seconds:.0f} s  {peak:.2f} GB")
            file.flush()


def _given(model, text, scratch):
    """Return how a conversion is told what to calibrate on, and the seconds that the text took to write."""
    if not text or "=" not in text:
        return ["--calibrate", text] if text else [], 0.0
    begin = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        file = Path(scratch) / "written.txt"
        file.write_text(pool.submit(written, model, **{key: float(value) for key, value in (part.split("=") for part in text.split(","))}).result())
    return ["--calibrate", str(file)], time.perf_counter() - begin


def written(model, samples, length, temperature, docstrings=0):
    """Return what the model writes, as text; with as many characters of docstrings after every second sample, where they are asked for."""
    from effconvert.checkpoint.checkpoint import open_checkpoint
    from effconvert.convert import selftext
    from effconvert.eval.quality.text import calibration_text
    from effconvert.modeling import loading

    checkpoint = open_checkpoint(Path(model))
    tokenizer = loading.load_tokenizer(checkpoint.folder)
    ids = selftext.sample(checkpoint, tokenizer, int(samples), int(length), checkpoint.config.vocabulary, temperature=temperature)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if docstrings:
        docs, size = calibration_text().content, sum(map(len, texts[::2])) // len(texts[::2])
        starts = [at * len(docs) // len(texts) for at in range(len(texts))]
        texts = [part for text, start in zip(texts[::2], starts[::2], strict=True) for part in (text, docs[start : start + size])]
    return "\n\n".join(texts)


def losses_of(model, heldout, tokens):
    """Return the cross-entropy in nats a token of each text, in windows of 512 in the model's own type, and what is installed."""
    import torch

    from effconvert.checkpoint.checkpoint import open_checkpoint
    from effconvert.eval.quality.perplexity import measure, windows
    from effconvert.eval.quality.text import default_text, read_text
    from effconvert.eval.results import versions
    from effconvert.modeling import loading
    from effconvert.quiet import quiet_transformers

    checkpoint, losses = open_checkpoint(Path(model)), {}
    config = checkpoint.config
    with quiet_transformers(), torch.inference_mode():
        loaded, tokenizer = loading.load(Path(model), config, checkpoint.computing), loading.load_tokenizer(Path(model))
        for name in heldout:
            text = default_text() if name == "docstrings" else read_text(Path(name))
            found = measure(loaded, list(windows(tokenizer, text, min(512, config.longest or 512), tokens, config.vocabulary)))
            losses[Path(name).name] = sum(window.loss for window in found) / sum(window.tokens for window in found)
    return losses, versions()


if __name__ == "__main__":
    main()
