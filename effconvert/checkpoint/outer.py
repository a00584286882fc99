"""What is outside the layers of a model, as lazy parts: embeddings, positions, final norm, heads."""
# V = vocabulary, M = hidden width.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.parts import Deferred, Parts
from effconvert.checkpoint.shards import FLOATS, Stored
from effconvert.checkpoint.wrappers import head_prefix
from effconvert.errors import ModelError

OTHER = "other:"  # begins the part of a tensor outside the layers for which the family's row has no name, such as a classifier


class Outer(Parts):
    """What is outside the layers: `outer["embed"]` is the embedding table [V, M], `outer["final_norm.bias"]` a bias.

    What a family keeps under a module of several, such as BERT's head, is `outer["head.NAME"]`, where NAME is its name inside.

    A tensor that the family's row does not know, such as a classifier of the user's own, is the part `other:NAME`.
    """

    def __init__(self, config: Config, prefix: str, stored: Mapping[str, Stored], device: str, below: Outer | None = None) -> None:
        super().__init__(config, stored, device, below)
        self._prefix = prefix  # of the base model's names in the source, with its dot; may be empty

    def on_top(self, config: Config) -> Outer:
        """Return these parts as the next surgery finds them."""
        return Outer(config, self._prefix, self._stored, self._device, self)

    def tensors(self, stored: bool = False) -> Iterator[tuple[str, Stored, torch.Tensor | Deferred | None]]:
        """Yield the parts in the layout of their config: see `Parts.tensors`; names are whole."""
        for part in filter(self._written, self):
            on_disk = self._on_disk(part)
            name = self.place(part)
            if on_disk is not None:
                yield name, self._stored[self._name(on_disk, self._source)], None
            else:
                yield name, self._origin([part]), self[part]

    def bare(self) -> Iterator[tuple[str, str, Stored, torch.Tensor | Deferred | None]]:
        """Yield what is inside the bare model: the part, its name there, the tensor on disk that it comes from, and what it became; no buffers."""
        prefix = outer_prefix(self._source, self._prefix, self.config)
        for part, (name, origin, value) in zip([part for part in self if self._written(part)], self.tensors(), strict=True):
            if _stem(part, tuple(self.config.family.outer)) and origin.dtype in FLOATS:
                yield part, name.removeprefix(prefix), origin, value

    def rows(self, part: str, start: int, stop: int) -> torch.Tensor:
        """Return some rows of a part in float32; of one that lies on disk unchanged, no others are read."""
        on_disk = self._on_disk(part)
        return self[part][start:stop] if on_disk is None else self._stored[self._name(on_disk, self._source)].mapped()[start:stop].float()

    def place(self, part: str) -> str:
        """Return what a part is called in the model of this config.

        Raises:
            ModelError: it has no such part.
        """
        family, source = self.config.family, self._source.family
        if part.startswith(OTHER):
            if family.base == source.base:
                return part.removeprefix(OTHER)
            raise ModelError(f"{part.removeprefix(OTHER)} has no counterpart in {family.lm}; remove it, or save the model from {source.lm}")
        if _stem(part, (*family.outer, *family.head)) is None:
            raise ModelError(f"{self._name(part, self._source)} has no counterpart in {family.lm}; remove it, or save the model from {source.lm}")
        return self._name(part, self.config)

    def _written(self, part: str) -> bool:
        """Whether a part goes along: buffers of old files, such as position ids, stay behind where the family changes, as its class makes its own."""
        on_disk = self._on_disk(part)
        buffer = on_disk is not None and on_disk.startswith(OTHER) and self._stored[self._name(on_disk, self._source)].dtype not in FLOATS
        return not buffer or self.config.family.base == self._source.family.base

    def _where(self) -> str:
        return "what is outside the layers"

    def _name(self, part: str, config: Config) -> str:
        if part.startswith(OTHER):
            return part.removeprefix(OTHER)
        family = config.family
        stem = _stem(part, (*family.outer, *family.head))
        if stem is None:
            return part
        inside = part.removeprefix(stem).removeprefix(".") or "weight"
        if stem in family.outer:
            return f"{outer_prefix(self._source, self._prefix, config)}{family.outer[stem]}.{inside}"
        return f"{head_prefix(self._prefix)}{family.head[stem]}.{inside}"

    def _stored_parts(self) -> list[str]:
        return [part_outside(name, self._prefix, self._source) for name in self._stored]

    def _read(self, part: str) -> torch.Tensor:
        return self._stored[self._name(part, self._source)].read(self._device)


def outer_prefix(source: Config, prefix: str, target: Config) -> str:
    """Return what stands before the base model's names in `target`, where in `source` it is `prefix`: nothing where a base model was saved alone."""
    if prefix != f"{source.family.prefix}." or not target.family.prefix:  # that of a class with a head of its own, or none
        return prefix if target.family == source.family else ""
    return f"{target.family.prefix}."


def part_outside(name: str, prefix: str, config: Config) -> str:
    """Return the part that a tensor outside the layers is."""
    places = [(prefix + module, part) for part, module in config.family.outer.items()]
    places += [(head_prefix(prefix) + module, part) for part, module in config.family.head.items()]
    inside = [(module, part) for module, part in places if name.startswith(f"{module}.")]
    if not inside:
        return OTHER + name
    module, part = max(inside, key=lambda place: len(place[0]))
    rest = name.removeprefix(f"{module}.")
    return part if rest == "weight" else f"{part}.{rest}"


def _stem(part: str, known: Sequence[str]) -> str | None:
    """Return the name in a family's row with which a part outside the layers begins."""
    stems = [stem for stem in known if part == stem or part.startswith(f"{stem}.")]
    return max(stems, key=len, default=None)
