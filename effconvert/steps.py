"""The steps of conversions: techniques that change the architecture, and healing methods that recover quality."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effconvert import discovery, heal, surgery

if TYPE_CHECKING:
    from effconvert.surgery._surgery import Step


def catalogue() -> dict[str, str]:
    """Map each step that a recipe can have to its one-line summary, techniques first."""
    return {**techniques(), **healing_methods()}


def techniques() -> dict[str, str]:
    """Map each technique to its one-line summary."""
    return discovery.summaries(surgery.__path__)


def by_kind() -> dict[str, dict[str, str]]:
    """Map each kind of technique, which is the folder of its file, to its techniques with their summaries."""
    kinds: dict[str, dict[str, str]] = {}
    for name, summary in techniques().items():
        kinds.setdefault(discovery.folder(surgery.__path__, name), {})[name] = summary
    return dict(sorted(kinds.items()))


def healing_methods() -> dict[str, str]:
    """Map each healing method to its one-line summary."""
    return discovery.summaries(heal.__path__)


def load(name: str) -> "type[Step]":
    """Import step `name` and return its class."""
    step: type[Step] = discovery.load(heal if name in healing_methods() else surgery, name)
    return step


def explained(name: str, message: str) -> str:
    """Return the `message` for an unknown option `name` of a step, or where it has no reason of its own, which healing methods have the option."""
    field, flag = name.replace("-", "_"), name.replace("_", "-")
    methods = [method for method in healing_methods() if field in load(method).model_fields]
    if not methods or not message.startswith(f"there is no option --{flag};"):
        return message
    commands = " or ".join(f"`effconvert {method}`" for method in methods)
    return f"--{flag} is an option of {commands}: run that on the result, or write a recipe with `{methods[0]}: {{{flag}: ...}}`"


def arguments(name: str, options: Mapping[str, Any], defaults: bool = True) -> list[str]:
    """Return the options of step `name` as a user types them: without those that are not set, and switches only where they differ from the default.

    Without `defaults` only what differs from the default: for titles, as a training has twenty options.
    Manifests of other versions may have steps and switches that this one has not; such a switch is taken to be off by default.
    """
    from effconvert.options import as_typed  # imports pydantic, which `--help` does without

    words, fields = list[str](), load(name).model_fields if name in catalogue() else {}
    for key, value in options.items():
        field = fields.get(key.replace("-", "_"))
        if not defaults and field and as_typed(value) == as_typed(field.default):
            continue
        if isinstance(value, bool):
            words += [] if value == (field.default if field else False) else [f"--{'' if value else 'no-'}{key}"]
        elif value is not None and (typed := as_typed(value)):  # an empty list is one that is not set
            words += [f"--{key}", typed]
    return words
