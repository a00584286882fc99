"""effconvert turns a pretrained Hugging Face checkpoint into a cheaper architecture and proves what it cost."""

from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from effconvert.api import bench, convert, evaluate, load

__all__ = ["__version__", "bench", "convert", "evaluate", "load"]
__version__ = "0.1.0"

# Checkpoints with mixers load by AutoModel wherever effconvert is imported, before transformers or after; and who does not use that does not wait for it.
register_post_import_hook("effconvert.modeling.register:configs", "transformers.models.auto.configuration_auto")


def __getattr__(name: str) -> Any:
    """Import the functions when they are called: the command line must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'effconvert' has no attribute {name!r}")
    from importlib import import_module

    # `convert` is a package too, and callable: see there.
    return import_module("effconvert.convert") if name == "convert" else getattr(import_module("effconvert.api"), name)
