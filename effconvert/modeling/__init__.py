"""Converted models as transformers' classes, made at their first import: `from effconvert.modeling import EffconvertLlamaForCausalLM`."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return a class of a converted family, or `cache_for`."""
    if name == "cache_for" or (name.startswith("Effconvert") and not name.startswith("__")):
        from effconvert.modeling import model

        return model.cache_for if name == "cache_for" else model.class_by_name(name)
    raise AttributeError(f"module 'effconvert.modeling' has no attribute {name!r}")
