"""Text to measure on: a file, or the docstrings of the Python that is running.

The default text ships with nobody: it is gathered from the standard library's own source, so it exists wherever
effconvert runs. It differs a little from one Python version to the next, which is why `Text.name` states the version.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from effconvert.errors import OptionError
from effconvert.paths import expand

# Held out: the embedded model was not trained on these, and nothing may be calibrated on them.
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


@dataclass(frozen=True)
class Text:
    """A text and what to call it in a table."""

    name: str
    content: str


def default_text() -> Text:
    """Return the docstrings of `EVALUATION_MODULES`, in that order."""
    version = ".".join(map(str, sys.version_info[:3]))
    content = "\n\n".join(doc for module in EVALUATION_MODULES for doc in docstrings(module))
    return Text(f"docstrings of {len(EVALUATION_MODULES)} standard-library modules, Python {version}", content)


def read_text(path: Path) -> Text:
    """Return the UTF-8 file `path` as a text.

    Raises:
        OptionError: there is no such file, or it is not UTF-8 text, or it is empty.
    """
    try:
        content = expand(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"--text {path} is not UTF-8 text ({error.reason} at byte {error.start}); give a plain text file") from None
    except OSError as error:
        raise OptionError(f"--text {path} cannot be read ({error.strerror}); give a plain text file") from None
    if not content.strip():
        raise OptionError(f"--text {path} is empty; give a plain text file")
    return Text(path.name, content)


def docstrings(module: str) -> Iterator[str]:
    """Yield the docstrings in the source of `module`, outermost first, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise OptionError(f"this Python carries no source for its module {module!r}, so there is no default text; give --text FILE")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield doc
