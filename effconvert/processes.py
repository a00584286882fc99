"""Several processes, as `accelerate launch` and `torchrun` start them: the first plans, converts and writes, and all of them train."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

WAIT = timedelta(days=7)  # for the first process: converting a large model takes hours
_alone: ContextVar[bool] = ContextVar("alone", default=False)

Tell = Callable[[Any], None]


def count() -> int:
    """Return the number of processes that work together."""
    return 1 if _alone.get() else int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process converts and writes."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def alone() -> Iterator[None]:
    """Let the first process do something by itself."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def leading() -> Iterator[Tell]:
    """Yield the function by which the first process tells the others what to train; those that get nothing end."""
    begun = False

    def tell(message: Any) -> None:
        nonlocal begun
        begun = True
        if count() > 1:
            _broadcast(message)

    yield tell
    if is_first() and not begun:  # after an error the launcher ends the others
        tell(None)


def received() -> Any:
    """Wait for what the first process tells; None where there is nothing to train."""
    return _broadcast(None)


def _broadcast(message: Any) -> Any:
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.accelerator.is_available(), timeout=WAIT)
    return broadcast_object_list([message])[0]
