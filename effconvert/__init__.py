"""Convert pretrained Hugging Face checkpoints to cheaper architectures, and measure what that costs.

    import effconvert

    outcome = effconvert.convert("./SmolLM2-135M", {"gqa": {"groups": 1}}, output="smol-mqa", refit=True)
    quality = effconvert.evaluate(["./SmolLM2-135M", "smol-mqa"])
    speed = effconvert.bench(["./SmolLM2-135M", "smol-mqa"])
    model, tokenizer = effconvert.load("smol-mqa")

convert     converts a model by one or several steps, verifies the result and writes it
transplant  puts an instruct model's training into a model converted from its base
evaluate    measures how good models are, the original first
bench       measures how fast models are, and their memory
load        loads a model with transformers, and nothing is allowed to be missing

inspect.signature(effconvert.convert) has all options; so have help(effconvert.api) and, with descriptions, `effconvert gqa --help`. After
`import effconvert`, transformers' Auto classes also load checkpoints with effconvert's layers.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from effconvert.version import __version__

if TYPE_CHECKING:
    from effconvert.api import bench, convert, evaluate, load, transplant

__all__ = ["__version__", "bench", "convert", "evaluate", "load", "transplant"]

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

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        from effconvert.api import convert

        return signature(convert)


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


def __dir__() -> list[str]:
    """Name the functions too, which are imported when they are called."""
    return sorted({*globals(), *__all__})
