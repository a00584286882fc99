"""What effconvert uses of transformers without its promise."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from inspect import signature
from typing import Any

from transformers.cache_utils import Cache

CACHE_NAMES = ("cache", "past_key_values")  # of the argument that a model takes its cache in: since 5.24, and before


def cache_among(values: Iterable[Any]) -> Any:
    """Return the cache among arguments or outputs, whatever its name (transformers 5.24 gave it another); None where there is none."""
    return next((value for value in values if isinstance(value, Cache)), None)


def cache_name(model: Any) -> str:
    """Return the name of the argument that `model` takes its cache in."""
    return _cache_name(type(model).forward)


@lru_cache(None)
def _cache_name(forward: Callable[..., Any]) -> str:
    names = signature(forward).parameters
    return next(name for name in CACHE_NAMES if name in names)
