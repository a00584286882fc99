"""Windows of one document each: none goes across the end of one, and what fills them up is not compared.

The filling is at the end, so no token that counts sees it, whatever stands in for attention: a state cannot be masked by position, as packed windows need.
"""
# N = windows, T = tokens in a window.

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from effconvert.errors import ModelError, OptionError
from effconvert.heal._windows import UNLABELLED, Item, Items

SHORTEST = 2  # tokens of a window, of which one is predicted
ASSISTANT = "assistant"

Conversation = Sequence[Mapping[str, Any]]  # messages: `role` and `content`
Piece = tuple[Sequence[int], Sequence[bool] | None]  # of a document: token ids, and which of them are predicted; None: all


@dataclass(frozen=True)
class Filled:
    """Windows of documents, [N, T] each."""

    ids: Tensor  # token ids
    predicted: Tensor  # bool: which tokens are predicted


def windows_of_texts(tokenizer: Any, start: Sequence[int], texts: Iterable[str], length: int, most: int) -> Filled:
    """Cut each text into windows of at most `length` tokens that begin with `start`, until there are `most` windows.

    All tokens but the first of a window are predicted.
    """

    def pieces() -> Iterator[Piece]:
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            body = length - len(start)
            for at in range(0, len(ids), body):
                yield [*start, *ids[at : at + body]], None

    return _filled(pieces(), length, most, _filling(tokenizer))


def windows_of_conversations(tokenizer: Any, conversations: Iterable[Conversation], length: int, most: int) -> Filled:
    """Write each conversation by the tokenizer's chat template, and cut it into windows, until there are `most`; what the assistant says is predicted.

    Raises:
        ModelError: the tokenizer has no chat template, or one that writes the past anew with each message.
        OptionError: the template refuses a conversation.
    """
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer does not say where in a text its tokens stand, so it is unknown which the assistant said; take one with tokenizer.json")
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template, so conversations cannot be written as text; give a model that has one, or --data with a `text`")

    def pieces() -> Iterator[Piece]:
        for number, messages in enumerate(conversations, 1):
            text, spans = _written(tokenizer, messages, number)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            by_assistant = [any(begin <= first < end for begin, end in spans) for first, _ in encoded.offset_mapping]
            for at in range(0, len(by_assistant), length):
                yield encoded.input_ids[at : at + length], by_assistant[at : at + length]

    return _filled(pieces(), length, most, _filling(tokenizer))


def predicted_tokens(windows: Filled) -> Items:
    """Make items of windows: a token counts whose next one is predicted."""

    def item(index: int) -> Item:
        ids, counts = windows.ids[index].long(), torch.zeros_like(windows.predicted[index])
        counts[:-1] = windows.predicted[index, 1:]
        labels = torch.full_like(ids, UNLABELLED)
        labels[:-1] = torch.where(counts[:-1], ids[1:], UNLABELLED)
        return {"input_ids": ids, "labels": labels, "counts": counts}

    return Items(len(windows.ids), item)


def _written(tokenizer: Any, messages: Conversation, number: int) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as text, and where the assistant speaks in it: from behind what the template prompts it with, to the end of its message."""

    def write(count: int, prompt: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # jinja's errors, and what a template raises by itself
            raise OptionError(f"the chat template refuses conversation {number} of --data ({error}); leave it out, or mend it") from None

    whole, spans = write(len(messages), False), []
    for index, message in enumerate(messages):
        if message["role"] == ASSISTANT and index:  # what nothing was said before is taken as given
            before, after = write(index, True), write(index + 1, False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ModelError(
                    "the chat template writes earlier messages in another way once more follow, so it is unknown what the assistant said; "
                    "give --data with a `text`, written as it should be read"
                )
            spans.append((len(before), len(after)))
    return whole, spans


def _filling(tokenizer: Any) -> int:
    """Return a token to fill windows up with; which one makes no difference."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(number for number in known if number is not None))


def _filled(pieces: Iterable[Piece], length: int, most: int, filling: int) -> Filled:
    """Fill windows up; those in which nothing is predicted are left out."""

    def kept() -> Iterator[tuple[Sequence[int], Sequence[bool]]]:
        for ids, by_assistant in pieces:
            predicted = [False, *(by_assistant[1:] if by_assistant is not None else [True] * (len(ids) - 1))]
            if len(ids) >= SHORTEST and any(predicted):
                yield ids, predicted

    rows = list(islice(kept(), most))
    ids = torch.full((len(rows), length), filling, dtype=torch.int32)
    predicted = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (tokens, marks) in enumerate(rows):
        ids[row, : len(tokens)], predicted[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(marks)
    return Filled(ids, predicted)
