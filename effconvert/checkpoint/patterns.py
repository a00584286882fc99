"""What config.json says of single layers, as transformers reads it: which have a sliding window, and in which RoPE turns queries and keys."""

from collections.abc import Callable, Sequence
from typing import Any

from effconvert.checkpoint.families import Family

BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")  # keys that hold a list with an entry for each layer
Get = Callable[[str], Any]  # key of config.json -> its value, or what transformers takes where the file is silent


def windows(get: Get, family: Family, layers: int) -> list[int | None]:
    """Return each layer's sliding window in tokens, None where it sees everything.

    `layer_types` decides; without it, a window holds in every layer from `max_window_layers` on, but every n-th (`sliding_window_pattern`), or in those that
    RoPE does not turn.
    """
    window = get(family.window_key)
    if window is None or get("use_sliding_window") is False:
        return [None] * layers
    if get(family.both_ways_key):  # half of it on each side
        window = window // 2 + 1
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


def of_layers(get: Get, family: Family, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Return the keys with an entry for each layer as they are where these alone are left; what followed from the numbers of layers is written out."""
    said = {key: get(key) for key in BY_LAYER if get(key) is not None}
    seen = windows(get, family, layers)
    if "layer_types" not in said and len(set(seen)) > 1:
        said["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in seen]
    if family.turned_key:
        said[family.turned_key] = [int(turned) for turned in turns(get, family, layers)]
    said = {key: [each[layer] for layer in kept] for key, each in said.items()}
    if kinds := get(family.kinds_key):
        each = [kind for some, times in kinds for kind in some * times]
        said[family.kinds_key] = [[[each[layer]], 1] for layer in kept]
    return said
