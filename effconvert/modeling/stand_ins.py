"""Stand-ins for classes: making a class of ours imports its family, and importing all families takes seconds."""

from collections.abc import Callable
from typing import Any


class _StandIn(type):
    """The class of classes that stand for another until something is asked of them."""

    _make: Callable[[], Any]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._make(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._make()(*args, **kwargs)


def stand_in(make: Callable[[], Any], **known: Any) -> Any:
    """Return a class that stands for the one that `make` returns, and has the attributes `known` before."""
    return _StandIn("StandIn", (), {"_make": staticmethod(make), **known})
