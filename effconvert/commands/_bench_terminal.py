"""A progress bar that does not disturb what is timed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from effconvert.console import Terminal
from effconvert.progress import Advance, Unit

PAUSE = 1.0  # seconds between drawings: drawing pushes a small model out of the processor's caches


class BenchTerminal(Terminal):
    """Draws its bar between measurements only: a drawing thread would take time from them."""

    @contextmanager
    def bar(self, what: str, total: int, unit: Unit) -> Iterator[Advance]:
        """Show how much is done."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=self.err, disable=not self.err.is_terminal, transient=True, auto_refresh=False) as bar:
            task = bar.add_task(escape(what), total=total)
            bar.refresh()
            last_drawing = time.monotonic()

            def advance(count: int) -> None:
                nonlocal last_drawing
                due = time.monotonic() > last_drawing + PAUSE
                last_drawing = time.monotonic() if due else last_drawing
                bar.update(task, advance=count, refresh=due)

            yield advance
