"""What a technique is that puts something of its own at a place of a layer: options, new parameters, and what runs there."""
# B = batch, T = tokens, M = hidden width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from effconvert.checkpoint.replaced import OWN, Replaced
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Layerwise

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Slots

BYTES = {"float32": 4, "bool": 1, "int64": 8}


@dataclass(frozen=True)
class Around:
    """What stands around a place while it runs."""

    original: Callable[[Tensor], Tensor]  # what the family's own module makes of hidden states; parts that were dropped are not in it
    live: Tensor  # which tokens are no padding, bool [B, T]; all where that is not known


class Replacement(Layerwise):
    """A technique with something of its own at a place. In one file are its options, its parameters, and what it computes.

    A converted model keeps the options in its config.json and the parameters in the module of the place: `mlp.effconvert.NAME`.
    """

    place: ClassVar[str] = ""  # where it runs: scores, attention, ffn, layer, or a part such as q; empty where its options say so
    drops: ClassVar[tuple[str, ...]] = ()  # parts that it does without
    no_encoders: ClassVar[str] = ""  # why encoders cannot have it; empty: they can
    no_decoders: ClassVar[str] = ""  # likewise
    where: ClassVar[frozenset[str]] = frozenset({"layers"})  # options that say where, and not what
    frozen: ClassVar[tuple[str, ...]] = ()  # parameters that nothing trains
    transfer_place: ClassVar[str] = ""  # the place whose output `transfer` trains it to reproduce; empty: its own

    def places(self, config: Config) -> tuple[str, ...]:
        """Return where it runs in a chosen layer: its place, or several of them by its options."""
        return (self.place,)

    @abstractmethod
    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Name the new parameters at a place of a layer, with their shapes."""

    def begin(self, config: Config, index: int) -> Mapping[str, Tensor]:
        """Return what they are before anything was fitted; the same on each call."""
        return {}

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what they are for this layer, after a look at what it computes; asked where `needs_calibration` says so."""
        return values

    def remembers(self, config: Config) -> Slots:
        """Name what has to be known of earlier tokens to go on, with the shapes for one sequence; empty for encoders, and where nothing has to."""
        return {}

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes that one sequence of `context` tokens takes in a layer's cache: the same however long it is, where a technique does not grow."""
        return sum(math.prod(shape) * BYTES.get(kind, itemsize) for shape, kind in self.remembers(config).values())

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return the bytes that a token adds to that, on average over a long text."""
        return 0.0

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, around: Around) -> Tensor:
        """Return what stands at the place makes of hidden states [B, T, M]; for places that are modules."""
        raise NotImplementedError(f"{self.name} has nothing that runs at a module")

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Any options, or a reason why none."""
        cls.check_family(config)
        needed = [(name, field) for name, field in cls.model_fields.items() if field.is_required()]
        metavars = ((name, (cast(Any, field.json_schema_extra) or {}).get("metavar", "N")) for name, field in needed)
        return " ".join(f"--{name.replace('_', '-')} {metavar}" for name, metavar in metavars) or "as it is"

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse families that cannot have it.

        Raises:
            ModelError: the reason.
        """
        name = cls.__module__.rpartition(".")[2].replace("_", "-")
        if cls.place in ("scores", "attention"):
            config.place(cls.place)  # says so where nothing attends
        if why := cls.no_decoders if config.family.decoder else cls.no_encoders:
            raise ModelError(f"{config.kind} is {'a decoder' if config.family.decoder else 'an encoder'}, and {name} {why}")

    def check(self, config: Config) -> None:
        """Refuse layers that are not there, or have something in that place already, and models that this cannot be in."""
        self.check_family(config)
        if not self.chosen(config):
            raise OptionError(self.nothing_chosen)
        self.config(config)

    @property
    def nothing_chosen(self) -> str:
        """Why no layer may be left to change."""
        return "no layer is left to change: --layers names none"

    def is_exact(self, config: Config) -> bool:
        """Only with options that say so: see the techniques."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """The options without those that say where, as config.json keeps them."""
        return self.model_dump(mode="json", exclude=set(self.where))

    def config(self, config: Config) -> Config:
        """Put it into the chosen layers."""
        layers = tuple(sorted(self.chosen(config)))
        for place in self.places(config):
            config = config.with_replaced(Replaced(self.name, self.settings, place, layers, self.dropped(config, place)))
        return config

    def dropped(self, config: Config, place: str) -> tuple[str, ...]:
        """Return the parts that go at a place: of a technique that runs at several projections, each its own."""
        return tuple(part for part in self.drops if part == place or part not in self.places(config))

    def layer(self, layer: Layer) -> None:
        """Add the new parameters, and take away the parts that are dropped."""
        places = self.places(layer.config)
        for place in places:
            for name, value in self.values(layer, place).items():
                layer[f"{place}.{OWN}{name}"] = value
        gone = [part for part in layer if part in self.drops or (part.removesuffix(".bias") in self.drops and part.removesuffix(".bias") not in places)]
        for part in gone:  # the bias of a projection that is itself replaced stays, and is added to what takes its place
            del layer[part]

    def values(self, layer: Layer, place: str) -> Mapping[str, Tensor]:
        """Return the new parameters of a layer at a place, as they begin or as they are fitted."""
        import torch

        shapes = self.parameters(layer.config, place)
        if layer.shapes_only or (self.needs_calibration(layer.config) and not layer.activations):
            return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        begun = self.begin(layer.config, layer.index)
        fitted = self.fit(layer, begun) if layer.activations and self.needs_calibration(layer.config) else begun
        return {name: fitted[name] for name in shapes}
