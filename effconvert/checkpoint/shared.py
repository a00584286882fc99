"""How config.json says what layers have in common: it is stored once, under the name of the first layer that has it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effconvert.errors import OptionError

# What layers can share -> its parts, None: all that a layer has. Of a `cache` nothing is stored: layers read the keys and values of the first of them.
SHARES: Mapping[str, tuple[str, ...] | None] = {
    "layer": None,
    "attention": ("q", "k", "v", "o"),
    "ffn": ("gate", "up", "down"),
    **{part: (part,) for part in ("q", "k", "v", "o", "gate", "up", "down")},
    "cache": (),
}
CACHE_PARTS = ("k", "v", "k_norm")  # what a layer does without that reads another one's cache


@dataclass(frozen=True)
class Shared:
    """Layers that have something in common: config.json holds a list of these."""

    what: str  # one of SHARES
    layers: tuple[int, ...]  # ascending

    def has(self, part: str) -> bool:
        """Whether these layers have a part in common."""
        parts = SHARES[self.what]
        return parts is None or part in parts


def read_shared(entries: Sequence[Mapping[str, Any]], layers: int) -> tuple[Shared, ...]:
    """Read what config.json says of a model of so many layers.

    Raises:
        ValueError: it makes no sense.
    """
    shared = tuple(Shared(**{**entry, "layers": tuple(entry["layers"])}) for entry in entries)
    for number, record in enumerate(shared):
        if record.what not in SHARES:
            raise ValueError(f"layers cannot share {record.what!r}; they can share {', '.join(SHARES)}")
        if not all(type(layer) is int and 0 <= layer < layers for layer in record.layers):
            raise ValueError(f"layers {list(record.layers)} share their {record.what}, and the model has layers 0 to {layers - 1}")
        if len(record.layers) < 2 or list(record.layers) != sorted({*record.layers}):
            raise ValueError(f"layers {list(record.layers)} are not two or more layers in ascending order")
        if clash := next(filter(None, (overlapping(record, other) for other in shared[:number])), ""):
            raise ValueError(clash)
    return shared


def overlapping(record: Shared, other: Shared) -> str:
    """Say which layer would share the same part twice; nothing where none would."""
    parts, others = ((CACHE_PARTS if each.what == "cache" else SHARES[each.what]) for each in (record, other))
    common = {*record.layers} & {*other.layers}
    if common and (parts is None or others is None or {*parts} & {*others}):
        return f"layer {min(common)} shares its {other.what} with others"
    return ""


def kept_of(shared: Iterable[Shared], kept: Sequence[int]) -> tuple[Shared, ...]:
    """Return what the layers `kept` of a model have in common, by their new numbers; what only one of them has is its own again.

    Raises:
        OptionError: layers would be left without the one whose keys and values they read.
    """
    moved: list[Shared] = []
    for record in shared:
        layers = tuple(new for new, old in enumerate(kept) if old in record.layers)
        if record.what == "cache" and layers and kept[layers[0]] != record.layers[0]:
            raise OptionError(
                f"layers {', '.join(map(str, record.layers[1:]))} read the keys and values of layer {record.layers[0]}, so it must stay before them"
            )
        moved.append(Shared(record.what, layers))
    return tuple(record for record in moved if len(record.layers) > 1)
