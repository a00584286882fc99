"""Records of shared parameters in config.json. They are stored once, under the names of the first layer that has them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effconvert.errors import OptionError

# What layers can share -> its parts with their biases; None: all. A `cache` has no parameters: layers read the keys and values of the first of them.
SHARES: Mapping[str, tuple[str, ...] | None] = {
    "layer": None,
    "attention": ("q", "k", "v", "o"),
    "ffn": ("gate", "up", "down"),
    "weights": ("q", "k", "v", "o", "gate", "up", "down"),  # without biases, which each layer keeps
    **{part: (part,) for part in ("q", "k", "v", "o", "gate", "up", "down")},
    "cache": (),
}
CACHE_PARTS = ("k", "v", "k_norm")  # parts that a layer lacks if it reads another layer's cache


@dataclass(frozen=True)
class Shared:
    """Layers that share parameters or a cache; config.json has a list of these."""

    what: str  # one of SHARES
    layers: tuple[int, ...]  # ascending

    def has(self, part: str) -> bool:
        """Whether these layers share a part, or "k.bias", the bias of one."""
        parts, stem = SHARES[self.what], part.removesuffix(".bias")
        return parts is None or (stem in parts and (part == stem or self.what != "weights"))


def whole_layers(numbers: Sequence[int]) -> tuple[Shared, ...]:
    """Return what layers share that are stored under these numbers, one for each layer."""
    groups = [tuple(layer for layer, stored in enumerate(numbers) if stored == number) for number in sorted(set(numbers))]
    return tuple(Shared("layer", group) for group in groups if len(group) > 1)


def read_shared(entries: Sequence[Mapping[str, Any]], layers: int) -> tuple[Shared, ...]:
    """Read the records in config.json of a model of `layers` layers.

    Raises:
        ValueError: they make no sense.
    """
    shared = tuple(Shared(**{**entry, "layers": tuple(entry["layers"])}) for entry in entries)
    for number, record in enumerate(shared):
        if record.what not in SHARES:
            raise ValueError(f"layers cannot share {record.what!r}; they can share {', '.join(SHARES)}")
        if not all(type(layer) is int and 0 <= layer < layers for layer in record.layers):
            raise ValueError(f"layers {list(record.layers)} share their {record.what}, and the model has layers 0 to {layers - 1}")
        if len(record.layers) < 2 or list(record.layers) != sorted({*record.layers}):
            raise ValueError(f"layers {list(record.layers)} are not two or more layers in ascending order")
        if clash := next(filter(None, (clash_of(record, earlier) for earlier in shared[:number])), ""):
            raise ValueError(clash)
    return shared


def clash_of(record: Shared, previous: Shared) -> str:
    """Name the layer that would share the same part twice; empty where none would."""
    parts, taken = ((CACHE_PARTS if entry.what == "cache" else SHARES[entry.what]) for entry in (record, previous))
    common = {*record.layers} & {*previous.layers}
    if common and (parts is None or taken is None or {*parts} & {*taken}):
        return f"layer {min(common)} shares its {previous.what} with others"
    return ""


def renumber(shared: Iterable[Shared], remaining: Sequence[int]) -> tuple[Shared, ...]:
    """Return the records of a model of only the layers `remaining`, by their new numbers. A record of a single layer is dropped.

    Raises:
        OptionError: layers would be left without the one whose keys and values they read.
    """
    records: list[Shared] = []
    for record in shared:
        layers = tuple(new for new, old in enumerate(remaining) if old in record.layers)
        if record.what == "cache" and layers and remaining[layers[0]] != record.layers[0]:
            raise OptionError(
                f"layers {', '.join(map(str, record.layers[1:]))} read the keys and values of layer {record.layers[0]}, so it must stay before them"
            )
        records.append(Shared(record.what, layers))
    return tuple(record for record in records if len(record.layers) > 1)
