"""Make transformers' Auto classes know the families with mixers: what `import effconvert` has done as soon as somebody imports them.

What is registered are stand-ins: making a class imports its family, and importing all families takes seconds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from effconvert.convert.families import FAMILIES
from effconvert.convert.mixed import KIND


class _Later(type):
    """The class of classes that stand for another until something is asked of them."""

    _make: Callable[[], Any]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._make(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._make()(*args, **kwargs)


def _made(by: str, name: str) -> Any:
    from effconvert.mixers import model  # not before: it needs transformers whole

    return getattr(model, by)(name)


def _later(make: Callable[[], Any], **known: Any) -> Any:
    return _Later("Later", (), {"_make": staticmethod(make), **known})


def configs() -> None:
    """Register the configs; called when transformers' AutoConfig has been imported, maybe while other modules of it still are."""
    from transformers import AutoConfig

    for kind in FAMILIES:
        AutoConfig.register(KIND + kind, _later(partial(_made, "config_class", kind), model_type=KIND + kind), exist_ok=True)


def models(kind: str, config: Any) -> None:
    """Register the models of a family with every Auto class that has it; called when its config class is made, which comes before."""
    from effconvert.mixers.transformers_internals import auto_classes

    for opens, name in auto_classes(kind):
        opens.register(config, _later(partial(_made, "model_class", name), config_class=config), exist_ok=True)
