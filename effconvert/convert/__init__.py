"""Checkpoint in, checkpoint out. Called itself, `effconvert.convert(...)`, it converts: see `effconvert.api.convert`."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is the function of the same name too: importing a part of it would otherwise hide the function (decision 7)."""

    def __call__(self, /, *args: Any, **options: Any) -> Any:
        from effconvert.api import convert

        return convert(*args, **options)


sys.modules[__name__].__class__ = _Callable
