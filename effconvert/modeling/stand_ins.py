"""Stand-ins for classes. A real class of effconvert imports its family, and importing all families takes seconds."""

from collections.abc import Callable
from typing import Any


class _StandIn(type):
    """The metaclass of stand-ins: the first use of one makes the real class."""

    _make: Callable[[], Any]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._make(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._make()(*args, **kwargs)


def stand_in(make: Callable[[], Any], **known: Any) -> Any:
    """Return a stand-in for the class that `make` returns. It has the attributes `known` without calling `make`."""
    return _StandIn("StandIn", (), {"_make": staticmethod(make), **known})
