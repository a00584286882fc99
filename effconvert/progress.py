"""Progress of a conversion: shown on a terminal, in a notebook, or by default nowhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

Unit = Literal["bytes", "tokens", "documents", "steps", "seconds"]
Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows the progress of a conversion."""

    def plan(self, model: str, plan: Any, output: Path, verify_bytes: int) -> None:
        """Show the plan for `model`, spelt as the caller spelt it; nothing is written yet."""

    def step(self, what: str) -> None:
        """Show that a slow step begins."""

    def log(self, line: str) -> None:
        """Show a line of a training's log."""

    def bar(self, what: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        """Show a bar for `total` units; yields a function that takes how many more are done."""


class NoProgress:
    """Shows nothing."""

    def plan(self, model: str, plan: Any, output: Path, verify_bytes: int) -> None:
        """Show nothing."""

    def step(self, what: str) -> None:
        """Show nothing."""

    def log(self, line: str) -> None:
        """Show nothing."""

    def bar(self, what: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        """Show nothing."""
        return nullcontext(lambda _: None)
