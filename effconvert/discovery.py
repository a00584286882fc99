"""Find techniques, healing methods and commands by their files: one file each, and its name is the command.

The first line of a file is the summary in the list of commands. It is read without importing the file, so a list costs nothing.
"""

import os
from collections.abc import Iterable, Iterator
from functools import cache
from types import ModuleType
from typing import Any


def summaries(folders: Iterable[str]) -> dict[str, str]:
    """Map each file of Python in `folders` and the folders inside, as a command is spelt, to its first line; sorted."""
    return dict(_summaries(tuple(folders)))


@cache  # a plan asks many times
def _summaries(folders: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((_command(file), _summary(file)) for file, _ in _files(folders)))


def folder(folders: Iterable[str], name: str) -> str:
    """Return the name of the folder in which the file of a command is; empty for one of `folders` itself."""
    module = next(module for file, module in _files(folders) if _command(file) == name)
    return module.rpartition(".")[0]


def load(package: ModuleType, name: str) -> Any:
    """Import the file that is `name` in `package`, and return the class of its options: expand-kv is the one in surgery/attention/expand_kv.py.

    Raises:
        KeyError: there is none.
        TechniqueError: its file cannot be imported, or defines no such class, or an incomplete one.
    """
    from importlib import import_module

    from effconvert.errors import EffconvertError, TechniqueError

    for file, module in _files(package.__path__):
        if _command(file) == name:
            try:
                return _options_of(import_module(f"{package.__name__}.{module}"))
            except EffconvertError:
                raise
            except Exception as error:  # whatever the author's code raises
                raise TechniqueError(f"{file} cannot be used: {type(error).__name__}: {error}") from error
    raise KeyError(name)


def _files(folders: Iterable[str], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and module (relative to its package) of each file that is a command. Files whose names begin with _ are not."""
    for folder in folders:
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.startswith(("_", ".")):
                continue
            if name.endswith(".py"):
                yield path, above + name.removesuffix(".py")
            elif os.path.isdir(path):
                yield from _files([path], f"{above}{name}.")


def _command(file: str) -> str:
    return os.path.basename(file).removesuffix(".py").replace("_", "-")


def _summary(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def _options_of(module: ModuleType) -> Any:
    """Return the class of a step's options: the one class of the file that is a step."""
    own = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__ and hasattr(cls, "rewrite")]
    if len(own) != 1:
        raise TypeError(f"it must define one class derived from Surgery or Healing, and defines {len(own)}")
    if missing := sorted(getattr(own[0], "__abstractmethods__", ())):
        raise TypeError(f"its class {own[0].__name__} lacks {', '.join(missing)}")
    return own[0]
