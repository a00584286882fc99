"""What the tests of `effconvert eval` are made of: small models on disk, and tasks of lm-eval in two small files."""

import gc
import json
import shutil
import warnings
from pathlib import Path

import torch
import yaml
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.evaluate import evaluate

assert HFLM  # and all that it imports
gc.freeze()  # so that eval, which collects garbage after each model, does not look through the libraries each time

SMALL = {"tokens": 120, "context": 30, "passkey": (), "generation": False}
WORDS = ("sun", "moon", "sea", "hill", "tree", "bird", "rain", "wind", "stone", "river", "night", "fire")


def prose():
    """Write a short text, which takes less time to read than the default one."""
    Path("prose.txt").write_text("The quick brown fox jumps over the lazy dog. Where we go, nobody knows; there and back again, many times. " * 8)
    return Path("prose.txt")


def measure(*models, **options):
    """Evaluate folders on little text, unless `options` say otherwise."""
    given = {**SMALL, **options}
    return evaluate([str(model) for model in models], EvalOptions(**{"text": given.get("text") or prose(), **given}))


def row(evaluation, task, metric):
    """The one row of a metric."""
    [found] = [row for row in evaluation.rows if (row.task, row.metric) == (task, metric)]
    return found


def moved(folder, output, by=0.3, only=""):
    """Copy a model and add noise of standard deviation `by` to its matrices whose name contains `only`."""
    shutil.copytree(folder, output)
    draw = torch.Generator().manual_seed(1)
    for file in sorted(output.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if only in name and tensor.ndim == 2:
                tensors[name] = (tensor.float() + by * torch.randn(tensor.shape, generator=draw)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return output


def put(folder, model, tokenizer):
    """Write a model with its tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says while it saves is not what is tested
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def write_task(folder, name, documents, few=(), **config):
    """Write a task file of lm-eval with its documents; `few` are the examples for few-shot."""
    folder.mkdir(exist_ok=True)
    splits = {"test": documents, **({"train": few} if few else {})}
    for split, rows in splits.items():
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {split: str(folder / f"{name}-{split}.jsonl") for split in splits}
    held = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test", **config}
    if few:
        held["fewshot_split"] = "train"
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(held), encoding="utf-8")
    return folder


def choices(folder, name="pick", count=12, few=(), many=lambda index: 3, **config):
    """Write a multiple-choice task whose documents have `many(index)` choices."""
    documents = [
        {"question": f"{WORDS[index % 12]} {index}", "options": [WORDS[(index + shift) % 12] for shift in range(many(index))], "label": index * 7 % many(index)}
        for index in range(count)
    ]
    made = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    return write_task(folder, name, documents, few, **{**made, **config})


def byte_tokenizer(begin=False, trim=False, merges_of="", size=400):
    """One token a byte, or trained on `merges_of` up to `size` tokens; with a beginning; with offsets that leave blanks out, as pythia's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if merges_of:
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([merges_of], trainer)
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace_tokenizer(text, size=200):
    """A tokenizer that writes a blank before every text, as the tokenizer.json of Llama 2 does, and numbers digit by digit."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list("0123456789"), max_token_length=4, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_llama(vocabulary, **changes):
    """A random Llama with as many tokens as a tokenizer has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, **shape, **changes})).eval()


def wordpiece(size=128):
    """A WordPiece tokenizer of the letters and `WORDS`, with [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces[:size])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
