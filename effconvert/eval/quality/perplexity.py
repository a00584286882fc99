"""How well a language model predicts a text, and how far it is from the original.

Perplexity is that of consecutive windows of fixed length, each predicted without the text before it. KL and top-1 agreement compare the next-token
distributions at the same positions. The original's logits are kept in a file, so that only one model is in memory at a time.
"""
# N = windows, T = tokens in a window, V = vocabulary.

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.text import Text

ROWS = 64  # positions whose distributions are in float32 at a time
CHARACTERS = 8  # of a text that are tokenized for each token that is needed; more if these are too few
SLACK = 64  # tokens before the end, which may be others than in the whole text
LEAST = 32  # tokens of a text to measure on, unless fewer are asked for
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")  # settings of a model's own
ROUNDING = 1e-3  # of the largest number; experts, for one, round differently with other tokens in a batch


@dataclass(frozen=True)
class Window:
    """The result for one window of text."""

    loss: float  # cross-entropy, nats, summed
    tokens: int  # predicted
    kl: float | None = None  # KL(original || this), nats, summed
    same: int | None = None  # positions where both have the same most likely token


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text."""

    loss: float  # cross-entropy, nats a token
    tokens: int  # predicted
    context: int  # tokens in a window
    kl: float | None = None  # KL(original || this), nats a token
    agreement: float | None = None  # share of positions where both have the same most likely token

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class LogitsFile:
    """A file with the logits [rows, V] of one model, to compare other models with."""

    file: Path
    dtype: torch.dtype
    vocabulary: int  # V

    def rows(self, count: int) -> Tensor:
        """Map the file into memory."""
        return torch.from_file(str(self.file), shared=True, size=count * self.vocabulary, dtype=self.dtype).view(count, self.vocabulary)


def windows(tokenizer: Any, text: Text, context: int, tokens: int, vocabulary: int) -> Tensor:
    """Cut the first `tokens` tokens of `text` into windows [N, T], each with the tokenizer's first special token.

    Raises:
        OptionError: the text is too short for a window.
        ModelError: the tokenizer gives tokens that the model does not have.
    """
    plain = tokenize(tokenizer, text.content, tokens).input_ids
    start = beginning(tokenizer, text.content)
    body = min(context - len(start), tokens)
    if len(plain) < (need := min(LEAST, max(body, 2))):
        raise OptionError(f"{text.name} has {len(plain)} tokens, and at least {need} are needed to measure on it; give a longer --text")
    body = min(body, len(plain))
    count = min(tokens, len(plain)) // max(body, 1)
    if body < 2:
        raise OptionError(f"--context {context} leaves no two tokens beside the special one that begins each window; give at least 3")
    batch = torch.tensor(plain[: count * body]).view(count, body)  # [N, T]
    if start:
        batch = torch.cat([torch.full((count, 1), start[0]), batch], 1)
    if batch.max() >= vocabulary:
        raise ModelError(f"the tokenizer gives the token {int(batch.max())} and the model has {vocabulary}: they do not belong together")
    return batch


def tokenize(tokenizer: Any, content: str, count: int, **more: bool) -> Any:
    """Return what the tokenizer makes of `content` without special tokens, or of so much of its beginning that the first `count` tokens are the same."""
    length = CHARACTERS * (count + SLACK)
    while length < len(content):
        end = max(content.rfind(blank, 0, length) for blank in " \n")  # a word that is cut may be other tokens from its first letter on
        encoded = tokenizer(content[: max(end, 0)], add_special_tokens=False, verbose=False, **more)
        if len(encoded.input_ids) >= count + SLACK:
            return encoded
        length *= 2
    return tokenizer(content, add_special_tokens=False, verbose=False, **more)


def beginning(tokenizer: Any, content: str) -> list[int]:
    """Return the special token that the tokenizer puts first, if any: Gemma fails without its <bos>."""
    ids: list[int] = tokenizer(content[:64], verbose=False).input_ids
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def measure(
    model: Any, batch: Sequence[Tensor], record: Path | None = None, reference: LogitsFile | None = None, advance: Callable[[int], None] = lambda _: None
) -> list[Window]:
    """Measure `model` on each of some windows, token ids [T].

    Args:
        model: a causal language model of transformers.
        batch: windows, which need not be equally long.
        record: file to write the logits to, to compare other models with.
        reference: logits of another model on the same windows.
        advance: called with the number of tokens done.

    Raises:
        ModelError: a logit is NaN or infinite.
    """

    def predicted() -> Iterator[tuple[Tensor, Tensor]]:
        for window in batch:
            yield logits_of(model, window)[:-1], window[1:]  # [T-1, V], [T-1]
            advance(len(window))

    return measure_predictions(model, predicted(), sum(len(window) - 1 for window in batch), record, reference)


def measure_predictions(
    model: Any, predicted: Iterable[tuple[Tensor, Tensor]], count: int, record: Path | None = None, reference: LogitsFile | None = None
) -> list[Window]:
    """Measure predictions of `model`, computed one after the other: for each document the logits [T, V] and the tokens [T] that came, together `count` tokens.

    `record` and `reference` are as in `measure`.
    """
    if record:
        reserve(record, count * vocabulary(model) * model.dtype.itemsize)
        reference = LogitsFile(record, model.dtype, vocabulary(model))
    reference_rows = reference.rows(count) if reference else None  # [rows, V]
    results, start = [], 0
    for logits, targets in predicted:
        rows = reference_rows[start : start + len(logits)] if reference_rows is not None else None
        if record and rows is not None:
            rows.copy_(logits)
        results.append(_window(logits, targets, None if record else rows))
        start += len(logits)
    return results


def _window(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Window:
    loss = kl = same = 0.0
    for at in range(0, len(logits), ROWS):
        rows = slice(at, at + ROWS)
        mine = logits[rows].float().log_softmax(-1)
        loss += nll_loss(mine, targets[rows].to(logits.device), reduction="sum").item()
        if reference is not None:
            theirs = reference[rows].to(logits.device).float().log_softmax(-1)
            kl += kl_div(mine, theirs, log_target=True, reduction="sum").item()
            same += (mine.argmax(-1) == theirs.argmax(-1)).sum().item()
    return Window(loss, len(logits)) if reference is None else Window(loss, len(logits), max(kl, 0.0), int(same))


def summary(results: Sequence[Window], context: int) -> Quality:
    """Sum the results of windows."""
    tokens = sum(window.tokens for window in results)
    kl = [window.kl for window in results if window.kl is not None]
    same = [window.same for window in results if window.same is not None]
    return Quality(sum(window.loss for window in results) / tokens, tokens, context, sum(kl) / tokens if kl else None, sum(same) / tokens if same else None)


def vocabulary(model: Any) -> int:
    """Return the number of logits of `model`."""
    return int(model.config.get_text_config().vocab_size)


def reserve(file: Path, size: int) -> None:
    """Allocate `file` of `size` bytes on disk, without holes: a full disk is an OSError here, and a fatal signal in mapped memory."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            for start in range(0, size, 1 << 20):
                opened.write(bytes(min(size - start, 1 << 20)))


@torch.inference_mode()
def logits_of(model: Any, window: Tensor) -> Tensor:
    """Return the output of `model` for one sequence [T]: logits [T, V], or hidden states where it has no head.

    Raises:
        ModelError: the output has NaN or infinity.
    """
    values = values_of(model(window[None].to(model.device), use_cache=False))
    if not torch.isfinite(values).all():
        raise ModelError("the model computes NaN or infinity")
    return values


def values_of(output: Any) -> Tensor:
    """Return the logits [T, V] of the first sequence in a model's output, or its hidden states where there are none."""
    values: Tensor = (output.logits if "logits" in output else output.last_hidden_state)[0]
    return values


@torch.inference_mode()
def sees_later(model: Any, text: Tensor) -> bool:
    """Whether outputs for a text [T] depend on a later token: on the last, or on the one in the middle."""
    before = values_of(model(text[None].to(model.device)))
    for place in {len(text) // 2, len(text) - 1} - {0}:
        changed = text.clone()
        changed[place] = changed[place] - 1 if changed[place] else 1
        earlier = (values_of(model(changed[None].to(model.device))) - before)[:place].abs()
        if earlier.max() > ROUNDING * before.abs().max():
            return True
    return False


@torch.inference_mode()
def kv_bytes(model: Any, window: Tensor) -> tuple[int, int]:
    """Measure the bytes of the cache object after one sequence [T]: those that grow with its length, and those of mixers."""
    from effconvert.modeling.transformers_internals import cache_among

    cache = cache_among(model(window[None].to(model.device), use_cache=True).values())
    fixed = sum(layer.nbytes for layer in cache.layers if hasattr(layer, "nbytes"))
    return cache_bytes(cache) - fixed, fixed


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all layers of a transformers cache object: keys, values and whatever states they hold of sequences."""
    return sum(layer.nbytes if hasattr(layer, "nbytes") else sum(tensor.nbytes for tensor in _states(vars(layer).values())) for layer in cache.layers)


def _states(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among `values` that are states of sequences: those of one dimension or none are counters."""
    for value in values:
        if isinstance(value, dict):
            yield from _states(value.values())
        elif isinstance(value, Tensor) and value.ndim > 1:
            yield value


def continuation(model: Any, tokenizer: Any, prompt: Tensor, length: int) -> str:
    """Return the greedy continuation of `prompt` [T] as text."""
    return str(tokenizer.decode(greedy(model, tokenizer, prompt, length), skip_special_tokens=True))


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompt: Tensor, length: int) -> list[int]:
    """Return the greedy continuation of `prompt` [T], at most `length` tokens; settings such as a repetition penalty do not count."""
    from transformers import GenerationConfig

    ids, usual = prompt[None].to(model.device), model.generation_config
    special = {name: getattr(usual, name) for name in SPECIAL_TOKENS}
    # Put on the model: the settings of a config that is handed to `generate` are filled up from the model's own.
    model.generation_config = GenerationConfig(**special, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length)
    finally:
        model.generation_config = usual
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens
