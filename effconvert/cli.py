"""The commands: read options, call, print. Imports neither torch nor transformers, nor anything else that is slow, at the top."""

import sys
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from effconvert import __version__, surgery
from effconvert.errors import EffconvertError
from effconvert.overview import COMMANDS, page

if TYPE_CHECKING:
    from effconvert.options import Options


class Commands(click.Group):
    """The commands of this file, and one for each technique, imported when it is called."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the first page."""
        formatter.write(page())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the techniques first."""
        return [*surgery.catalogue(), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command, or say which one was meant."""
        summary = surgery.catalogue().get(cmd_name)
        if summary is not None:
            return Technique(cmd_name, short_help=summary)
        command = super().get_command(ctx, cmd_name)
        if command is None and not ctx.resilient_parsing:
            from difflib import get_close_matches

            known = self.list_commands(ctx)
            near = get_close_matches(cmd_name, known, n=1)
            raise click.UsageError(f"there is no command {cmd_name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"), ctx)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Turn our errors into a line and an exit code."""
        try:
            return super().invoke(ctx)
        except EffconvertError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            click.echo(f"Error: {error.filename or 'a file'} cannot be used ({error.strerror}); mend that, and run the same command again", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nStopped. A conversion goes on from what is finished when the same command is run again.", err=True)
            sys.exit(130)


class Technique(click.Command):
    """A conversion by one technique, its options those of its class."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Make the options, at the first moment that anybody asks."""
        if not self.params:
            from effconvert.options import RunOptions

            technique = surgery.load(str(self.name))
            self.help, self.callback = technique.__doc__, convert
            self.params = [MODEL, *options(technique), *options(RunOptions)]
        return super().get_params(ctx)


MODEL = click.Argument(["model"])


def options(kind: "type[Options]") -> list[click.Parameter]:
    """Make a Click option of each field; its values are checked by the field alone, so that every door says the same."""
    made: list[click.Parameter] = []
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            made.append(click.Option([f"{flag}/--no-{flag[2:]}" if field.default else flag], is_flag=True, default=None, help=field.description))
            continue
        metavar = extra.get("metavar") or _metavar(field.annotation)
        default = "  [required]" if field.is_required() else f"  [default: {field.default}]" if field.default is not None else ""
        names = [flag] + ([str(extra["short"])] if "short" in extra else [])
        made.append(click.Option(names, metavar=str(metavar), help=f"{field.description}{default}"))
    return made


def _metavar(kind: Any) -> str:
    kinds = [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) is not Literal else [kind]
    kind = kinds[0] if len(kinds) == 1 else kind  # X | None is an X
    if get_origin(kind) is Literal:
        return f"[{'|'.join(map(str, get_args(kind)))}]"
    return {int: "N", float: "NUMBER"}.get(kind, "TEXT")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Hold the commands; `effconvert.overview` has what this says of itself."""


def convert(model: str, **given: Any) -> None:
    """Convert by the technique that the command is named after."""
    from effconvert.console import Terminal
    from effconvert.convert.run import convert as run
    from effconvert.options import RunOptions

    name = click.get_current_context().info_name
    chosen = {key: value for key, value in given.items() if value is not None}
    run_options = RunOptions(**{key: chosen.pop(key) for key in RunOptions.model_fields if key in chosen})
    technique = surgery.load(str(name))(**chosen)
    terminal = Terminal(model)
    outcome = run(model, (technique,), run_options, terminal)
    if not run_options.dry_run:
        terminal.outcome(outcome)


@main.command(short_help=COMMANDS["inspect"])
@click.argument("model")
@click.option("--revision", metavar="TEXT", help="Branch, tag or commit of a model on the Hub.")
def inspect(model: str, revision: str | None) -> None:
    """Show a model's shape and size, and what can be done to it.

    Reads its config and headers alone, so that the largest model takes a second.

    \b
    Examples:
      effconvert inspect ./SmolLM2-135M
      effconvert inspect meta-llama/Llama-2-7b-hf --revision main
    """
    from effconvert.console import Terminal
    from effconvert.convert.checkpoint import open_checkpoint
    from effconvert.convert.inspection import inspect as look
    from effconvert.convert.sources import locate

    terminal = Terminal(model)
    terminal.inspection(look(open_checkpoint(locate(model, revision, terminal.step))))


@main.command(short_help=COMMANDS["demo"])
@click.option("--output", "-o", metavar="DIR", help="Keep the converted models in this folder.")
def demo(output: str | None) -> None:
    """Convert a small embedded model, and show what each way costs.

    It has 8 KV heads and gets 2, by every rule of pooling there is. Needs no network and less than two minutes.
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from effconvert.console import Demonstration
    from effconvert.demo import demo as convert_embedded

    terminal = Demonstration("the embedded model")
    with TemporaryDirectory(prefix="effconvert-demo-") as scratch:
        terminal.demo(convert_embedded(Path(output or scratch), terminal), kept=bool(output))
