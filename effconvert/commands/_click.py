"""Click parameters made of a set of options: its fields check the values, so that every door says the same."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click

from effconvert.options import Options


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
