"""Calibration text that the model writes itself: samples at temperature 1, each from a random first token.

A language model's own samples look like what it was trained on, and need nobody's files (Liu et al. 2023, "LLM-QAT", arXiv 2305.17888; Williams et al.
2024, "Self-calibration for language model quantization and pruning", arXiv 2410.17170). Writing takes the model whole, so the samples are kept in the cache.
"""
# N = samples, B = samples that are written together, T = tokens in a sample, V = vocabulary.

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.digest import digest
from effconvert.checkpoint.sources import cache
from effconvert.convert.plan import Plan
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import beginning
from effconvert.eval.results import versions
from effconvert.heal._calibration import Calibration
from effconvert.modeling import loading
from effconvert.modeling.caches import kv_bytes
from effconvert.modeling.precision import type_of
from effconvert.modeling.size import size_of
from effconvert.progress import Progress
from effconvert.quiet import quiet_transformers

SELF = "self"  # the value of --calibrate
TOGETHER = 32  # samples: a fixed number, because what is sampled depends on it
SEED = 0
LIBRARIES = 330_000_000  # bytes; transformers, and what PyTorch sets up to compute
COPIES = 6  # of a batch's logits in float32 while a token is drawn
MADE_WITH = ("effconvert", "torch", "transformers")  # whose versions may change what is sampled


def refusal(checkpoint: Checkpoint) -> str:
    """Say why `checkpoint` cannot write text, empty where it can."""
    config = checkpoint.config
    if not config.decoder:
        return f"{config.kind} is an encoder and writes no text"
    if not config.predicts:
        return f"{config.architecture} has no language-model head and writes no text"
    return ""


def prepare(plan: Plan, tokenizer: Any, count: int, length: int) -> Calibration:
    """Return `count` samples of `length` tokens: from the cache, or still to be written by `write`.

    The teacher writes: the converted model may be too broken to.

    Raises:
        OptionError: the model cannot write, or does not fit into memory.
    """
    writer = plan.teacher
    other = "give --calibrate FILE, or --calibrate docstrings for those of the standard library"
    if reason := refusal(writer):
        raise OptionError(f"{reason}; {other}")
    first = _first(tokenizer, count, _limit(plan, tokenizer))
    who = "model" if writer is plan.checkpoint else "teacher"
    name = f"text that the {who} wrote ({count} samples of {length} tokens, temperature 1, seed {SEED})"
    key = _key(writer, beginning(tokenizer, "a"), first, length, _limit(plan, tokenizer))
    ids = _kept(key, (count, length))
    if ids is None and (size := memory(writer, count, length)) > (free := psutil.virtual_memory().available):
        raise OptionError(
            f"to write its calibration text the model is loaded whole, which takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; {other}"
        )
    return Calibration(name, torch.empty(count, length, dtype=torch.long, device="meta") if ids is None else ids, key=key)


def memory(writer: Checkpoint, count: int, length: int) -> int:
    """Return about how many bytes of memory it takes to write: the weights, the cache of a batch with one layer's copy, logits."""
    together, itemsize = min(count, TOGETHER), type_of(writer).itemsize
    keys_and_values = together * kv_bytes(writer.config, itemsize, length)
    keys_and_values += 2 * keys_and_values // writer.config.layers  # those of a layer beside the new token's
    return size_of(writer).parameters * itemsize + keys_and_values + together * writer.config.vocabulary * 4 * COPIES + LIBRARIES


def write(plan: Plan, calibration: Calibration, progress: Progress) -> Calibration:
    """Have the model write the samples of `calibration`, unless they are there, and keep them in the cache.

    Raises:
        ModelError: it cannot be loaded, or computes NaN or infinity.
    """
    if not calibration.pending:
        return calibration
    count, length = calibration.ids.shape
    tokenizer = loading.load_tokenizer(plan.checkpoint.folder)
    with progress.bar("writing the calibration text", count * length, "tokens") as advance:
        ids = sample(plan.teacher, tokenizer, count, length, _limit(plan, tokenizer), advance=advance)
    _keep(calibration.key, ids)
    return replace(calibration, ids=ids)


def sample(
    writer: Checkpoint, tokenizer: Any, count: int, length: int, limit: int, temperature: float = 1.0, advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Return samples [N, T] of token ids below `limit`; the same each time on the same machine.

    A sample goes on behind an end-of-text token, as texts in training do.

    Raises:
        ModelError: the model cannot be loaded, or computes NaN or infinity.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    model = loading.load(writer.folder, writer.config, type_of(writer))
    start, first = beginning(tokenizer, "a"), _first(tokenizer, count, limit)
    above = [*range(limit, writer.config.vocabulary)] or None  # tokens that nobody can read
    prompt = torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), first[:, None]], 1)  # [N, 1 or 2]
    # Put on the model: the settings of a config that is handed to `generate` are filled up from the model's own, its end of text among them.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_length=length, min_length=0, pad_token_id=0, suppress_tokens=above
    )
    forked = [] if model.device.type == "cpu" else [model.device]
    with quiet_transformers(), torch.inference_mode(), torch.random.fork_rng(forked, device_type=model.device.type if forked else "cuda"):
        torch.manual_seed(SEED)
        batches = []
        for batch in prompt.split(TOGETHER):
            ids = batch.to(model.device)

            def count_tokens(so_far: Tensor, _: Any) -> Tensor:
                advance(len(so_far))
                return torch.zeros(len(so_far), dtype=torch.bool, device=so_far.device)

            try:
                ids = model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([count_tokens]))
            except RuntimeError as error:  # of NaN among probabilities, or of a device that is full
                raise ModelError(f"{writer.folder} cannot write text to calibrate on ({error}); give --calibrate FILE") from error
            batches.append(ids.cpu())
            advance(len(batch) * prompt.shape[1])
    return torch.cat(batches)


def _limit(plan: Plan, tokenizer: Any) -> int:
    """Return the limit of token ids: the tokenizer and both models know all tokens below it."""
    return min(len(tokenizer), plan.checkpoint.config.vocabulary, plan.teacher.config.vocabulary)


def _first(tokenizer: Any, count: int, limit: int) -> Tensor:
    """Return the first tokens [N], drawn from those that are plain text."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = torch.tensor([token for token in range(limit) if token not in special] or [*range(limit)])
    return plain[torch.randint(len(plain), (count,), generator=torch.Generator().manual_seed(SEED))]


def _key(writer: Checkpoint, start: list[int], first: Tensor, length: int, limit: int) -> str:
    """Return what identifies the samples: everything that they depend on."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    made_with = {name: versions().get(name) for name in MADE_WITH}
    depends = [digest(writer), start, first.tolist(), length, limit, TOGETHER, SEED, str(type_of(writer)), accelerator and accelerator.type, made_with]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def _place(key: str) -> Path:
    return cache() / "selftext" / f"{key[:32]}.safetensors"


def _kept(key: str, shape: tuple[int, int]) -> Tensor | None:
    """Return the samples from the cache; None where they are missing or incomplete."""
    with suppress(OSError, SafetensorError, KeyError):
        ids = load_file(_place(key))["ids"].long()
        return ids if ids.shape == shape else None
    return None


def _keep(key: str, ids: Tensor) -> None:
    """Put the samples into the cache, in one piece. A disk that cannot be written costs time later, and nothing now."""
    place = _place(key)
    draft = place.with_name(f"{place.name}.{os.getpid()}.draft")
    with suppress(OSError, SafetensorError):
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids.int()}, draft)
        draft.replace(place)
