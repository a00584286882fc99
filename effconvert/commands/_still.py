"""A progress bar for what is timed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from effconvert.console import Terminal
from effconvert.progress import Advance, Unit

PAUSE = 1.0  # seconds between drawings: what was drawn pushes a small model out of the processor's caches


class Still(Terminal):
    """Draws its bar when something is done, and not in between: a thread that draws takes its time from what is measured."""

    @contextmanager
    def bar(self, what: str, total: int, unit: Unit) -> Iterator[Advance]:
        """Show how much is done."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=self.err, disable=not self.err.is_terminal, transient=True, auto_refresh=False) as progress:
            task = progress.add_task(escape(what), total=total)
            progress.refresh()
            drawn = time.monotonic()

            def advance(moved: int) -> None:
                nonlocal drawn
                due = time.monotonic() > drawn + PAUSE
                drawn = time.monotonic() if due else drawn
                progress.update(task, advance=moved, refresh=due)

            yield advance
