"""Text to measure on: a file, or the docstrings of the running Python.

The default text is collected from the standard library's source, so it exists wherever effconvert runs. It differs a little between Python
versions, so `Text.name` states the version.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from effconvert.errors import OptionError
from effconvert.eval.quality.rows import has_pairs, has_rows, read_rows
from effconvert.paths import expand

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

MOST = 20_000_000  # characters of a dataset that are read to calibrate on
PIECE = 4_000_000  # characters at a time


@dataclass(frozen=True)
class Text:
    """A text and its name in tables."""

    name: str
    content: str
    pairs: bool = False  # whether it is JSON lines, each with a text to translate and its translation


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
    """Return the text that an option names: a text file, JSON or parquet with a `text` in each row, or the training split of a dataset on the Hub.

    Raises:
        OptionError: it is none of these, or has no text.
        EffconvertError: the Hub cannot be reached.
    """
    path = expand(value)
    return read_text(path, option) if path.is_file() else _of_rows(value, option)


def _of_rows(value: str, option: str) -> Text:
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


def read_text(path: Path, option: str = "--text") -> Text:
    """Return the UTF-8 file `path`, the value of `option`, as a text; of JSON and parquet the `text` in each row, unless the rows are pairs to translate.

    Raises:
        OptionError: the file does not exist, is not UTF-8 text, is empty, or has other rows.
    """
    pairs = expand(path).is_file() and has_rows(path) and has_pairs(expand(path))
    if expand(path).is_file() and has_rows(path) and not pairs:
        return _of_rows(str(path), option)
    return Text(path.name, "".join(read_pieces(path, option)), pairs)


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
