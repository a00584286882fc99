"""Train the embedded model: a small Llama with full multi-head attention, for `effconvert demo` and the tests.

    python -m effconvert.demo.train --novels novels.jsonl.gz --minutes 60 --out effconvert/demo/model

Text: public-domain English novels (one JSON object with `text` a line, gzipped or not, or plain text files), and the
docstrings of the standard library except the modules that `effconvert.eval.quality.text` holds out for evaluation.
The run ends after the given time, when the learning rate has decayed to zero, so any machine ends with a finished model.
"""
# B = sequences in a step, T = tokens in a sequence, V = vocabulary.

import gzip
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from effconvert.errors import OptionError
from effconvert.eval.quality.text import EVALUATION_MODULES, default_text, docstrings

VOCABULARY = 4096
CONTEXT = 512
END = "<|endoftext|>"


def novels(paths: tuple[Path, ...]) -> Iterator[str]:
    """Yield the text of each novel."""
    for path in paths:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if ".jsonl" in path.suffixes:
            yield from (json.loads(line)["text"] for line in raw.decode().splitlines())
        else:
            yield raw.decode()


def library() -> Iterator[str]:
    """Yield the docstrings of all standard-library modules with source that are not held out."""
    for module in sorted(sys.stdlib_module_names):
        if module not in EVALUATION_MODULES and not module.startswith("_") and module not in ("this", "antigravity", "idlelib"):
            try:
                yield "\n\n".join(docstrings(module))
            except OptionError:  # a compiled module has no source
                continue


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE with single digits, in which every byte is representable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def build(kind: str) -> PreTrainedModel:
    """Build the untrained model: 8 query heads, 8 KV heads, tied embeddings."""
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            kind,
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def loss_on(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return the mean cross-entropy in nats a token over consecutive windows of `CONTEXT` tokens."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)  # [N, T]
    with torch.inference_mode():
        losses = [float(model(w[None], labels=w[None]).loss) for w in windows]
    return sum(losses) / len(losses)


@click.command()
@click.option("--novels", "paths", type=click.Path(exists=True, path_type=Path), multiple=True, required=True)
@click.option("--minutes", default=60.0, show_default=True, help="Wall time of the training loop.")
@click.option("--batch", default=8, show_default=True, help="Sequences in a step.")
@click.option("--rate", default=4e-3, show_default=True, help="Peak learning rate (AdamW).")
@click.option("--seed", default=0, show_default=True)
@click.option("--kind", default="llama", show_default=True, help="Family; qwen3 has QK-norm.")
@click.option("--begin", type=click.Path(exists=True, path_type=Path), help="Start from a model of this script: its tokenizer, and weights that fit.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(paths: tuple[Path, ...], minutes: float, batch: int, rate: float, seed: int, kind: str, begin: Path | None, out: Path) -> None:
    """Train the embedded model and save it in bfloat16 with its tokenizer and card."""
    torch.manual_seed(seed)
    books, documents = list(novels(paths)), list(library())
    texts = [*books, *documents]
    tokenizer = Tokenizer.from_file(str(begin / "tokenizer.json")) if begin else train_tokenizer(texts)
    end = tokenizer.token_to_id(END)
    held_out = torch.tensor(tokenizer.encode(default_text().content).ids)
    ids_of_texts = [torch.tensor([*e.ids, end], dtype=torch.int16) for e in tokenizer.encode_batch(texts)]
    # The docstrings are a fiftieth of the novels; they are used four times as often, so that the model learns both.
    stream = torch.cat(ids_of_texts + 3 * ids_of_texts[-len(documents) :])
    print(f"{len(stream) / 1e6:.1f}M tokens, {len(held_out)} held out", flush=True)

    model = build(kind)
    if begin:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(begin, dtype=torch.float32).state_dict(), strict=False)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.95), fused=True)
    started, step, token_count = time.monotonic(), 0, 0
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * done)) / 2
        starts = torch.randint(len(stream) - CONTEXT, (batch,)).tolist()
        ids = torch.stack([stream[s : s + CONTEXT] for s in starts]).long()  # [B, T]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, token_count = step + 1, token_count + ids.numel()
        if step % 100 == 0:
            print(f"step {step}  {token_count / 1e6:.1f}M tokens  {done:.0%}  loss {loss.item():.3f}", flush=True)

    model = model.to(torch.bfloat16).eval()
    final = loss_on(model, held_out)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT).save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "minutes": minutes,
        "batch": batch,
        "rate": rate,
        "seed": seed,
        "kind": kind,
        "step": step,
        "tokens": token_count / 1e6,
        "final": final,
        "books": len(books),
    }
    (out / "README.md").write_text(CARD.format(**facts, millions=parameters / 1e6, version=torch.__version__, context=CONTEXT))
    print(f"held-out loss {final:.3f} nats a token, {token_count / 1e6:.1f}M tokens seen", flush=True)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# effconvert's embedded model

A {kind} with full multi-head attention (4 layers, 8 query heads, 8 KV heads of 32, hidden 256, vocabulary 4096, tied
embeddings; {millions:.2f}M parameters, bfloat16), small enough to travel with the source. It exists to be converted by
`effconvert demo` and by the tests; it is no use for anything else.

- **Training text**: {books} English novels, 1840-1920, public domain (COST-ELTeC/ELTeC-eng without every tenth), and the
  docstrings of the Python standard library, four times as often.
- **Held out**: the docstrings of the modules named in `effconvert/eval/text.py`.
- **Held-out loss**: {final:.3f} nats a token on those docstrings, in windows of {context} tokens.
- **Recipe**: `python -m effconvert.demo.train --novels FILE --minutes {minutes:g} --batch {batch} --rate {rate:g} --seed {seed} --kind {kind}`, which
  made {step} steps over {tokens:.1f}M tokens in that time: AdamW (0.9, 0.95), weight decay 0.1, linear warm-up of 100 steps, cosine to zero.
- **Made with** torch {version} on two CPU cores.

It was never aligned, filtered or evaluated for use: it writes Victorian prose and documentation of things that do not exist.
"""

if __name__ == "__main__":
    main()
