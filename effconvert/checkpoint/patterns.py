"""Entries of config.json for single layers, as transformers reads them: sliding windows, and layers with RoPE."""

from collections.abc import Callable, Sequence
from typing import Any

from effconvert.families import Family

BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")  # keys of lists with an entry for each layer
Get = Callable[[str], Any]  # key of config.json -> its value, or transformers' default


def windows(get: Get, family: Family, layers: int) -> list[int | None]:
    """Return each layer's sliding window in tokens, None without a window.

    `layer_types` decides. Without it, every layer from `max_window_layers` on has the window, except every n-th (`sliding_window_pattern`). In some
    families instead the layers without RoPE have it.
    """
    window = get(family.window_key)
    if window is None or get("use_sliding_window") is False:
        return [None] * layers
    if get(family.both_ways_key):  # attention both ways: half of the window on each side
        window = window // 2 + 1
    kinds = get("layer_types")
    if kinds is None and family.turned_key:
        kinds = ["full_attention" if turned else "sliding_attention" for turned in turns(get, family, layers)]
    if kinds is None:
        every = get(family.pattern_key) or family.pattern
        first = 0 if family.layers_alike else get("max_window_layers") or 0
        outside = [(i >= first) if family.first_windowed else i < first for i in range(layers)]
        full = [outside[i] or (every and (i + family.pattern_from) % every == 0) for i in range(layers)]
        kinds = ["full_attention" if is_full else "sliding_attention" for is_full in full]
    return [int(window) if kind == "sliding_attention" else None for kind in kinds]


def turns(get: Get, family: Family, layers: int) -> list[bool]:
    """Return for each layer whether it applies RoPE."""
    if entries := get(family.turned_key):
        return [bool(entry) for entry in entries[:layers]]
    if every := get(family.unturned_key):
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if family.turns_windows and not (family.turns_without and get(family.window_key) is None):
        return [window is not None for window in windows(get, family, layers)]
    return [True] * layers


def select_layers(get: Get, family: Family, count: int, layers: Sequence[int]) -> dict[str, Any]:
    """Return the keys with an entry for each layer, of `count` before, for only these `layers`. Entries that followed from numbers are written out."""
    lists = {key: get(key) for key in BY_LAYER if get(key) is not None}
    spans = windows(get, family, count)
    if "layer_types" not in lists and len(set(spans)) > 1:
        lists["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in spans]
    if family.turned_key:
        lists[family.turned_key] = [int(turned) for turned in turns(get, family, count)]
    lists = {key: [entries[layer] for layer in layers] for key, entries in lists.items()}
    if groups := get(family.kinds_key):
        kinds = [kind for group, times in groups for kind in group * times]
        lists[family.kinds_key] = [[[kinds[layer]], 1] for layer in layers]
    return lists
