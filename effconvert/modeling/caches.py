"""What each layer of a model keeps of earlier tokens while it writes: declared once, for the cache that is made and the bytes that are promised."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from effconvert.checkpoint.config import Config
from effconvert.surgery._placed import technique_of
from effconvert.surgery._replacement import Replacement


@dataclass(frozen=True)
class Kept:
    """What a layer keeps: keys and values of all tokens or of a window, the state of a technique, or nothing."""

    softmax: bool
    window: int | None = None  # tokens whose keys and values are kept, None: all
    technique: Replacement | None = None  # whose state is kept; it may be of size 0
    lender: int | None = None  # the layer whose keys and values it reads, and keeps none


def caches(config: Config) -> Iterator[Kept]:
    """Yield what each layer keeps; of an encoder nothing."""
    for index, window in enumerate(config.windows()):
        record = next((record for record in config.replaced_in(index) if record.place == "scores" or "k" in record.drops), None)
        if not config.decoder:
            yield Kept(softmax=False)
        elif config.cache_of(index) != index:
            yield Kept(softmax=False, lender=config.cache_of(index))
        elif record:
            yield Kept(softmax=False, technique=technique_of(record))
        else:
            yield Kept(softmax="attention" not in config.skips(index), window=window)


def kv_bytes(config: Config, itemsize: int, context: int) -> int:
    """Return the bytes of the cache of one sequence of `context` tokens, `itemsize` bytes an element.

    A window of W tokens keeps W - 1, as transformers' cache does: the newest token is not looked up.
    """
    tokens = sum(context if kept.window is None else min(context, kept.window - 1) for kept in caches(config) if kept.softmax)
    return 2 * config.kv_heads * config.head_dim * itemsize * tokens + state_bytes(config, itemsize, context)


def state_bytes(config: Config, itemsize: int, context: int = 0) -> int:
    """Return the part of that which states of techniques take; of no tokens, what they take however few went by."""
    return sum(kept.technique.cache_bytes(config, itemsize, context) for kept in caches(config) if kept.technique)


def growth_bytes(config: Config, itemsize: int) -> int:
    """Return the bytes that a token adds to states: on average, as some add many at a time, and rounded up."""
    return math.ceil(sum(kept.technique.token_bytes(config, itemsize) for kept in caches(config) if kept.technique))
