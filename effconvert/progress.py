"""Who is told how a conversion goes on: a terminal, a notebook, or by default nobody."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

Unit = Literal["bytes", "tokens", "documents", "steps"]
Advance = Callable[[int], None]


class Watcher(Protocol):
    """Who is told how a conversion goes on."""

    def plan(self, model: str, plan: Any, output: Path, verify_bytes: int) -> None:
        """Everything is planned for what the asker calls `model`; nothing is written yet."""

    def step(self, what: str) -> None:
        """Something begins that takes a while."""

    def bar(self, what: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        """Something begins whose length is known: `total` units, and the function that is given is told how many more are done."""


class Silent:
    """Tells nobody."""

    def plan(self, model: str, plan: Any, output: Path, verify_bytes: int) -> None:
        """Say nothing."""

    def step(self, what: str) -> None:
        """Say nothing."""

    def bar(self, what: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        """Show nothing."""
        return nullcontext(lambda _: None)
