"""The command line: finds a command, and turns errors into a line and an exit code. Imports neither torch nor anything else that is slow."""

import os
import sys
from typing import Any

import click

from effconvert import commands, steps
from effconvert.errors import BROKEN_PIPE, INTERRUPTED, STOPPED, EffconvertError, is_interrupt
from effconvert.overview import page
from effconvert.version import __version__


class Commands(click.Group):
    """A command for each technique and each file in `commands`, imported when it is called."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the first page."""
        formatter.write(page())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the techniques first."""
        return [*steps.catalogue(), *commands.catalogue()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command, or say which one was meant."""
        summary = steps.catalogue().get(cmd_name)
        if summary is not None:
            return _technique(cmd_name, summary)
        if cmd_name in commands.catalogue():
            return commands.load(cmd_name)
        if not ctx.resilient_parsing:
            from difflib import get_close_matches

            known = self.list_commands(ctx)
            near = [name for name in known if name.startswith(f"{cmd_name}-")] or get_close_matches(cmd_name, known, n=1)
            raise click.UsageError(f"there is no command {cmd_name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"), ctx)
        return None

    def invoke(self, ctx: click.Context) -> Any:
        """Turn our errors into a line and an exit code."""
        try:
            return self._invoke(ctx)
        except EffconvertError as error:
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)  # one line, whatever somebody named a file
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it once more at the end
            ctx.exit(BROKEN_PIPE)
        except OSError as error:
            click.echo(f"Error: {error.filename or 'a file'} cannot be used ({error.strerror}); mend that, and run the same command again", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo(STOPPED, err=True)
            sys.exit(INTERRUPTED)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if is_interrupt(error):
                raise KeyboardInterrupt from error
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """The group of all commands; its help page is in `effconvert.overview`."""


def _technique(name: str, summary: str) -> click.Command:
    from effconvert.commands._click import OptionsCommand
    from effconvert.options import RunOptions

    technique = steps.load(name)
    return OptionsCommand(
        name, [click.Argument(["model"], type=click.Path())], lambda: (technique, RunOptions), convert, help=technique.__doc__, short_help=summary
    )


def convert(model: str, **values: Any) -> None:
    """Convert by the technique that the command is named after."""
    from effconvert.commands._click import given_options
    from effconvert.console import Terminal
    from effconvert.convert.run import convert as run
    from effconvert.options import RunOptions

    name = click.get_current_context().info_name
    chosen = given_options(values)
    run_options = RunOptions(**{key: chosen.pop(key) for key in RunOptions.model_fields if key in chosen})
    technique = steps.load(str(name))(**chosen)
    terminal = Terminal(model)
    outcome = run(model, (technique,), run_options, terminal)
    if not run_options.dry_run:
        terminal.outcome(outcome)
