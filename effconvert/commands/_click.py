"""Click parameters made of a set of options: its fields check the values, so that every door says the same."""

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click

from effconvert.errors import OptionError
from effconvert.options import Options


class OptionsCommand(click.Command):
    """A command whose options are the fields of some classes; of an option that is none of them it says what every door says.

    Args:
        name: how it is called.
        arguments: what it takes beside options.
        kinds: gives the classes, imported when somebody asks for the options.
        run: does it; its docstring is the help page.
    """

    def __init__(self, name: str, arguments: list[click.Parameter], kinds: Callable[[], tuple[type[Options], ...]], run: Callable[..., None], **more: Any):
        super().__init__(name, callback=run, **{"help": run.__doc__, **more})
        self.arguments, self.kinds = arguments, kinds

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Make the options, at the first moment that anybody asks."""
        if not self.params:
            self.params = [*self.arguments, *(option for kind in self.kinds() for option in parameters(kind))]
        return super().get_params(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an unknown option in the words of recipes and of Python."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            said = [kind.unknown(error.option_name.lstrip("-")) for kind in self.kinds()]
            raise OptionError(next((one for one in said if "did you mean" in one), said[0])) from None


def parameters(kind: type[Options]) -> list[click.Parameter]:
    """Make a Click option of each field."""
    made: list[click.Parameter] = []
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            made.append(click.Option([f"{flag}/--no-{flag[2:]}" if field.default else flag], is_flag=True, default=None, help=field.description))
            continue
        metavar = extra.get("metavar") or _metavar(field.annotation)
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "  [required]" if field.is_required() else f"  [default: {shown}]" if shown not in (None, "") else ""
        names = [flag] + ([str(extra["short"])] if "short" in extra else [])
        made.append(click.Option(names, metavar=str(metavar), help=f"{field.description}{default}"))
    return made


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return what the asker gave: an option left out has no value here, so that its own default counts."""
    return {key: value for key, value in values.items() if value is not None}


def _metavar(kind: Any) -> str:
    kinds = [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) in (Union, UnionType) else [kind]
    kind = kinds[0] if len(kinds) == 1 else kind  # X | None is an X
    if get_origin(kind) is Literal:
        return f"[{'|'.join(map(str, get_args(kind)))}]"
    return {int: "N", float: "NUMBER"}.get(kind, "TEXT")
