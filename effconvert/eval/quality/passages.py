"""The same passages of text for every model, whatever its tokenizer.

The first model's tokenizer cuts the text into windows. A model with the same tokenizer gets the same tokens. Any other gets the same passages in its
own tokens; then only numbers per byte can be compared.
"""
# N = windows, T = tokens in a window.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import beginning, tokenize, windows
from effconvert.eval.quality.text import Text


@dataclass(frozen=True)
class Passages:
    """Windows of text in the tokens of one model."""

    windows: tuple[Tensor, ...]  # token ids, N of [T]
    bytes: tuple[int, ...]  # UTF-8 bytes of the tokens that are predicted: all but the first
    content: tuple[str, ...]  # the passages as text
    alike: bool  # whether these are the first model's tokens


def cut(tokenizer: Any, text: Text, context: int, tokens: int, vocabulary: int) -> Passages:
    """Cut the first `tokens` tokens of `text` into windows of `context`, as `quality.windows` does.

    Raises:
        OptionError: the text is too short.
        ModelError: the tokenizer does not belong to the model, or gives no offsets of its tokens.
    """
    ids = windows(tokenizer, text, context, tokens, vocabulary)  # [N, T]
    spans, start = offsets(tokenizer, text.content, tokens), len(beginning(tokenizer, text.content))
    body = ids.shape[1] - start
    content, sizes = [], []
    for first in range(0, len(ids) * body, body):
        stop = spans[first + body][0] if first + body < len(spans) else spans[-1][1]  # start of the next token, so that a letter in two tokens counts once
        content.append(text.content[spans[first][0] : stop])
        sizes.append(len(text.content[spans[first + (not start)][0] : stop].encode()))
    return Passages(tuple(ids), tuple(sizes), tuple(content), alike=True)


def recut(tokenizer: Any, first: Passages, other: Any, vocabulary: int, longest: int | None, name: str) -> Passages:
    """Return the passages of `first`, which `tokenizer` cut, in the tokens of tokenizer `other`.

    Raises:
        OptionError: a window is too long for that model.
        ModelError: the tokenizer does not belong to the model.
    """
    if same(tokenizer, other, first.content):
        return first
    passages, sizes = [], []
    for content in first.content:
        start = beginning(other, content)
        ids = torch.tensor(start + other(content, add_special_tokens=False, verbose=False).input_ids)
        if longest is not None and len(ids) > longest:
            raise OptionError(f"a window is {len(ids)} tokens to {name}, which reads {longest}; give a smaller --context")
        if ids.max() >= vocabulary:
            raise ModelError(f"the tokenizer of {name} gives the token {int(ids.max())} and the model has {vocabulary}: they do not belong together")
        passages.append(ids)
        sizes.append(len(content[offsets(other, content, 2)[not start][0] :].encode()))
    return Passages(tuple(passages), tuple(sizes), first.content, alike=False)


def same(first: Any, other: Any, content: tuple[str, ...]) -> bool:
    """Whether two tokenizers give the same tokens for these texts."""
    return all(first(text, verbose=False).input_ids == other(text, verbose=False).input_ids for text in content)


def offsets(tokenizer: Any, content: str, count: int) -> list[tuple[int, int]]:
    """Return the start and end of at least the first `count` tokens in `content`, if it has as many.

    Raises:
        ModelError: this kind of tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer gives no offsets of its tokens, so nothing can be counted in bytes; save a fast one (tokenizer.json) beside the model")
    spans: list[tuple[int, int]] = tokenize(tokenizer, content, count, return_offsets_mapping=True).offset_mapping
    return spans
