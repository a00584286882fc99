"""What each layer caches of earlier tokens. One description serves the caches at run time and the sizes in plans."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import Replaced
from effconvert.surgery._placed import technique_of
from effconvert.surgery._replacement import Replacement


@dataclass(frozen=True)
class LayerCache:
    """The cache of a layer: keys and values of all tokens or of a window, the state of a technique, or nothing."""

    width: int = 0  # numbers of keys and values for a token; 0 without any
    window: int | None = None  # tokens with cached keys and values; None: all
    technique: Replacement | None = None  # with keys and values of its own width, or with a state, maybe of size 0
    lender: int | None = None  # the layer whose keys and values it reads; it has none of its own


def caches(config: Config) -> Iterator[LayerCache]:
    """Yield the cache of each layer; encoders have none."""
    for index, window in enumerate(config.windows()):
        record = mixer_of(config, index)
        if not config.decoder:
            yield LayerCache()
        elif config.cache_of(index) != index:
            yield LayerCache(lender=config.cache_of(index))
        elif record:
            technique = technique_of(record)
            yield LayerCache(technique.cached_width(config), window, technique)
        else:
            yield LayerCache(0 if "attention" in config.skips(index) else config.cached_numbers, window)


def mixer_of(config: Config, index: int) -> Replaced | None:
    """Return the record of what a layer has in place of softmax attention, or of its keys and values; None where it has neither."""
    return next((record for record in config.replaced_in(index) if record.place == "scores" or ("k" in record.drops and record.place != "k")), None)


def kv_bytes(config: Config, itemsize: int, context: int) -> int:
    """Return the bytes of the cache of one sequence of `context` tokens, `itemsize` bytes an element.

    A window of W tokens caches W - 1, as in transformers: the newest token is not read from the cache.
    """
    numbers = sum(cache.width * (context if cache.window is None else min(context, cache.window - 1)) for cache in caches(config))
    return numbers * itemsize + state_bytes(config, itemsize, context)


def state_bytes(config: Config, itemsize: int, context: int = 0) -> int:
    """Return the bytes of the states of techniques after `context` tokens; at 0 tokens, the part that does not grow."""
    return sum(cache.technique.cache_bytes(config, itemsize, context) for cache in caches(config) if cache.technique)


def growth_bytes(config: Config, itemsize: int) -> int:
    """Return the bytes that a token adds to states, rounded up. It is an average, since some grow by many tokens at a time."""
    return math.ceil(sum(cache.technique.token_bytes(config, itemsize) for cache in caches(config) if cache.technique))
