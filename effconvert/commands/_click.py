"""Click parameters built from option classes, which check the values: so command line, recipes and Python give the same errors."""

from collections.abc import Callable, Container
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from effconvert.errors import OptionError
from effconvert.options import Options, RunOptions
from effconvert.steps import explained, healing_methods


class OptionsCommand(click.Command):
    """A command whose options are the fields of some classes.

    Args:
        name: of the command.
        arguments: its positional arguments.
        kinds: returns the classes; called only when the options are needed, as it may import much.
        run: the function to call; its docstring is the help page.
    """

    def __init__(self, name: str, arguments: list[click.Parameter], kinds: Callable[[], tuple[type[Options], ...]], run: Callable[..., None], **more: Any):
        super().__init__(name, callback=run, **{"help": run.__doc__, **more})
        self.arguments, self.kinds = arguments, kinds

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Build the options on first use."""
        if not self.params:
            kinds = self.kinds()
            hidden = healing_methods() if any(getattr(kind, "comes_last", False) for kind in kinds) else []  # nothing may follow: refused, and not offered
            self.params = [*self.arguments, *(option for kind in kinds for option in parameters(kind, hidden))]
        return super().get_params(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an unknown option with the same message as recipes and Python."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name, kinds = error.option_name.lstrip("-"), self.kinds()
            messages = [kind.unknown(name) for kind in kinds]
            message = next((message for message in messages if "did you mean" in message), messages[0])
            raise OptionError(explained(name, message) if RunOptions in kinds else message) from None


def parameters(kind: type[Options], hidden: Container[str] = ()) -> list[click.Parameter]:
    """Build a Click option for each field; `--help` does not show those that are `hidden`."""
    options: list[click.Parameter] = []
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            options.append(
                click.Option([f"{flag}/--no-{flag[2:]}" if field.default else flag], is_flag=True, default=None, help=field.description, hidden=name in hidden)
            )
            continue
        metavar = extra.get("metavar") or _metavar(field.annotation)
        several: dict[str, Any] = {"multiple": True, "callback": _joined} if _is_list(field.annotation) else {}
        default_text = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "  [required]" if field.is_required() else f"  [default: {default_text}]" if default_text not in (None, "") else ""
        names = [flag] + ([str(extra["short"])] if "short" in extra else [])
        options.append(
            click.Option(
                names, metavar=str(metavar), help=f"{field.description}{default}", shell_complete=_completion(field.annotation, str(metavar)), **several
            )
        )
    return options


def _is_list(kind: Any) -> bool:
    """Return whether an option of this type is a list, or none."""
    return get_origin(kind) is tuple or (get_origin(kind) in (Union, UnionType, Annotated) and any(map(_is_list, get_args(kind))))


def _joined(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Join the values of a list that is given in several parts: `--tasks piqa --tasks arc_easy` as `--tasks piqa,arc_easy`."""
    return ",".join(values) if values else None


def _completion(kind: Any, metavar: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return what a shell may write for an option: one of its words, or a file."""
    words = [str(word) for part in (kind, *get_args(kind)) if get_origin(part) is Literal for word in get_args(part)]

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if words:
            return [CompletionItem(word) for word in words if word.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file")] if {"FILE", "DIR", "MODEL"} & {*metavar.split("|")} else []

    return complete


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options on the command line; others have no value here, so their defaults apply."""
    return {key: value for key, value in values.items() if value is not None}


def _metavar(kind: Any) -> str:
    kinds = [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) in (Union, UnionType) else [kind]
    kind = kinds[0] if len(kinds) == 1 else kind  # X | None counts as X
    if get_origin(kind) is Literal:
        return f"[{'|'.join(map(str, get_args(kind)))}]"
    return {int: "N", float: "NUMBER"}.get(kind, "TEXT")
