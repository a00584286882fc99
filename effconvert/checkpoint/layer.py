"""A layer of a model as lazy parts, and the model that surgeries rewrite.

A surgery sees plain [out, in] matrices, named by part. This module converts from and to the layouts of families, which fuse and transpose them.
"""
# M = hidden width, H = query heads, Hk = KV heads, D = head width, E = experts.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.outer import Outer
from effconvert.checkpoint.parts import Deferred, Parts
from effconvert.checkpoint.replaced import OWN
from effconvert.checkpoint.shards import StoredTensor
from effconvert.checkpoint.shared import CACHE_PARTS, Shared
from effconvert.errors import ModelError


class ActivationsProtocol(Protocol):
    """The activations of layers on the calibration text: `effconvert.heal._activations.Activations`."""

    @property
    def ids(self) -> Sequence[torch.Tensor]:
        """Token ids of each batch, [B, T]."""

    @property
    def states(self) -> Sequence[torch.Tensor]:
        """The inputs of the current layer, [B, T, M] for each batch."""

    @property
    def scores(self) -> int:
        """The number of attention weights of one head, over all texts."""

    def capture(self, layer: Layer, parts: Sequence[str] = (), until: str = "", states: Sequence[torch.Tensor] | None = None) -> Iterator[Any]:
        """Run a layer in its present state on the current inputs or on `states`, and yield the captured tensors of each batch."""

    def original(self, layers: Sequence[int], parts: Sequence[str] = (), until: str = "") -> Iterator[Any]:
        """Run layers of the original on the current inputs, and yield the captured tensors of each batch in the last one."""

    def original_stream(self, step: int) -> Sequence[torch.Tensor]:
        """Return the residual stream in the unconverted original: step 2 l is before its layer l, 2 l + 1 between that layer's halves."""

    def stored(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer as they will be on disk: name in the layer -> tensor."""

    def place_output(self, layer: Layer, place: str, trainable: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        """Return the output at a place of a layer on one batch, with gradients for the `trainable` parts."""

    def note(self, index: int, errors: dict[str, float]) -> None:
        """Keep the errors of a layer for the report."""


class Layer(Parts):
    """One layer, for a surgery: `layer["k"]` is its key projection [Hk*D, M] in float32, `layer["ffn.effconvert.NAME"]` a part of a technique.

    Attributes:
        index: number of the layer, from 0.
        originals: the layers of the teacher that it stands for. Of several, all but the first were dropped.
        teacher: the config of the teacher.
        activations: of the calibration text, where a surgery needs them; None on the meta device.
    """

    def __init__(
        self,
        index: int,
        config: Config,
        stored: Mapping[str, StoredTensor],
        device: str,
        below: Layer | None = None,
        originals: range | None = None,
        activations: ActivationsProtocol | None = None,
        teacher: Config | None = None,
    ) -> None:
        super().__init__(config, stored, device, below)
        self.index, self.activations, self.teacher = index, activations, teacher or config
        self.originals = range(index, index + 1) if originals is None else originals
        self.source_index: int = index if below is None else below.source_index

    def on_top(self, index: int, config: Config) -> Layer:
        """Return this layer for the next surgery."""
        return Layer(index, config, self._stored, self._device, self, self.originals, self.activations, self.teacher)

    @property
    def unchanged(self) -> Layer:
        """This layer as it was before this surgery."""
        layer = Layer(self.index, self.config, self._stored, self._device, self._below, self.originals, self.activations, self.teacher)
        layer.source_index = self.source_index
        return layer

    def share(self, first: Self, what: str) -> None:
        """Share `what` (see `SHARES`) with an earlier layer: these parts follow that layer's from now on. The config must record it too."""
        if what == "cache":
            for part in [part for part in self if part.removesuffix(".bias") in CACHE_PARTS]:
                del self[part]
        record = Shared(what, (first.index, self.index))
        for part in [part for part in self if record.has(part)]:
            self._forget(part)
            self._borrowed[part] = first

    @property
    def per_kv_head(self) -> list[str]:
        """The parts of this layer, with biases, whose rows are sorted by KV head: [Hk*D, ...]."""
        names = self.config.family.per_kv_head
        return [part for stem in names for part in (stem, f"{stem}.bias") if part in self]

    def tensors(self, stored: bool = False) -> Iterator[tuple[str, StoredTensor, torch.Tensor | Deferred | None]]:
        """Yield the layer in the layout of its config: see `Parts.tensors`. Names are relative to the layer."""
        config, source = self.config, self._source
        own = [part for part in self if f".{OWN}" in part and config.replaced_at(self.index, part.partition(".")[0])]
        known = config.parts.keys() - config.lacks(self.index)
        known |= {f"{record.place}.bias" for record in config.replaced_in(self.index)}
        if unknown := [part for part in self if part not in known and part.removesuffix(".bias") not in known and part not in own]:
            raise ModelError(
                f"layer {self.index} has {', '.join(unknown)} after surgery, for which {config.family.lm} has no place; its parts are {', '.join(known)}"
            )
        for module, parts in config.modules.items():
            for suffix in ("", ".bias"):
                present = [part + suffix for part in parts if part + suffix in self]
                if not present or (stored and config.stored_for(self.index, parts[0] + suffix) != self.index):
                    continue
                if len(present) != len(parts):
                    raise ModelError(f"layer {self.index}: {module} holds {', '.join(parts)} in one tensor, and only {', '.join(present)} is there")
                name = config.tensor_name(parts[0] + suffix)
                if origin := self._same_bytes(present):
                    yield name, origin, None
                elif config.stacked(present) or (len(present) == 1 and self._late(present[0])):
                    yield name, self._origin((present[0], *parts)), self._deferred(present)
                else:
                    yield name, self._origin((present[0], *parts)), join([self[part] for part in present], present, config)
        for part in own:
            value = self[part] if self._changed(part) else None
            yield self._name(part, config), self._type_of(value, self._origin([part])), value
        if config.family == source.family:
            gone = tuple(f"{config.place(place)}." for place in config.skips(self.index))
            yield from ((name, self._stored[name], None) for name in config.family.buffers if name in self._stored and not name.startswith(gone))

    def _where(self) -> str:
        return f"layer {self.index}"

    def _late(self, part: str) -> bool:
        """Whether a part is computed only when it is written: if it was deferred, or is a copy, of which there may be many."""
        if part in self._assigned:
            return isinstance(self._assigned[part], Deferred)
        return part in self._copies or (self._below is not None and part not in self._deleted and self._below._late(part))

    def _deferred(self, parts: list[str]) -> torch.Tensor | Deferred:
        """Return the tensor that fuses these parts, deferred until it is written."""
        stacked = self.config.stacked(parts)
        if self.shapes_only:
            return torch.empty(self.config.stored_shape(parts), device="meta") if stacked else join([self[parts[0]]], parts, self.config)
        return Deferred(lambda: join([self[part] for part in parts], parts, self.config), (lambda: (self[part] for part in parts)) if stacked else None)

    def _same_bytes(self, parts: list[str]) -> StoredTensor | None:
        """Return the tensor on disk with exactly these parts in the target's layout; None where they are computed or the layout changes."""
        on_disk = [self._on_disk(part) for part in parts]
        if None in on_disk:
            return None
        names = {self._name(part, self._source) for part in on_disk if part}
        family, source = self.config.family, self._source.family
        stems = tuple(part.removesuffix(".bias") for part in on_disk if part)
        same_parts = self._source.modules[self._source.parts[stems[0]]] == stems
        same_layout = family.transposed == source.transposed and (len(parts) == 1 or family.per_head == source.per_head)
        return self._stored[names.pop()] if same_parts and same_layout and len(names) == 1 else None

    def _name(self, part: str, config: Config) -> str:
        place, separator, name = part.partition(f".{OWN}")
        if separator and config is self._source and not config.replaced_at(self.source_index, place):
            return part  # which is on no disk: a source of another family may have no module there
        if separator:
            return ".".join(filter(None, [config.place(place), OWN + name]))
        return config.tensor_name(part)

    def _stored_parts(self) -> list[str]:
        parts = [part for stem in self._source.parts for part in (stem, f"{stem}.bias")]
        for record in self._source.replaced_in(self.source_index):
            prefix = ".".join(filter(None, [self._source.place(record.place), OWN]))
            parts += [f"{record.place}.{OWN}{name.removeprefix(prefix)}" for name in self._stored if name.startswith(prefix)]
        return parts

    def _read(self, part: str) -> torch.Tensor:
        stored = self._stored[self._name(part, self._source)]
        if f".{OWN}" in part:
            return stored.own(self._device)
        tensor = stored.read(self._device)
        family, stem = self._source.family, part.removesuffix(".bias")
        fused = self._source.modules[self._source.parts[stem]]
        if family.transposed and tensor.ndim == 2:
            tensor = tensor.T
        return split(tensor, fused, self._source)[fused.index(stem)]


@dataclass
class Model:
    """A model, for a surgery. Assigning `layers` drops or reorders layers."""

    config: Config
    layers: list[Layer]
    outer: Outer
    original: Config  # of the teacher

    def on_top(self, config: Config) -> Model:
        """Return the model for the next surgery."""
        return Model(config, [layer.on_top(index, config) for index, layer in enumerate(self.layers)], self.outer.on_top(config), self.original)


def split(tensor: torch.Tensor, parts: tuple[str, ...], config: Config) -> tuple[torch.Tensor, ...]:
    """Split a tensor [out, ...] into the `parts` that are fused in it."""
    if config.stacked(parts):
        tensor = tensor.flatten(0, 1)  # [E, out, in]
    if "q" not in parts:
        return tuple(tensor.chunk(len(parts)))
    if len(parts) == 1:
        return (tensor,)
    heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    by_block = tensor.unflatten(0, (config.blocks, -1))  # [blocks, ...]
    return tuple(rows.flatten(0, 1) for rows in by_block.split([heads[part] * config.head_dim // config.blocks for part in parts], 1))


def join(tensors: list[torch.Tensor], parts: Sequence[str], config: Config) -> torch.Tensor:
    """Undo `split`, and transpose to [in, out] where the family stores that."""
    if len(tensors) == 3 and config.blocks > 1:
        tensor = torch.cat([part.unflatten(0, (config.blocks, -1)) for part in tensors], 1).flatten(0, 1)
    else:
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if config.stacked(parts):
        return tensor.view(config.experts, -1, tensor.shape[1])
    return tensor.T if config.family.transposed and tensor.ndim == 2 else tensor
