"""A model as lazy mappings, one for each layer and one for what is outside: nothing is read from disk until a surgery asks for a part, and what nobody
assigns stays where it lies.

A surgery sees plain [out, in] matrices named by what they do; how a family fuses or transposes them is undone and done again here.
"""
# M = hidden width, H = query heads, Hk = KV heads, D = head width.

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import OWN
from effconvert.checkpoint.shards import FLOATS, Stored
from effconvert.errors import ModelError

OTHER = "other:"  # begins the part of a tensor outside the layers for which the family's row has no name, such as a classifier


class Activations(Protocol):
    """What layers compute on the calibration text: `effconvert.heal._activations.Activations`."""

    @property
    def ids(self) -> Sequence[torch.Tensor]:
        """Token ids of each batch, [B, T]."""

    @property
    def states(self) -> Sequence[torch.Tensor]:
        """What arrives at the layer at work, [B, T, M] for each batch."""

    @property
    def scores(self) -> int:
        """How many numbers the weights of one head's attention are, over all texts."""

    def capture(self, layer: Layer, parts: Sequence[str] = (), until: str = "") -> Iterator[Any]:
        """Run a layer as it stands, and yield what each batch was in it."""

    def original(self, layers: Sequence[int], parts: Sequence[str] = (), until: str = "") -> Iterator[Any]:
        """Run layers of the original on what arrives here, and yield what each batch was in the last of them."""

    def stored(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return a layer as it will lie on disk: name in the layer -> numbers."""

    def attended(self, layer: Layer, learnt: Mapping[str, torch.Tensor], fixed: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        """Return what the place at work gives on one batch if some parts were others, with gradients for these."""

    def note(self, index: int, said: dict[str, float]) -> None:
        """Keep what is to be told of a layer."""


@dataclass(frozen=True)
class Deferred:
    """A tensor that is computed when it is written, so that a layer of many large ones need not be in memory whole."""

    compute: Callable[[], torch.Tensor]  # float32, on the CPU
    in_pieces: Callable[[], Iterator[torch.Tensor]] | None = None  # the same numbers in the same order, where the whole is large

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yield it a piece at a time."""
        yield from self.in_pieces() if self.in_pieces else [self.compute()]


class Parts(MutableMapping[str, torch.Tensor]):
    """Named tensors in float32 on the CPU, or of shapes only on the meta device; `parts["k.bias"]` is the bias of part k; assigning replaces them.

    What is read is a copy: to change a part, assign it. Each surgery gets parts of its own on top of those before, so that what is kept for later stays
    what it was.

    Attributes:
        config: the shape of the model.
    """

    def __init__(self, config: Config, stored: Mapping[str, Stored], device: str, below: Self | None = None) -> None:
        self.config = config
        self._source: Config = config if below is None else below._source
        self._stored, self._device, self._below = stored, device, below
        self._assigned: dict[str, torch.Tensor | Deferred] = {}
        self._copies: dict[str, str] = {}  # part -> the part that it is a copy of, as that was before this surgery
        self._deleted: set[str] = set()
        self._waiting: list[Callable[[Any], None]] = []
        self._touched: dict[str, int] = {}  # part that was read, or assigned -> bytes in float32

    @property
    def shapes_only(self) -> bool:
        """Whether tensors have no numbers in them: a plan is being made."""
        return self._device == "meta"

    @property
    def touched(self) -> int:
        """Bytes in float32 of all that was read or assigned so far, for the estimate of peak memory."""
        return sum(self._touched.values()) + (0 if self._below is None else self._below.touched)

    def later(self, change: Callable[[Self], None]) -> None:
        """Have `change` called with these parts before anything is asked of them."""
        self._waiting.append(change)

    def copy(self, part: str, to: str) -> None:
        """Make `to` the same as `part`, which may be changed or deleted afterwards; what lies on disk unchanged is copied as bytes."""
        self._catch_up()
        if part in self._assigned or part in self._copies:
            self[to] = self[part]
        else:
            self._forget(to)
            self._copies[to] = part

    def defer(self, part: str, shape: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> None:
        """Assign what `compute` returns, when it is written; `shape` is known before."""
        self._catch_up()
        self._forget(part)
        self._assigned[part] = torch.empty(shape, device="meta") if self.shapes_only else Deferred(compute)
        self._touched["deferred"] = max(self._touched.get("deferred", 0), 4 * math.prod(shape))

    def before(self, part: str) -> torch.Tensor:
        """Return a part as it was before this surgery, whatever has become of it since."""
        if self._below is not None:
            return self._below._rounded(part)
        tensor = self._read(part)
        self._touched[part] = 4 * tensor.numel()
        return tensor

    def __getitem__(self, part: str) -> torch.Tensor:
        if part not in self:
            raise ModelError(f"{self._where()} of this {self._source.kind} has no part {part!r}; it has {', '.join(self)}")
        if part in self._assigned:
            value = self._assigned[part]
            return value.compute() if isinstance(value, Deferred) else value
        return self.before(self._copies.get(part, part))

    def __setitem__(self, part: str, tensor: torch.Tensor) -> None:
        self._catch_up()
        self._forget(part)
        self._assigned[part] = tensor
        self._touched[f"assigned {part}"] = 4 * tensor.numel()

    def __delitem__(self, part: str) -> None:
        self._catch_up()
        self._forget(part)
        self._deleted.add(part)

    def __iter__(self) -> Iterator[str]:
        self._catch_up()
        known = self._stored_parts() if self._below is None else list(self._below)
        yield from (part for part in dict.fromkeys([*known, *self._copies, *self._assigned]) if part in self)

    def __contains__(self, part: object) -> bool:
        self._catch_up()
        if part in self._assigned or part in self._copies or part in self._deleted or not isinstance(part, str):
            return part in self._assigned or part in self._copies
        return self._name(part, self._source) in self._stored if self._below is None else part in self._below

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Stored, torch.Tensor | Deferred | None]]:
        """Yield these parts in the layout of their config: a name, the tensor on disk that it comes from, and what it became.

        None: it did not change, and its bytes on disk can be copied.

        Raises:
            ModelError: the layout has no place for a part.
        """

    @abstractmethod
    def _where(self) -> str:
        """Name these parts in a message."""

    @abstractmethod
    def _name(self, part: str, config: Config) -> str:
        """Return what a part is called on disk in the layout of `config`."""

    @abstractmethod
    def _stored_parts(self) -> list[str]:
        """Name the parts on disk."""

    @abstractmethod
    def _read(self, part: str) -> torch.Tensor:
        """Return a part that is on disk."""

    def _forget(self, part: str) -> None:
        self._assigned.pop(part, None)
        self._copies.pop(part, None)
        self._deleted.discard(part)

    def _catch_up(self) -> None:
        """Do what was put off, in order; what a change asks of its own parts meanwhile finds nothing waiting."""
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            change(self)

    def _changed(self, part: str) -> bool:
        """Whether any surgery assigned or deleted `part`."""
        self._catch_up()
        own = part in self._assigned or part in self._copies or part in self._deleted
        return own or (self._below is not None and self._below._changed(part))

    def _on_disk(self, part: str) -> str | None:
        """Return the part on disk whose unchanged bytes this part is, None where it is computed."""
        self._catch_up()
        if part in self._assigned or part in self._deleted:
            return None
        part = self._copies.get(part, part)
        return part if self._below is None else self._below._on_disk(part)

    def _rounded(self, part: str) -> torch.Tensor:
        """Return `part` as it would be read from disk, had the surgery of these parts been the last.

        So a chain gives the bytes of the commands one after the other, where no step looks at what layers compute: what looks is fed by the layers below
        after all steps.
        """
        tensor = self[part]
        if not self._changed(part) or tensor.is_meta:
            return tensor
        return tensor.to(FLOATS[self._origin([part]).dtype]).float()

    def _origin(self, parts: Sequence[str]) -> Stored:
        """Return the tensor on disk that these parts, fused in one, come from; of what is new, one that it stands beside: the first that attends."""
        names = [self._name(part, self._source) for part in (*parts, *filter(None, map(self._copied, parts)))]
        return next((self._stored[name] for name in names if name in self._stored), self._neighbour)

    def _copied(self, part: str) -> str:
        """Return the part that this one was copied from."""
        return self._copies.get(part) or ("" if self._below is None else self._below._copied(part))

    @property
    def _neighbour(self) -> Stored:
        """A tensor on disk of the type that new ones are stored in: that of the queries, or else the most common."""
        floats = {name: stored for name, stored in self._stored.items() if stored.dtype in FLOATS and name not in self._source.family.buffers}
        if not floats:
            raise ModelError(f"{self._where()} of this {self._source.kind} has no tensor of floating-point numbers on disk")
        usual = Counter(stored.dtype for stored in floats.values()).most_common(1)[0][0]
        first = floats.get(self._name("q", self._source))
        return first or next(stored for stored in floats.values() if stored.dtype == usual)


class Layer(Parts):
    """One layer as a surgery finds it: `layer["k"]` is its key projection [Hk*D, M] in float32; of a technique's own parts, `layer["ffn.effconvert.NAME"]`.

    Attributes:
        index: which layer of the model this is, from 0.
        originals: which layers of the model that healing goes towards it stands for; of several, the later ones were dropped.
        activations: what the model computes on a text, where a surgery asked to look at it; None while only shapes count.
    """

    def __init__(
        self,
        index: int,
        config: Config,
        stored: Mapping[str, Stored],
        device: str,
        below: Layer | None = None,
        originals: range | None = None,
        activations: Activations | None = None,
    ) -> None:
        super().__init__(config, stored, device, below)
        self.index, self.activations = index, activations
        self.originals = range(index, index + 1) if originals is None else originals
        self._source_index: int = index if below is None else below._source_index

    def on_top(self, index: int, config: Config) -> Layer:
        """Return this layer as the next surgery finds it."""
        return Layer(index, config, self._stored, self._device, self, self.originals, self.activations)

    @property
    def per_kv_head(self) -> list[str]:
        """The parts of this layer, biases among them, whose rows come KV head by KV head: [Hk*D, ...]."""
        names = self.config.family.per_kv_head
        return [part for stem in names for part in (stem, f"{stem}.bias") if part in self]

    def tensors(self) -> Iterator[tuple[str, Stored, torch.Tensor | Deferred | None]]:
        """Yield the layer in the layout of its config: see `Parts.tensors`; names are relative to the layer."""
        config, source = self.config, self._source
        own = [part for part in self if f".{OWN}" in part and config.replaced_at(self.index, part.partition(".")[0])]
        known = config.parts.keys() - config.lacks(self.index)
        if lost := [part for part in self if part.removesuffix(".bias") not in known and part not in own]:
            raise ModelError(f"layer {self.index} became one with {', '.join(lost)}, for which {config.family.lm} has no place; it has {', '.join(known)}")
        for module, parts in config.modules.items():
            for suffix in ("", ".bias"):
                present = [part + suffix for part in parts if part + suffix in self]
                if not present:
                    continue
                if len(present) != len(parts):
                    raise ModelError(f"layer {self.index}: {module} holds {', '.join(parts)} in one tensor, and only {', '.join(present)} is there")
                name = f"{module}.bias" if suffix else f"{module}.weight"
                if copied := self._same_bytes(present):
                    yield name, copied, None
                elif config.stacked(present) or (len(present) == 1 and self._late(present[0])):
                    yield name, self._origin((present[0], *parts)), self._deferred(present)
                else:
                    yield name, self._origin((present[0], *parts)), join([self[part] for part in present], present, config)
        for part in own:
            yield self._name(part, config), self._origin([part]), self[part] if self._changed(part) else None
        if config.family == source.family:
            yield from ((name, self._stored[name], None) for name in config.family.buffers if name in self._stored)

    def _where(self) -> str:
        return f"layer {self.index}"

    def _late(self, part: str) -> bool:
        """Whether a part is to be computed when it is written: somebody said so, or it is a copy, of which there may be many."""
        if part in self._assigned:
            return isinstance(self._assigned[part], Deferred)
        return part in self._copies or (self._below is not None and part not in self._deleted and self._below._late(part))

    def _deferred(self, parts: list[str]) -> torch.Tensor | Deferred:
        """Return what is fused of these parts, to be computed when it is written."""
        stacked = self.config.stacked(parts)
        if self.shapes_only:
            return torch.empty(self.config.stored_shape(parts), device="meta") if stacked else join([self[parts[0]]], parts, self.config)
        return Deferred(lambda: join([self[part] for part in parts], parts, self.config), (lambda: (self[part] for part in parts)) if stacked else None)

    def _same_bytes(self, parts: list[str]) -> Stored | None:
        """Return the tensor on disk that holds these parts just as the target lays them out, None where they are computed or laid out anew."""
        on_disk = [self._on_disk(part) for part in parts]
        if None in on_disk:
            return None
        names = {self._name(part, self._source) for part in on_disk if part}
        family, source = self.config.family, self._source.family
        stems = tuple(part.removesuffix(".bias") for part in on_disk if part)
        together = self._source.modules[self._source.parts[stems[0]]] == stems
        laid_out = family.transposed == source.transposed and (len(parts) == 1 or family.per_head == source.per_head)
        return self._stored[names.pop()] if together and laid_out and len(names) == 1 else None

    def _name(self, part: str, config: Config) -> str:
        place, inside, name = part.partition(f".{OWN}")
        if inside:
            return ".".join(filter(None, [config.place(place), OWN + name]))
        stem = part.removesuffix(".bias")
        return f"{config.parts.get(stem, stem)}.{'bias' if part != stem else 'weight'}"

    def _stored_parts(self) -> list[str]:
        parts = [part for stem in self._source.parts for part in (stem, f"{stem}.bias")]
        for record in self._source.replaced_in(self._source_index):
            inside = ".".join(filter(None, [self._source.place(record.place), OWN]))
            parts += [f"{record.place}.{OWN}{name.removeprefix(inside)}" for name in self._stored if name.startswith(inside)]
        return parts

    def _read(self, part: str) -> torch.Tensor:
        tensor = self._stored[self._name(part, self._source)].read(self._device)
        if f".{OWN}" in part:
            return tensor
        family, stem = self._source.family, part.removesuffix(".bias")
        fused = self._source.modules[self._source.parts[stem]]
        if family.transposed and tensor.ndim == 2:
            tensor = tensor.T
        return split(tensor, fused, self._source)[fused.index(stem)]


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

    def tensors(self) -> Iterator[tuple[str, Stored, torch.Tensor | Deferred | None]]:
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
        return f"{outer_prefix(self._source, self._prefix, config)}{family.outer[stem]}.{inside}" if stem in family.outer else f"{family.head[stem]}.{inside}"

    def _stored_parts(self) -> list[str]:
        return [part_outside(name, self._prefix, self._source) for name in self._stored]

    def _read(self, part: str) -> torch.Tensor:
        return self._stored[self._name(part, self._source)].read(self._device)


@dataclass
class Model:
    """A model as a surgery finds it; layers can be dropped or reordered by assigning `layers`."""

    config: Config
    layers: list[Layer]
    outer: Outer
    originals: int  # layers of the model that healing goes towards

    def on_top(self, config: Config) -> Model:
        """Return the model as the next surgery finds it."""
        return Model(config, [layer.on_top(index, config) for index, layer in enumerate(self.layers)], self.outer.on_top(config), self.originals)


def outer_prefix(source: Config, prefix: str, target: Config) -> str:
    """Return what stands before the base model's names in `target`, where in `source` it is `prefix`: nothing where a base model was saved alone."""
    return f"{target.family.prefix}." if prefix and target.family.prefix else "" if target.family != source.family else prefix


def part_outside(name: str, prefix: str, config: Config) -> str:
    """Return the part that a tensor outside the layers is."""
    places = [(prefix + module, part) for part, module in config.family.outer.items()] + [(module, part) for part, module in config.family.head.items()]
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


def split(tensor: torch.Tensor, parts: tuple[str, ...], config: Config) -> tuple[torch.Tensor, ...]:
    """Take a tensor [out, ...] apart into the `parts` that are fused in it."""
    if config.stacked(parts):
        tensor = tensor.flatten(0, 1)  # [E, out, in]
    if "q" not in parts:
        return tuple(tensor.chunk(len(parts)))
    if config.family.per_head:
        by_head = tensor.unflatten(0, (config.heads, len(parts), config.head_dim))  # [H, 3, D, ...]
        return tuple(by_head[:, i].flatten(0, 1) for i in range(len(parts)))
    heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    return tuple(tensor.split([heads[part] * config.head_dim for part in parts])) if len(parts) > 1 else (tensor,)


def join(tensors: list[torch.Tensor], parts: Sequence[str], config: Config) -> torch.Tensor:
    """Undo `split`, and store [in, out] where the family does."""
    if config.family.per_head and len(tensors) == 3:
        tensor = torch.stack([part.unflatten(0, (config.heads, config.head_dim)) for part in tensors], 1).flatten(0, 2)
    else:
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if config.stacked(parts):
        return tensor.view(config.experts, -1, tensor.shape[1])
    return tensor.T if config.family.transposed and tensor.ndim == 2 else tensor
