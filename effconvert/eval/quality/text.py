"""Text to measure on: a file, or the docstrings of the running Python.

The default text is collected from the standard library's source, so it exists wherever effconvert runs. It differs a little between Python
versions, so `Text.name` states the version.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from effconvert.errors import EffconvertError, OptionError, is_offline
from effconvert.paths import expand
from effconvert.quiet import quiet_datasets

# Held-out modules: the embedded model was not trained on these, and nothing may be calibrated on them.
EVALUATION_MODULES = (
    "statistics",
    "difflib",
    "argparse",
    "heapq",
    "random",
    "typing",
    "fractions",
    "textwrap",
    "subprocess",
    "optparse",
)

FILES = (".txt", ".md", ".json", ".jsonl", ".gz", ".csv", ".parquet")  # endings of file names, which no dataset's name has
ROWS = (".jsonl", ".jsonl.gz", ".parquet")  # endings of names of files that hold rows
MOST = 20_000_000  # characters of a dataset that are read to calibrate on
PIECE = 4_000_000  # characters at a time


@dataclass(frozen=True)
class Text:
    """A text and its name in tables."""

    name: str
    content: str


Conversation = tuple[dict[str, Any], ...]  # messages with `role` and `content`


@cache  # parsing takes half a second, and a recipe or a caller of the API asks more than once
def default_text() -> Text:
    """Return the docstrings of `EVALUATION_MODULES`, in that order."""
    version = ".".join(map(str, sys.version_info[:3]))
    content = "\n\n".join(doc for module in EVALUATION_MODULES for doc in docstrings(module))
    return Text(f"docstrings of {len(EVALUATION_MODULES)} standard-library modules, Python {version}", content)


@cache
def calibration_text() -> Text:
    """Return the docstrings of all other modules of the standard library with source files, in alphabetical order."""
    version = ".".join(map(str, sys.version_info[:3]))
    modules = sorted(sys.stdlib_module_names - {*EVALUATION_MODULES} - {"this", "antigravity"})
    docs = [doc for module in modules if _has_source(module) for doc in docstrings(module)]
    if not docs:
        raise OptionError("this Python has no source of its standard library, so there is no default text to calibrate on; give --calibrate FILE")
    return Text(f"docstrings of the standard library, without the {len(EVALUATION_MODULES)} modules for evaluation, Python {version}", "\n\n".join(docs))


def read_calibration(value: str, option: str = "--calibrate") -> Text:
    """Return the text that an option names: a text file, JSON lines or parquet with a `text` in each row, or the training split of a dataset on the Hub.

    Raises:
        OptionError: it is none of these, or has no text.
        EffconvertError: the Hub cannot be reached.
    """
    path = expand(value)
    if path.is_file() and not path.name.endswith(ROWS):
        return read_text(path, option)
    texts, size = list[str](), 0
    for row in read_rows(value, option):
        if not isinstance(row, str):
            raise OptionError(f"{option} {value} has conversations (`messages`), and a `text` in each row is needed here; give a dataset that has one")
        texts.append(row)
        size += len(row)
        if size > MOST:
            break
    return Text(name_of(value), "\n\n".join(texts))


def name_of(value: str) -> str:
    """Return the name of a text in tables, for the value of an option that names a file or a dataset."""
    return path.name if (path := expand(value)).is_file() else value


class RowError(ValueError):
    """A row of a dataset is neither a text nor a conversation; the text says why."""


def read_rows(value: str, option: str) -> Iterator[str | Conversation]:
    """Yield the rows of JSON lines, of parquet or of a dataset on the Hub as they come: its column `text`, or else `messages`; never both, nor a blank text.

    Raises:
        OptionError: it is none of these, a row has neither, or all texts are blank.
        EffconvertError: the Hub cannot be reached.
    """
    path = expand(value)
    import datasets

    name, _, config = value.partition(":")
    hub = not path.exists() and name.count("/") == 1 and path.suffix not in FILES
    if not path.is_file() and not hub:
        raise OptionError(f"{option} {value} is neither a file nor the name of a dataset on the Hub (owner/name, owner/name:config); give one")
    kinds, number, blank = set[type](), 0, 0
    try:
        with quiet_datasets():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            rows = (
                datasets.load_dataset(name, config or None, split="train", streaming=True)
                if hub
                else datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
            )
            for number, row in enumerate(rows, 1):  # noqa: B007 (named in errors)
                content = row["text"] if isinstance(row.get("text"), str) else "" if _empty(row) else _messages(row)
                if isinstance(content, str) and not content.strip():
                    blank += 1
                    continue
                kinds.add(type(content))
                if len(kinds) > 1:
                    raise RowError("it is a text, and others are conversations" if isinstance(content, str) else "it is a conversation, and others are texts")
                yield content
    except RowError as error:
        need = "each row needs a `text`, or each `messages` with a role and a content each"
        raise OptionError(f"{option} {value} cannot be used from row {number} on: {error}; {need}; give one that has them, or a text file") from None
    except Exception as error:  # a damaged file, a missing dataset or no network: libraries raise many types
        if is_offline(error):
            raise EffconvertError(f"{option} {value} is not here, and the Hub cannot be reached or has no such dataset; try again with a network") from error
        raise OptionError(
            f"{option} {value} cannot be read ({type(error).__name__}: {error}); give a text file, or JSON lines with a `text` in each row"
        ) from None
    if blank == number:
        raise OptionError(f"{option} {value} has no row with a text; give another")


def _empty(row: Mapping[str, Any]) -> bool:
    return "text" in row and row["text"] is None and row.get("messages") is None


def _messages(row: Mapping[str, Any]) -> Conversation:
    """Return the messages of a conversation.

    Raises:
        RowError: it is none.
    """
    value = row.get("messages")
    if value is None:
        raise RowError("its `text` is no text" if "text" in row else "it has neither")
    if not isinstance(value, list) or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value):
        raise RowError("its `messages` are no list of messages with a role each")
    if not all(isinstance(message.get("content"), str | list) for message in value):
        raise RowError("a message has no text as its content, such as a call of a tool")
    return tuple(value)


def read_text(path: Path, option: str = "--text") -> Text:
    """Return the UTF-8 file `path`, the value of `option`, as a text.

    Raises:
        OptionError: the file does not exist, is not UTF-8 text, or is empty.
    """
    return Text(path.name, "".join(read_pieces(path, option)))


def read_pieces(path: Path, option: str) -> Iterator[str]:
    """Yield the lines of the UTF-8 file `path`, the value of `option`, many at a time.

    Raises:
        OptionError: the file does not exist, is not UTF-8 text, or is empty.
    """
    empty = True
    try:
        with expand(path).open(encoding="utf-8-sig") as file:
            while lines := file.readlines(PIECE):
                piece = "".join(lines)
                empty = empty and not piece.strip()
                yield piece
    except UnicodeDecodeError as error:
        raise OptionError(f"{option} {path} is not UTF-8 text ({error.reason}); give a plain text file") from None
    except OSError as error:
        raise OptionError(f"{option} {path} cannot be read ({error.strerror}); give a plain text file") from None
    if empty:
        raise OptionError(f"{option} {path} is empty; give a plain text file")


def _has_source(module: str) -> bool:
    spec = importlib.util.find_spec(module) if module != "__main__" else None
    return spec is not None and spec.origin is not None and spec.origin.endswith(".py")


def docstrings(module: str) -> Iterator[str]:
    """Yield the docstrings in the source of `module`, outermost first, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise OptionError(f"this Python has no source for its module {module!r}, so there is no default text; give --text FILE")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield doc
