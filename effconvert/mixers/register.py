"""Make transformers' Auto classes know the families with mixers: what `import effconvert` has done as soon as somebody imports them.

What is registered are stand-ins: making a class imports its family, and importing all families takes seconds.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from effconvert.convert.families import FAMILIES
from effconvert.convert.mixed import KIND
from effconvert.mixers import model


class _Later(type):
    """The class of classes that stand for another until something is asked of them."""

    _make: Callable[[], Any]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._make(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._make()(*args, **kwargs)


def _later(make: Callable[[], Any], **known: Any) -> Any:
    return _Later("Later", (), {"_make": staticmethod(make), **known})


def configs(_: Any) -> None:
    """Register the configs; called when transformers' AutoConfig has been imported."""
    from transformers import AutoConfig

    for kind in FAMILIES:
        AutoConfig.register(KIND + kind, _later(partial(model.config_class, kind), model_type=KIND + kind), exist_ok=True)


def models(auto: Any) -> None:
    """Register the models with every Auto class that has their family; called when these have been imported."""
    known = [made for made in vars(auto).values() if isinstance(made, type) and getattr(made, "_model_mapping", None) is not None]
    for made, kind in product(known, FAMILIES):
        opens: Any = made
        if found := opens._model_mapping._model_mapping.get(kind):
            name, config = found if isinstance(found, str) else found[0], model.config_class(kind)
            opens.register(config, _later(partial(model.model_class, name), config_class=config), exist_ok=True)
