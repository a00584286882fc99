"""effconvert turns a pretrained Hugging Face checkpoint into a cheaper architecture and proves what it cost."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from effconvert.version import __version__

if TYPE_CHECKING:
    from effconvert.api import bench, convert, evaluate, load

__all__ = ["__version__", "bench", "convert", "evaluate", "load"]

AUTO = "transformers.models.auto.configuration_auto"


class _WhenImported:
    """A module finder, the first of all: it registers our model types as soon as transformers' AutoConfig is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find the module of AutoConfig by the other finders, and register our types after it has run."""
        if name != AUTO:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def followed(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = followed  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from effconvert.modeling.register import configs

    configs()


# Checkpoints with mixers load by AutoModel wherever effconvert is imported, before transformers or after; and who does not use that does not wait for it.
if AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenImported())


class _Called(ModuleType):
    """The package `effconvert.convert`, which is the function of that name too: importing a part of it would otherwise hide the function (decision 7)."""

    def __call__(self, /, *args: Any, **options: Any) -> Any:
        from effconvert.api import convert

        return convert(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "convert":
            value.__class__ = _Called
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import the functions when they are called: the command line must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'effconvert' has no attribute {name!r}")
    from importlib import import_module

    return import_module("effconvert.convert") if name == "convert" else getattr(import_module("effconvert.api"), name)
