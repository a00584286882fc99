"""One file here is one command beside the techniques: its name is the command, and `command` in it is what Click runs.

The first line of a file is what the list of commands says, as for techniques.
"""

from typing import TYPE_CHECKING

from effconvert.discovery import summaries

if TYPE_CHECKING:
    import click


def catalogue() -> dict[str, str]:
    """Map each command to its one-line summary."""
    return summaries(__path__)


def load(name: str) -> "click.Command":
    """Import command `name`."""
    from importlib import import_module

    command: click.Command = import_module(f"effconvert.commands.{name.replace('-', '_')}").command
    return command
