"""Measurements of encoders: how well they fill masked tokens, how far their hidden states moved, and whether close sentences stay close."""
# N = windows, T = tokens, M = hidden width, V = vocabulary.

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, nll_loss

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.paired import make
from effconvert.eval.quality.store import Result
from effconvert.paths import expand
from effconvert.progress import Advance

SHARE = 0.15  # of the tokens are masked, as in BERT's training (Devlin et al. 2019, arXiv 1810.04805, section 3.1), here always by [MASK]
BATCH = 32  # sentences at a time
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Masked:
    """Windows with some tokens masked."""

    inputs: tuple[Tensor, ...]  # token ids, N of [T]
    targets: tuple[Tensor, ...]  # the original tokens, -100 where nothing is masked


def mask(tokenizer: Any, content: tuple[str, ...], longest: int | None, vocabulary: int) -> Masked:
    """Mask `SHARE` of the tokens of each text, the same ones in each run.

    Raises:
        ModelError: the tokenizer has no mask, or does not belong to the model.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError("the tokenizer has no mask token, so nothing can be masked; leave out --text and give --pairs")
    generator = torch.Generator().manual_seed(0)
    inputs, targets = [], []
    for text in content:
        ids = torch.tensor(tokenizer(text, truncation=longest is not None, max_length=longest, verbose=False).input_ids)
        if ids.max() >= vocabulary:
            raise ModelError(f"the tokenizer gives the token {int(ids.max())} and the model has {vocabulary}: they do not belong together")
        special = torch.tensor(tokenizer.get_special_tokens_mask(ids.tolist(), already_has_special_tokens=True)).bool()
        chosen = (torch.rand(len(ids), generator=generator) < SHARE) & ~special
        if not chosen.any():
            chosen[(~special).nonzero()[0]] = True
        inputs.append(ids.masked_fill(chosen, tokenizer.mask_token_id))
        targets.append(ids.masked_fill(~chosen, -100))
    return Masked(tuple(inputs), tuple(targets))


@torch.inference_mode()
def fill(model: Any, masked: Masked, reference: list[Tensor] | None, advance: Advance) -> tuple[Result, list[Tensor]]:
    """Measure the loss at the masked tokens; with the original's log-probabilities [masked, V] also the distance from it.

    Returns:
        The result, and the model's own log-probabilities, on the CPU.
    """
    losses, kls, same, log_probabilities = [], [], [], []
    for index, (ids, targets) in enumerate(zip(masked.inputs, masked.targets, strict=True)):
        logits = model(ids[None].to(model.device)).logits[0]  # [T, V]
        _finite(logits)
        chosen = targets != -100
        log = logits[chosen.to(logits.device)].float().log_softmax(-1).cpu()  # [masked, V]
        losses.append((nll_loss(log, targets[chosen], reduction="sum").item(), len(log)))
        if reference is not None:
            kls.append(max(0.0, kl_div(log, reference[index], log_target=True, reduction="sum").item()) / len(log))
            same.append((log.argmax(-1) == reference[index].argmax(-1)).float().mean().item())
        log_probabilities.append(log)
        advance(len(ids))
    names = [str(index) for index in range(len(losses))]
    samples = [make("masked", "loss", "ratio", losses, names, "lower")]
    if reference is not None:
        samples.append(make("masked", "kl", "mean", kls, names, "lower"))
        samples.append(make("masked", "same_top_token", "mean", same, names, "higher"))
    return Result(tuple(samples)), log_probabilities


@torch.inference_mode()
def states(model: Any, windows: tuple[Tensor, ...], reference: list[Tensor] | None, advance: Advance) -> tuple[Result, list[Tensor]]:
    """Measure, for an encoder without a head, the cosine between each token's last hidden state and the original's.

    Returns:
        The result (empty without a reference), and the model's own states [T, M], on the CPU.
    """
    cosines, outputs = [], []
    for index, ids in enumerate(windows):
        state = model(ids[None].to(model.device)).last_hidden_state[0].float().cpu()  # [T, M]
        _finite(state)
        if reference is not None and reference[index].shape != state.shape:
            raise OptionError(f"the states are {state.shape[-1]} wide and the original's {reference[index].shape[-1]}: they cannot be compared; give --pairs")
        if reference is not None:
            cosines.append(cosine_similarity(state.double(), reference[index].double(), dim=-1).mean().item())
        outputs.append(state)
        advance(len(ids))
    if reference is None:
        return Result(()), outputs
    return Result((make("states", "cosine", "mean", cosines, [str(index) for index in range(len(cosines))], "higher"),)), outputs


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with similarity scores by people."""

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]


def read_pairs(path: Path) -> Pairs:
    """Read sentence pairs from JSON lines or CSV with the columns sentence1, sentence2 and score (or similarity_score).

    Raises:
        OptionError: the file does not exist, or has another format.
    """
    try:
        with expand(path).open(encoding="utf-8", newline="") as file:
            rows = [json.loads(line) for line in file if line.strip()] if path.suffix in (".jsonl", ".json") else list(csv.DictReader(file))
        pairs = Pairs(path.name, *zip(*map(_pair, rows), strict=True)) if rows else Pairs(path.name, (), (), ())
    except OSError as error:
        raise OptionError(f"--pairs {path} cannot be read ({error.strerror}); give a .jsonl or .csv file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"--pairs {path} is not rows with sentence1, sentence2 and score ({type(error).__name__}: {error}); give such a .jsonl or .csv file"
        ) from None
    if wrong := [number for number, score in enumerate(pairs.scores, 1) if not math.isfinite(score)]:
        raise OptionError(f"--pairs {path} has a score that is no number in row {wrong[0]}; mend that row")
    if len(set(pairs.scores)) == 1:
        raise OptionError(f"--pairs {path} has the same score in all rows, so there is no order to compare; give pairs that are more and less alike")
    if len(pairs.scores) < 3:
        raise OptionError(f"--pairs {path} has {len(pairs.scores)} pairs, and a rank correlation needs at least 3; give more")
    return pairs


def _pair(row: Any) -> tuple[str, str, float]:
    return str(row["sentence1"]), str(row["sentence2"]), float(row["score"] if "score" in row else row["similarity_score"])


@torch.inference_mode()
def closeness(model: Any, tokenizer: Any, pairs: Pairs, pooling: str, longest: int | None, advance: Advance) -> Result:
    """Rank-correlate (Spearman) the cosine of two sentences' embeddings with the pairs' scores."""
    first, second = (embed(model, tokenizer, sentences, pooling, longest, advance) for sentences in (pairs.first, pairs.second))  # [N, M] each
    close = cosine_similarity(first, second, dim=-1).tolist()
    items = list(zip(close, pairs.scores, strict=True))
    return Result((make("pairs", "spearman", "spearman", items, [str(index) for index in range(len(items))], "higher", chance=0.0),))


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, sentences: Sequence[str], pooling: str, longest: int | None, advance: Advance) -> Tensor:
    """Return a vector for each sentence, [N, M]: the mean of its states, or the first of them (`cls`)."""
    encoder = getattr(model, model.base_model_prefix, model)  # below a head, if there is one
    inputs = tokenizer(list(sentences), truncation=True, max_length=min(longest or 512, 512))
    lengths = [len(ids) for ids in inputs["input_ids"]]
    vectors: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):  # batches of one length, as not every class respects padding
        alike = [index for index, value in enumerate(lengths) if value == length]
        for batch in (alike[at : at + BATCH] for at in range(0, len(alike), BATCH)):
            arguments = {name: torch.tensor([inputs[name][index] for index in batch], device=model.device) for name in INPUTS if name in inputs}
            states = encoder(**arguments).last_hidden_state.double()  # [N, T, M]
            _finite(states)
            vectors |= dict(zip(batch, states[:, 0] if pooling == "cls" else states.mean(1), strict=True))
            advance(len(batch))
    return torch.stack([vectors[index] for index in range(len(sentences))])


def pooling_of(folder: Path) -> str:
    """Return how sentence-transformers pools a sentence's states: `mean`, or `cls` where the model's own settings say so."""
    try:
        settings = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        return "cls" if settings.get("pooling_mode_cls_token") else "mean"
    except (OSError, ValueError, AttributeError):
        return "mean"


def _finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ModelError("the model computes NaN or infinity")
