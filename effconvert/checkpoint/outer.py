"""The lazy parts outside the layers of a model: embeddings, positions, final norm, heads."""
# V = vocabulary, M = hidden width.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.parts import Deferred, Parts
from effconvert.checkpoint.replaced import OWN
from effconvert.checkpoint.shards import FLOATS, StoredTensor, rounded
from effconvert.checkpoint.wrappers import head_prefix
from effconvert.errors import ModelError

OTHER = "other:"  # prefix of parts that are not in the family's row, such as a classifier


class Outer(Parts):
    """The parts outside the layers: `outer["embed"]` is the embedding table [V, M], `outer["final_norm.bias"]` a bias.

    A module of several tensors, such as BERT's head, has the parts `outer["head.NAME"]`, where NAME is the name in the module.

    A tensor that is not in the family's row, such as the user's own classifier, is the part `other:NAME`.

    Attributes:
        survey: what a surgery that needs it has measured on the whole model (`Step.survey`); None while only shapes count.
    """

    def __init__(self, config: Config, prefix: str, stored: Mapping[str, StoredTensor], device: str, below: Outer | None = None) -> None:
        super().__init__(config, stored, device, below)
        self.survey: Mapping[str, torch.Tensor] | None = None
        self._prefix = prefix  # of the base model's names in the source, with its dot; may be empty

    def on_top(self, config: Config) -> Outer:
        """Return these parts for the next surgery."""
        return Outer(config, self._prefix, self._stored, self._device, self)

    def tensors(self, stored: bool = False) -> Iterator[tuple[str, StoredTensor, torch.Tensor | Deferred | None]]:
        """Yield the parts in the layout of their config: see `Parts.tensors`. Names are complete."""
        for part in filter(self._is_kept, self):
            on_disk = self._on_disk(part)
            name = self.place(part)
            if on_disk is not None:
                yield name, self._stored[self._name(on_disk, self._source)], None
                continue
            value = self._value(part)
            yield name, self._type_of(value, self._origin_of(part)), value

    def bare(self) -> Iterator[tuple[str, str, StoredTensor, torch.Tensor | Deferred | None]]:
        """Yield the parts of the base model: the part, its name there, the tensor on disk it comes from, and its new value or None.

        Buffers and techniques' own parts are left out.
        """
        prefix = outer_prefix(self._source, self._prefix, self.config)
        for part, (name, origin, value) in zip([part for part in self if self._is_kept(part)], self.tensors(), strict=True):
            if _stem(part, tuple(self.config.family.outer)) and origin.dtype in FLOATS and f".{OWN}" not in part:
                yield part, name.removeprefix(prefix), origin, value

    def rows(self, part: str, numbers: torch.Tensor) -> torch.Tensor:
        """Return the rows of a part with these numbers, as they are or will be on disk: in float32, or whole numbers. Other rows are not read or computed."""
        on_disk = self._on_disk(part)
        if on_disk is not None:
            return self._stored_rows(on_disk, numbers)
        value = self._value(part)
        if isinstance(value, Deferred) and value.rows:
            return rounded(value.rows(numbers), self._origin_of(part).dtype)
        rows = (value.compute() if isinstance(value, Deferred) else value)[numbers]
        return rounded(rows, self._type_of(rows, self._origin_of(part)).dtype)

    def rows_before(self, part: str, numbers: torch.Tensor) -> torch.Tensor:
        """Return rows of a part as it was before this surgery."""
        return self._stored_rows(part, numbers) if self._below is None else self._below.rows(part, numbers)

    def shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part, which is not read for it."""
        on_disk = self._on_disk(part)
        return tuple(self[part].shape) if on_disk is None else self._stored[self._name(on_disk, self._source)].shape

    def table(self, place: str) -> str:
        """Return the part with a row for each token at `embed` or `head`, or in whose place a technique is; "" without one."""
        names = ("embed",) if place == "embed" else self.config.family.head
        return next((name for name in names if any(part == name or part.startswith(f"{name}.{OWN}") for part in self)), "")

    def place(self, part: str) -> str:
        """Return the name of a part in the model of this config.

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

    def _stored_rows(self, part: str, numbers: torch.Tensor) -> torch.Tensor:
        rows = self._stored[self._name(part, self._source)].mapped()[numbers]
        return rows.float() if rows.is_floating_point() else rows

    def _value(self, part: str) -> torch.Tensor | Deferred:
        """Return a part that is not on disk as it is, still deferred where it was deferred by this surgery or one before."""
        if part in self._assigned:
            return self._assigned[part]
        return self[part] if self._below is None or part in self._copies else self._below._value(part)

    def _origin_of(self, part: str) -> StoredTensor:
        """Return the tensor on disk that a part comes from; for a technique's own parts the one at their place."""
        return self._origin([part, part.partition(f".{OWN}")[0]])

    def _is_kept(self, part: str) -> bool:
        """Whether a part is written. Buffers of old files, such as position ids, are left out if the family changes: its class makes its own."""
        on_disk = self._on_disk(part)
        buffer = on_disk is not None and on_disk.startswith(OTHER) and self._stored[self._name(on_disk, self._source)].dtype not in FLOATS
        return not buffer or self.config.family.base == self._source.family.base

    def _where(self) -> str:
        return "the part outside the layers"

    def _name(self, part: str, config: Config) -> str:
        if part.startswith(OTHER):
            return part.removeprefix(OTHER)
        family = config.family
        stem = _stem(part, (*family.outer, *family.head))
        if stem is None:
            return part
        rest = part.removeprefix(stem).removeprefix(".") or "weight"
        if stem in family.outer:
            return f"{outer_prefix(self._source, self._prefix, config)}{family.outer[stem]}.{rest}"
        return f"{head_prefix(self._prefix)}{family.head[stem]}.{rest}"

    def _stored_parts(self) -> list[str]:
        return [outer_part(name, self._prefix, self._source) for name in self._stored]

    def _read(self, part: str) -> torch.Tensor:
        return self._stored[self._name(part, self._source)].read(self._device)


def outer_prefix(source: Config, prefix: str, target: Config) -> str:
    """Return the prefix of the base model's names in `target`, where `source` has `prefix`; empty for a base model saved alone."""
    if prefix != f"{source.family.prefix}." or not target.family.prefix:  # the prefix of a class with another head, or none
        return prefix if target.family == source.family else ""
    return f"{target.family.prefix}."


def outer_part(name: str, prefix: str, config: Config) -> str:
    """Return the part of a tensor outside the layers."""
    places = [(prefix + module, part) for part, module in config.family.outer.items()]
    places += [(head_prefix(prefix) + module, part) for part, module in config.family.head.items()]
    matches = [(module, part) for module, part in places if name.startswith(f"{module}.")]
    if not matches:
        return OTHER + name
    module, part = max(matches, key=lambda place: len(place[0]))
    rest = name.removeprefix(f"{module}.")
    return part if rest == "weight" else f"{part}.{rest}"


def _stem(part: str, known: Sequence[str]) -> str | None:
    """Return the longest of `known`, names in a family's row, that a part outside the layers begins with."""
    stems = [stem for stem in known if part == stem or part.startswith(f"{stem}.")]
    return max(stems, key=len, default=None)
