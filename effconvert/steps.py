"""What a conversion can consist of: techniques that change the architecture, and rungs that bring quality back.

One file in `surgery` or `heal` is one of them: its name is the command, its class holds the options. The first line of the file is what the
list of commands says, read without importing the file, so that listing costs nothing.
"""

import os
from typing import TYPE_CHECKING

from effconvert import heal, surgery

if TYPE_CHECKING:
    from effconvert.surgery._surgery import Surgery


def catalogue() -> dict[str, str]:
    """Map each step that a recipe may hold to its one-line summary, techniques first."""
    return {**techniques(), **rungs()}


def techniques() -> dict[str, str]:
    """Map each technique to its one-line summary."""
    return summaries(surgery.HERE)


def rungs() -> dict[str, str]:
    """Map each rung of healing to its one-line summary."""
    return summaries(heal.HERE)


def load(name: str) -> "type[Surgery]":
    """Import step `name` and return its class: expand-kv is `ExpandKv` in surgery/expand_kv.py."""
    from importlib import import_module

    package = "heal" if name in rungs() else "surgery"
    module = import_module(f"effconvert.{package}.{name.replace('-', '_')}")
    step: type[Surgery] = getattr(module, name.title().replace("-", ""))
    return step


def summaries(folder: str) -> dict[str, str]:
    """Map each file of Python in `folder`, as a command is spelt, to its first line."""
    files = sorted(file for file in os.listdir(folder) if file.endswith(".py") and not file.startswith("_"))
    return {file.removesuffix(".py").replace("_", "-"): _summary(os.path.join(folder, file)) for file in files}


def _summary(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().strip().strip('"')
