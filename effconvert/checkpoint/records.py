"""What a config.json says beside the shape: where techniques stand, which layers share parameters, and what layers skip."""

from dataclasses import dataclass
from functools import cached_property

from effconvert.checkpoint.layout import Layout
from effconvert.checkpoint.replaced import OUTSIDE, Replaced, skipped
from effconvert.checkpoint.shared import CACHE_PARTS, Shared
from effconvert.errors import ModelError


@dataclass(frozen=True)
class Records(Layout):
    """A shape with the records of techniques and of shared layers, and what follows from them for each layer."""

    replaced: tuple[Replaced, ...] = ()  # techniques that replace the family's own modules
    shared: tuple[Shared, ...] = ()  # parameters that layers share

    def replaced_in(self, layer: int) -> list[Replaced]:
        """Return the records of techniques in a layer."""
        return [record for record in self.replaced if layer in record.layers]

    def replaced_at(self, layer: int, place: str) -> Replaced | None:
        """Return the record of the technique at `place` of a layer; None without one."""
        return next((record for record in self.replaced_in(layer) if record.place == place), None)

    def replaced_outside(self, place: str) -> Replaced | None:
        """Return the record of the technique at a place outside the layers; None without one."""
        return next((record for record in self.replaced if record.place == place and place in OUTSIDE), None)

    def cache_of(self, layer: int) -> int:
        """Return the layer whose keys and values this one reads: itself, or an earlier one."""
        return next((record.layers[0] for record in self.shared if record.what == "cache" and layer in record.layers), layer)

    @property
    def readers(self) -> list[int]:
        """The layers that read an earlier layer's keys and values."""
        return [layer for layer in range(self.layers) if self.cache_of(layer) != layer]

    def stored_for(self, layer: int, part: str) -> int:
        """Return the layer that stores a part of this one, or a bias: itself, or the first of those that share it and have it."""
        return self._stored_for.get((layer, part), layer)

    def stored_in(self, layer: int, name: str) -> int:
        """Return the layer that stores the tensor `name` of this one, of the family or of a technique."""
        parts = self.parts_in(name)
        bias = parts and parts[0] not in self.family.loose and name.endswith(".bias")
        return self.stored_for(layer, parts[0] + (".bias" if bias else "")) if parts else layer

    def shares(self, layer: int, part: str) -> bool:
        """Whether a layer shares a part, or a bias, with others."""
        return any(layer in record.layers and record.has(part) for record in self.shared)

    def leaders(self, layer: int) -> set[int]:
        """Return the layers that store something for this one."""
        return {first for (user, _), first in self._stored_for.items() if user == layer and first != layer}

    @cached_property
    def _stored_for(self) -> dict[tuple[int, str], int]:
        result: dict[tuple[int, str], int] = {}
        for record in self.shared:
            lacks = {layer: self.lacks(layer) for layer in record.layers}
            for part in filter(record.has, self.parts):
                first = next((layer for layer in record.layers if part not in lacks[layer]), record.layers[0])
                for name in filter(record.has, (part, f"{part}.bias")):
                    result |= dict.fromkeys(((layer, name) for layer in record.layers), first)
        return result

    def place(self, name: str) -> str:
        """Return the module at a place of a layer; empty for the layer itself.

        Raises:
            ModelError: this family has no module there.
        """
        if name == "layer":
            return ""
        if name in self.family.adds_inside:
            raise ModelError(f"{self.kind} adds to the stream inside its {name}, so nothing can be put in its place")
        if name in ("scores", "attention"):
            if not self.attention:
                raise ModelError(f"{self.kind} does not attend, so nothing can be put in the place of its attention")
            if name == "scores":
                self.check_interface()
            return self.attention
        module = self.family.ffn if name == "ffn" else self.parts.get(name, "")
        if not module:
            raise ModelError(f"a layer of {self.kind} has no module of its own for {name}, so nothing can be put in its place")
        if name != "ffn" and len(self.modules[module]) > 1:
            raise ModelError(f"{self.kind} holds {', '.join(self.modules[module])} in one module, so {name} alone cannot be replaced")
        return module

    def skips(self, layer: int) -> set[str]:
        """Return the places that a layer skips: attention, ffn (transformers' `per_layer_config`)."""
        return self._skipped.get(layer, set())

    @cached_property
    def _skipped(self) -> dict[int, set[str]]:
        return skipped(self.raw, self.family)

    def lacks(self, layer: int) -> set[str]:
        """Return the parts that a layer lacks: those skipped or dropped, and where a family has both, its experts or its dense FFN."""
        gone = {part for record in self.replaced_in(layer) for part in record.drops}
        gone |= {part for place in self.skips(layer) for part in self.sublayer(place)}
        gone |= self.family.first_lacks if layer == 0 else set()
        gone |= self.parts.keys() & CACHE_PARTS if self.cache_of(layer) != layer else set()
        if self.experts:
            experts = {part for part in self.parts if part.startswith(("experts.", "shared_")) or part == "router"}
            gone |= {"gate", "up", "down"} if self.sparse(layer) else experts
        return gone
