"""Base of techniques that replace projections by two factors: which projections, and the order in which they are fitted."""
# O = outputs of a projection, I = its inputs.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.checkpoint.replaced import OWN
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._replacement import Replacement
from effconvert.surgery.projections._parts import GROUPS, PARTS, SAME_INPUT

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer


class Factored(Replacement):
    """Two factors, `left` and `right`, in place of each chosen projection; some forms have an order beside them."""

    by_token: ClassVar[bool] = True

    parts: str = Field("mlp", description="Projections: mlp, attention, all, or a list of q, k, v, o, gate, up, down.", json_schema_extra={"metavar": "PARTS"})

    def places(self, config: Config) -> tuple[str, ...]:
        """Return the projections that --parts names, in the order in which a layer computes them."""
        named = [part.strip() for part in self.parts.split(",")]
        if unknown := [part for part in named if part not in {*GROUPS, *PARTS}]:
            raise OptionError(f"--parts {unknown[0]} is no projection; there are {', '.join(PARTS)}, and {', '.join(GROUPS)} for several of them")
        chosen = {part for part in named if part in PARTS}
        for group in filter(GROUPS.get, named):
            chosen |= {part for part in GROUPS[group] if part in config.parts} or {GROUPS[group][-1]}  # a part that is missing: `Config.place` says so
        return tuple(part for part in PARTS if part in chosen)

    def dropped(self, config: Config, place: str) -> tuple[str, ...]:
        """Return the projection itself."""
        return (place,)

    def needs_calibration(self, config: Config) -> bool:
        """If something is lost."""
        return not self.is_exact(config)

    @abstractmethod
    def replaces(self, config: Config, index: int) -> list[str]:
        """Return the projections of a layer that are replaced."""

    @abstractmethod
    def factors(self, weight: Tensor, moment: Tensor | None, index: int, place: str, config: Config) -> Mapping[str, Tensor]:
        """Return what `parameters` names, of a projection [O, I] for inputs with this second moment; on the meta device their shapes."""

    @abstractmethod
    def product(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix [O, I] that the factors stand for."""

    def layer(self, layer: Layer) -> None:
        """Replace the projections in the order in which they are computed: each sees the inputs that the replaced ones before it leave."""
        from effconvert.surgery.attention._heads import second_moment

        chosen, fitted = self.replaces(layer.config, layer.index), self.needs_calibration(layer.config)
        changed = layer.on_top(layer.index, layer.config)  # with products in place of the factors
        results: dict[str, Mapping[str, Tensor]] = {}
        for group in SAME_INPUT:
            places = [place for place in group if place in chosen]
            moment = second_moment(changed, places[0], biased=False) if places and layer.activations and fitted else None
            for place in places:
                weight = layer[place].to("meta") if fitted and not layer.activations else layer[place]
                results[place] = self.factors(weight, moment, layer.index, place, layer.config)
                if layer.activations:
                    changed[place] = self.product(results[place])
        for place, values in results.items():
            for name, value in values.items():
                layer[f"{place}.{OWN}{name}"] = value
            del layer[place]

    def pairs(self, config: Config) -> list[tuple[int, str]]:
        """Return the projections of all chosen layers, by layer and place.

        Raises:
            OptionError: a layer lacks a projection, or shares it with others.
            ModelError: the family has no such projection by itself.
        """
        places = self.places(config)
        for place in places:
            config.place(place)
        pairs = [(index, place) for index in sorted(self.chosen(config)) for place in places if self._present(config, index, place)]
        if not pairs:
            raise ModelError(f"{config.kind} has experts in each layer, and no {', '.join(places)}")
        return pairs

    def _present(self, config: Config, index: int, place: str) -> bool:
        if common := next((record for record in config.shared if index in record.layers and record.has(place) and record.what != "cache"), None):
            raise OptionError(f"layers {', '.join(map(str, common.layers))} share their {place}, which cannot be replaced; leave them out of --layers")
        if place in GROUPS["attention"] or not config.sparse(index):
            return True
        if self.layers is not None:
            raise OptionError(f"layer {index} has experts and no {place}; leave it out of --layers")
        return False
