"""Which layers of a model have a sliding window, and in which RoPE turns queries and keys, as transformers reads config.json."""

from collections.abc import Callable
from typing import Any

from effconvert.checkpoint.families import Family

Get = Callable[[str], Any]  # key of config.json -> its value, or what transformers takes where the file is silent


def windows(get: Get, family: Family, layers: int) -> list[int | None]:
    """Return each layer's sliding window in tokens, None where it sees everything.

    `layer_types` decides; without it, a window holds in every layer from `max_window_layers` on, but every n-th (`sliding_window_pattern`), or in those that
    RoPE does not turn.
    """
    window = get(family.window_key)
    if window is None or get("use_sliding_window") is False:
        return [None] * layers
    kinds = get("layer_types")
    if kinds is None and family.turned_key:
        kinds = ["full_attention" if turned else "sliding_attention" for turned in turns(get, family, layers)]
    if kinds is None:
        every = get(family.pattern_key) or family.pattern
        first = 0 if family.layers_alike else get("max_window_layers") or 0
        apart = [(i >= first) if family.first_windowed else i < first for i in range(layers)]
        seen = [apart[i] or (every and (i + family.pattern_from) % every == 0) for i in range(layers)]
        kinds = ["full_attention" if everything else "sliding_attention" for everything in seen]
    return [int(window) if kind == "sliding_attention" else None for kind in kinds]


def turns(get: Get, family: Family, layers: int) -> list[bool]:
    """Return for each layer whether RoPE turns queries and keys there."""
    if listed := get(family.turned_key):
        return [bool(said) for said in listed[:layers]]
    if every := get(family.unturned_key):
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if family.turns_windows and not (family.turns_without and get(family.window_key) is None):
        return [window is not None for window in windows(get, family, layers)]
    return [True] * layers
