"""One layer of a model, lazily: nothing is read from disk until a surgery asks for a part, and what nobody assigns stays where it lies.

A surgery sees plain [out, in] matrices named by what they do; how a family fuses or transposes them is undone and done again here.
"""
# M = hidden width, H = query heads, Hk = KV heads, D = head width.

from __future__ import annotations  # a walk looks at layers, and a layer at the walk

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

import torch

from effconvert.convert.config import Config
from effconvert.convert.families import Family
from effconvert.convert.shards import FLOATS, Stored
from effconvert.errors import ModelError

if TYPE_CHECKING:
    from effconvert.convert.calibrate import Walk


MIXER = "mixer."  # begins the parts that a mixer brings with it; they lie in the attention's module


class Layer(MutableMapping[str, torch.Tensor]):
    """One layer as a surgery finds it: `layer["k"]` is its key projection [Hk*D, M] in float32, `layer["k.bias"]` the bias; assigning replaces them.

    Fused and transposed storage is undone on reading and done again on writing: a surgery sees plain [out, in] matrices. What is read is a
    copy: to change a part, assign it. Each surgery gets layers of its own on top of the ones before, so that a layer kept for later stays what it was.

    Attributes:
        index: which layer of the model this is, from 0.
        config: the shape of the model.
        originals: which layers of the model that healing goes towards it stands for; of several, the later ones were dropped.
        walk: what the model computes on a text, where a surgery asked to look at it; None while only shapes count.
    """

    def __init__(
        self,
        index: int,
        config: Config,
        stored: Mapping[str, Stored],
        device: str,
        below: Layer | None = None,
        originals: range | None = None,
        walk: Walk | None = None,
    ) -> None:
        self.index, self.config, self.walk = index, config, walk
        self.originals = range(index, index + 1) if originals is None else originals
        self._source: Config = config if below is None else below._source
        self._stored, self._device, self._below = stored, device, below
        self._assigned: dict[str, torch.Tensor] = {}
        self._deleted: set[str] = set()
        self._waiting: list[Callable[[Layer], None]] = []
        self._touched = 0

    def on_top(self, index: int, config: Config) -> Layer:
        """Return this layer as the next surgery finds it."""
        return Layer(index, config, self._stored, self._device, self, self.originals, self.walk)

    @property
    def depth(self) -> int:
        """Layers of the checkpoint that this one comes from."""
        return self._source.layers

    @property
    def shapes_only(self) -> bool:
        """Whether tensors have no numbers in them: a plan is being made."""
        return self._device == "meta"

    @property
    def per_kv_head(self) -> list[str]:
        """The parts of this layer, biases among them, whose rows come KV head by KV head: [Hk*D, ...]."""
        names = self.config.family.per_kv_head
        return [part for stem in names for part in (stem, f"{stem}.bias") if part in self]

    @property
    def touched(self) -> int:
        """Bytes in float32 of all that was read or assigned so far, for the estimate of peak memory."""
        return self._touched + (0 if self._below is None else self._below.touched)

    def later(self, change: Callable[[Layer], None]) -> None:
        """Have `change` called with this layer before anything is asked of it."""
        self._waiting.append(change)

    def __getitem__(self, part: str) -> torch.Tensor:
        if part not in self:
            raise ModelError(f"layer {self.index} of this {self._source.kind} has no part {part!r}; it has {', '.join(self)}")
        if part in self._assigned:
            return self._assigned[part]
        if self._below is not None:
            return self._below._stored_again(part)
        tensor = self._read(part)
        self._touched += 4 * tensor.numel()
        return tensor

    def __setitem__(self, part: str, tensor: torch.Tensor) -> None:
        self._catch_up()
        self._deleted.discard(part)
        self._assigned[part] = tensor
        self._touched += 4 * tensor.numel()

    def __delitem__(self, part: str) -> None:
        self._catch_up()
        self._assigned.pop(part, None)
        self._deleted.add(part)

    def __iter__(self) -> Iterator[str]:
        self._catch_up()
        stored = [part for stem in self._source.family.parts for part in (stem, f"{stem}.bias")]
        inside = f"{self._source.family.attention}.{MIXER}"
        stored += [MIXER + name.removeprefix(inside) for name in self._stored if name.startswith(inside)]
        known = stored if self._below is None else list(self._below)
        yield from (part for part in dict.fromkeys([*known, *self._assigned]) if part in self)

    def __contains__(self, part: object) -> bool:
        self._catch_up()
        if part in self._assigned or part in self._deleted or not isinstance(part, str):
            return part in self._assigned
        return self._name(part) in self._stored if self._below is None else part in self._below

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def tensors(self, family: Family) -> Iterator[tuple[str, Stored, torch.Tensor | None]]:
        """Yield this layer in the layout of `family`: a name, the tensor on disk that it comes from, and what it became.

        None: it did not change, and its bytes on disk can be copied.

        Raises:
            ModelError: the layout has no place for a part, or lacks one that it fuses with another.
        """
        if lost := [part for part in self if part.removesuffix(".bias") not in family.parts and not part.startswith(MIXER)]:
            raise ModelError(f"layer {self.index} became one with {', '.join(lost)}, for which {family.lm} has no place; it has {', '.join(family.parts)}")
        for module, parts in family.modules.items():
            for suffix in ("", ".bias"):
                present = [part + suffix for part in parts if part + suffix in self]
                if not present:
                    continue
                if len(present) != len(parts):
                    raise ModelError(f"layer {self.index}: {module} holds {', '.join(parts)} in one tensor, and only {', '.join(present)} is there")
                name = f"{module}.bias" if suffix else f"{module}.weight"
                origin = self._origin((present[0], *parts))
                yield name, origin, None if self._untouched(present, family) else join([self[part] for part in present], family, self.config)
        for part in self:
            if part.startswith(MIXER):
                yield f"{family.attention}.{part}", self._origin([part]), self[part] if self._changed(part) else None
        if family == self._source.family:
            yield from ((name, self._stored[name], None) for name in family.buffers if name in self._stored)

    def _catch_up(self) -> None:
        """Do what was put off, in order; what a change asks of its own layer meanwhile finds nothing waiting."""
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            change(self)

    def _changed(self, part: str) -> bool:
        """Whether any surgery assigned or deleted `part`."""
        self._catch_up()
        return part in self._assigned or part in self._deleted or (self._below is not None and self._below._changed(part))

    def _stored_again(self, part: str) -> torch.Tensor:
        """Return `part` as it would be read from disk, had the surgery of this layer been the last.

        So a chain gives the bytes of the commands one after the other, where no step looks at what layers compute: what looks is fed by the layers below
        after all steps.
        """
        tensor = self[part]
        if not self._changed(part) or tensor.is_meta:
            return tensor
        return tensor.to(FLOATS[self._origin([part]).dtype]).float()

    def _origin(self, parts: Sequence[str]) -> Stored:
        """Return the tensor on disk that these parts, fused in one, come from: of several the first counts; what is new goes with the layer's first."""
        return next((stored for part in parts if (stored := self._stored.get(self._name(part)))), next(iter(self._stored.values())))

    def _untouched(self, parts: list[str], family: Family) -> bool:
        """Whether these parts, fused in one tensor of `family`, lie on disk just so."""
        source = self._source.family
        together = tuple(part.removesuffix(".bias") for part in parts)
        same = family.modules.get(source.parts[together[0]]) == source.modules[source.parts[together[0]]] == together
        laid_out = family.transposed == source.transposed and (len(parts) == 1 or family.per_head == source.per_head)
        return same and laid_out and not any(map(self._changed, parts))

    def _name(self, part: str) -> str:
        if part.startswith(MIXER):
            return f"{self._source.family.attention}.{part}"
        stem = part.removesuffix(".bias")
        return f"{self._source.family.parts.get(stem, stem)}.{'bias' if part != stem else 'weight'}"

    def _read(self, part: str) -> torch.Tensor:
        family = self._source.family
        if part.startswith(MIXER):
            return self._stored[self._name(part)].read(self._device)
        stem = part.removesuffix(".bias")
        fused = family.modules[family.parts[stem]]
        tensor = self._stored[self._name(part)].read(self._device)
        if family.transposed and tensor.ndim == 2:
            tensor = tensor.T
        return split(tensor, fused, family, self._source)[fused.index(stem)]


def split(tensor: torch.Tensor, parts: tuple[str, ...], family: Family, config: Config) -> tuple[torch.Tensor, ...]:
    """Take a tensor [out, ...] apart into the `parts` that are fused in it."""
    if "q" not in parts:
        return tuple(tensor.chunk(len(parts)))
    if family.per_head:
        by_head = tensor.unflatten(0, (config.heads, len(parts), config.head_dim))  # [H, 3, D, ...]
        return tuple(by_head[:, i].flatten(0, 1) for i in range(len(parts)))
    heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    return tuple(tensor.split([heads[part] * config.head_dim for part in parts])) if len(parts) > 1 else (tensor,)


def join(tensors: list[torch.Tensor], family: Family, config: Config) -> torch.Tensor:
    """Undo `split`, and store [in, out] where the family does."""
    if family.per_head and len(tensors) == 3:
        tensor = torch.stack([part.unflatten(0, (config.heads, config.head_dim)) for part in tensors], 1).flatten(0, 2)
    else:
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return tensor.T if family.transposed and tensor.ndim == 2 else tensor
