"""Convert a sentence encoder by several commands and measure Spearman's rank correlation with human judgements of similarity (STS-B): docs/mixers.md.

    python benchmarks/sentences.py MODEL --pairs stsb_en_dev.jsonl --calibrate TEXT -o results/sentences-….csv --command "nystrom --landmarks 32" ...

PAIRS: a JSON object a line with two sentences and a score. The embedding is the mean of the last hidden states of the tokens, as all-MiniLM-L6-v2 wants it.
"""

import csv
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import click

FIELDS = ["model", "command", "heal", "spearman", "seconds", "pairs", "calibration", "calibration_tokens", "date", "cores", "torch", "transformers"]


def spearman(folder, pairs):
    """Return the correlation; texts of one length together, as transformers' fnet takes no notice of padding."""
    import torch
    from scipy.stats import spearmanr

    from effconvert.modeling import loading
    from effconvert.surgery._placed import open_checked

    model = loading.load(folder, open_checked(folder).config, torch.float32)
    tokenizer = loading.load_tokenizer(folder)
    sides = []
    for side in ("sentence1", "sentence2"):
        texts = tokenizer([pair[side] for pair in pairs], truncation=True, max_length=256).input_ids
        made = {}
        for length in sorted(set(map(len, texts))):
            alike = [index for index, text in enumerate(texts) if len(text) == length]
            for batch in (alike[start : start + 64] for start in range(0, len(alike), 64)):
                ids = torch.tensor([texts[index] for index in batch])
                with torch.inference_mode():
                    states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
                made |= dict(zip(batch, states.mean(1), strict=True))
        sides.append(torch.nn.functional.normalize(torch.stack([made[index] for index in range(len(texts))]), dim=-1))
    return float(spearmanr((sides[0] * sides[1]).sum(-1).numpy(), [pair["score"] for pair in pairs]).statistic)


@click.command()
@click.argument("model", type=Path)
@click.option("--command", "commands", multiple=True, required=True, help="Technique and options, as on the command line.")
@click.option("--heal", multiple=True, default=["", "--refit", "--transfer"], help="Options added to each command.")
@click.option("--pairs", type=Path, required=True)
@click.option("--calibrate", type=Path, required=True, help="Text to calibrate on.")
@click.option("--calibration-tokens", default=16384)
@click.option("-o", "--output", type=Path, required=True)
def main(model, commands, heal, pairs, calibrate, calibration_tokens, output):
    """Measure and append to a CSV."""
    import torch
    import transformers

    read = [json.loads(line) for line in pairs.read_text().splitlines()]
    about = {"model": model.name, "pairs": pairs.name, "calibration": calibrate.name, "calibration_tokens": calibration_tokens, "cores": os.cpu_count()}
    about |= {"date": datetime.now(UTC).date(), "torch": torch.__version__, "transformers": transformers.__version__}
    fresh = not output.exists()
    with output.open("a", newline="") as file, TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for command, healing in [("", ""), *((command, healing) for command in commands for healing in heal)]:
            place, begin = model, time.perf_counter()
            if command:
                place = Path(scratch) / "out"
                asked = [*command.split(), *healing.split(), "--calibrate", str(calibrate), "--calibration-tokens", str(calibration_tokens)]
                done = [sys.executable, "-m", "effconvert", *asked, "--no-verify", "--overwrite", str(model), "-o", str(place)]
                subprocess.run(done, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - begin
            found = spearman(place, read)
            writer.writerow({**about, "command": command or "original", "heal": healing, "spearman": f"{found:.4f}", "seconds": f"{seconds:.0f}"})
            file.flush()
            click.echo(f"{command or 'original':40} {healing:20} {found:.4f} {seconds:5.0f} s")


if __name__ == "__main__":
    main()
