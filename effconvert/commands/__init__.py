"""Each file here is a command beside the techniques: its name is the command's, and Click runs its `command`.

The first line of a file is its summary in the list of commands, as for techniques.
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
