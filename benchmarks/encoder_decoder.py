"""Train a small bart or mbart on a made-up translation, give its encoder one FFN, drop its decoder's, and train on: docs/share-ffn.md.

    python benchmarks/encoder_decoder.py --kind bart --steps 1500 --more 200

A target is its source backwards, each word replaced by another. Printed are perplexities of targets that were not trained on.
"""

import math
import random
import time
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import click

WORDS = [f"{first}{second}" for first in "bdfgkl" for second in "aeiou"]
TEST, BATCH, RATE = 500, 32, 2e-3


def pairs(count, seed):
    """Return sources and their targets."""
    draw = random.Random(seed)
    other = dict(zip(WORDS, random.Random(0).sample(WORDS, len(WORDS)), strict=True))
    sources = [draw.choices(WORDS, k=draw.randint(3, 8)) for _ in range(count)]
    return [(" ".join(words), " ".join(other[word] for word in reversed(words))) for words in sources]


def tokenizer():
    """Return a tokenizer of whole words, which ends each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(["<pad>", "<s>", "</s>", *WORDS])}, "</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def batch(texts, words):
    """Return what a model is called with; padding counts for nothing."""
    sources, targets = (words([pair[side] for pair in texts], padding=True, return_tensors="pt") for side in (0, 1))
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    return {"input_ids": sources.input_ids, "attention_mask": sources.attention_mask, "labels": labels}


def train(model, steps, seed, words):
    """Train all weights."""
    import torch

    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / 100) * (1 - step / steps))
    model.train()
    for step in range(steps):
        model(**batch(pairs(BATCH, f"{seed}-{step}"), words)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()


def perplexity(model, words):
    """Return the perplexity of a token of targets."""
    import torch

    with torch.inference_mode():
        return math.exp(model(**batch(pairs(TEST, "test"), words)).loss.item())


@click.command()
@click.option("--kind", default="bart", help="bart, with norms behind attention and FFN, or mbart, with norms before them.")
@click.option("--steps", default=1500, help="Steps of the original's training.")
@click.option("--more", default=200, help="Steps of training after the conversion.")
def main(kind, steps, more):
    """Print a line for each model."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    import effconvert

    torch.manual_seed(0)
    words = tokenizer()
    size = {"d_model": 64, "max_position_embeddings": 32, "vocab_size": len(WORDS) + 3, "dropout": 0.0}
    size |= {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in {"layers": 3, "attention_heads": 4, "ffn_dim": 256}.items()}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    started = time.monotonic()

    def show(what, model):
        print(f"{what:60} {model.num_parameters():8,} {perplexity(model, words):10.3f} {time.monotonic() - started:6.0f} s", flush=True)

    with TemporaryDirectory() as folder:
        place, text = Path(folder), Path(folder) / "text.txt"
        text.write_text("\n".join(source for source, _ in pairs(2000, "calibration")))
        original = train(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **size, **special)), steps, "train", words)
        show(f"{kind}, {steps} steps", original)
        original.save_pretrained(place / "original")
        words.save_pretrained(place / "original")
        show(f"the same, {more} steps more", train(AutoModelForSeq2SeqLM.from_pretrained(place / "original"), more, "more", words))
        for options in ({}, {"drop_decoder": True}, {"width": 768, "drop_decoder": True}):
            given = {"calibrate": str(text), "calibration_tokens": 4096, "verify": False, "overwrite": True}
            effconvert.convert(place / "original", {"share-ffn": options}, output=place / "converted", **given)
            converted = AutoModelForSeq2SeqLM.from_pretrained(place / "converted", dtype=torch.float32).eval()
            show(f"share-ffn {options}", converted)
            if options.get("drop_decoder") and kind == "bart":
                bare = deepcopy(converted)
                for layer in bare.model.decoder.layers:
                    layer.final_layer_norm = torch.nn.Identity()
                show("  without the norms behind the dropped FFNs", bare)
                show(f"    {more} steps more", train(bare, more, "more", words))
            show(f"  {more} steps more", train(converted, more, "more", words))


if __name__ == "__main__":
    main()
