"""Mixers inside transformers' models. The classes are made when they are asked for: `from effconvert.modeling import EffconvertLlamaForCausalLM`."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Make a class of a converted family, or find `cache_for`."""
    if name == "cache_for" or (name.startswith("Effconvert") and not name.startswith("__")):
        from effconvert.modeling import model

        return model.cache_for if name == "cache_for" else model.named(name)
    raise AttributeError(f"module 'effconvert.modeling' has no attribute {name!r}")
