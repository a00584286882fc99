"""One file here is one technique: its name is the command, its class holds the options.

The first line of a file is what the list of commands says, read without importing the file, so that listing costs nothing.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effconvert.surgery._surgery import Surgery

HERE = os.path.dirname(__file__)


def catalogue() -> dict[str, str]:
    """Map each technique to its one-line summary."""
    return summaries(HERE)


def load(name: str) -> "type[Surgery]":
    """Import technique `name` and return its class: expand-kv is `ExpandKv` in expand_kv.py."""
    from importlib import import_module

    module = import_module(f"effconvert.surgery.{name.replace('-', '_')}")
    technique: type[Surgery] = getattr(module, name.title().replace("-", ""))
    return technique


def summaries(folder: str) -> dict[str, str]:
    """Map each file of Python in `folder`, as a command is spelt, to its first line."""
    files = sorted(file for file in os.listdir(folder) if file.endswith(".py") and not file.startswith("_"))
    return {file.removesuffix(".py").replace("_", "-"): _summary(os.path.join(folder, file)) for file in files}


def _summary(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().strip().strip('"')
