"""Rows of text or conversations: JSON lines, a JSON array or parquet here, or a dataset on the Hub."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effconvert.errors import EffconvertError, OptionError, is_offline
from effconvert.paths import expand
from effconvert.quiet import quiet_datasets

FILES = (".txt", ".md", ".json", ".jsonl", ".gz", ".csv", ".parquet")  # endings of file names, which no dataset's name has
ROWS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")  # endings of names of files that hold rows
COLUMNS = ("text", "messages")  # all that is read
BATCH = 1000  # rows of parquet in memory at a time

Conversation = tuple[dict[str, Any], ...]  # messages with `role` and `content`


class RowError(ValueError):
    """A row is neither a text nor a conversation; the text says why."""

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.number = number  # of the row, from 1, if it could not be yielded; else 0


def has_rows(path: Path) -> bool:
    """Whether a file holds rows, by its name."""
    return path.name.lower().endswith(ROWS)


def has_pairs(path: Path) -> bool:
    """Whether a file of rows has pairs to translate (`source`, `target`), by its first row."""
    try:
        _, row = next(_of_file(path), (0, None))
    except Exception:  # damaged; reading it says why
        return False
    return isinstance(row, dict) and "source" in row and "text" not in row


def read_rows(value: str, option: str) -> Iterator[str | Conversation]:
    """Yield the rows of a file or of a dataset on the Hub as they come: the column `text`, or `messages` where that is blank; never both, nor a blank row.

    Raises:
        OptionError: it is no such file or dataset, a row has neither, or all are blank.
        EffconvertError: the Hub cannot be reached.
    """
    path = expand(value)
    name, _, config = value.partition(":")
    hub = not path.exists() and name.count("/") == 1 and path.suffix.lower() not in FILES
    if not path.is_file() and not hub:
        raise OptionError(f"{option} {value} is neither a file nor the name of a dataset on the Hub (owner/name, owner/name:config); give one")
    kinds, number = set[type](), 0
    try:
        for number, row in _of_hub(name, config) if hub else _of_file(path):  # noqa: B007 (named in errors)
            if not (content := _content(row)):
                continue
            kinds.add(type(content))
            if len(kinds) > 1:
                raise RowError("it is a text, and others are conversations" if isinstance(content, str) else "it is a conversation, and others are texts")
            yield content
    except RowError as error:
        need = "each row needs a `text`, or each `messages` with a role and a content each"
        raise OptionError(
            f"{option} {value} cannot be used from row {error.number or number} on: {error}; {need}; give others, or a text file (.txt)"
        ) from None
    except Exception as error:  # a damaged file, a missing dataset or no network: libraries raise many types
        if is_offline(error):
            raise EffconvertError(f"{option} {value} is not here, and the Hub cannot be reached or has no such dataset; try again with a network") from error
        raise OptionError(
            f"{option} {value} cannot be read ({type(error).__name__}: {error}); give a text file (.txt), or JSON lines with a `text` in each row"
        ) from None
    if not kinds:
        raise OptionError(f"{option} {value} has no row with a text; give another")


def _of_hub(name: str, config: str) -> Iterator[tuple[int, Any]]:
    import datasets

    with quiet_datasets():
        yield from enumerate(datasets.load_dataset(name, config or None, split="train", streaming=True), 1)


def _of_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file with their numbers."""
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            batches = file.iter_batches(BATCH, columns=columns) if file.metadata.num_rows else ()
            yield from enumerate((row for batch in batches for row in batch.to_pylist() or [{}]), 1)
        return
    opening = gzip.open if path.suffix.lower() == ".gz" else open
    with opening(path, "rt", encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if first.lstrip().startswith("[") or not (".jsonl" in path.suffixes or _is_json(first)):  # an array, or one object over several lines
            whole = json.load(lines)
            yield from enumerate(whole if isinstance(whole, list) else [whole], 1)
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise RowError(f"it is no JSON ({error.msg})", number) from None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _content(row: Any) -> str | Conversation:
    """Return the text of a row, or else its conversation; "" or () if it is blank.

    Raises:
        RowError: it has neither.
    """
    if not isinstance(row, dict):
        raise RowError("it is no JSON object")
    text, messages = (row.get(name) for name in COLUMNS)
    if isinstance(text, str) and text.strip():
        return _sound(text)
    if messages is None and (text is None or isinstance(text, str)) and any(name in row for name in COLUMNS):
        return ""
    if messages is None:
        raise RowError("its `text` is no text" if "text" in row else "it has neither")
    if not isinstance(messages, list) or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise RowError("its `messages` are no list of messages with a role each")
    return tuple({**message, "content": _said(message.get("content"))} for message in messages)


def _said(content: Any) -> str:
    """Return what a message says as one text: templates of models that read text alone would write parts as Python does.

    Raises:
        RowError: it is no text.
    """
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
        raise RowError("a message has no text as its content, such as a call of a tool or a picture")
    return _sound("".join(texts))


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("its text has half of a character (a lone surrogate)") from None
    return text
