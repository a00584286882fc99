"""Base classes of techniques that run in place of a part of the model: options, new parameters, and the code that runs there."""
# B = batch, T = tokens, M = hidden width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from effconvert.checkpoint.replaced import OUTSIDE, OWN, PLACES, Replaced, overlap
from effconvert.errors import ModelError, OptionError, TechniqueError
from effconvert.families import CONVERTIBLE
from effconvert.surgery._surgery import Layerwise, Surgery

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots

BYTES = {"float32": 4, "bool": 1, "int64": 8}


class AttendingProtocol(Protocol):
    """Softmax attention in place of the family's, with the cache and positions of the call: `effconvert.modeling.attending.Attending`."""

    def angles(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of each rotary pair for the new tokens, [B or 1, T, P], in the dtype of `like`."""

    def remember(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, T, D] of the new tokens to the cache, and return those of all tokens."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend as the family does: queries [B, H, T, D], keys [B, G, N, D], values [B, G, N, D']; returns [B, T, H, D']."""


@dataclass(frozen=True)
class PlaceContext:
    """What a technique may use at a place while it runs, beside the hidden states."""

    original: Callable[[Tensor], Tensor]  # the family's own module, as a function of hidden states; without the parts that were dropped
    live: Tensor  # which tokens are not padding, bool [B, T]; all True where that is not known
    attention: AttendingProtocol | None = None  # at the place of attention
    call: Call | None = None  # at the place of the FFN of a technique that `shifts`: its hidden states with the layer's state; live tokens stand last


class Placed(Surgery):
    """A technique that runs at places: `Replacement` in layers, `OuterReplacement` outside them. One file holds its options, parameters and maths.

    A converted model keeps the options in its config.json and the parameters in the module of the place: `mlp.effconvert.NAME`.
    """

    transfer_first = True
    no_encoders: ClassVar[str] = ""  # why it refuses encoders; empty: it takes them
    no_decoders: ClassVar[str] = ""  # why it refuses decoders; empty: it takes them
    frozen: ClassVar[tuple[str, ...]] = ()  # parameters that are never trained
    whole_numbers: ClassVar[tuple[str, ...]] = ()  # tensors of int64, which are no parameters

    @abstractmethod
    def places(self, config: Config) -> tuple[str, ...]:
        """Return where it runs, by its options."""

    @abstractmethod
    def dropped(self, config: Config, place: str) -> tuple[str, ...]:
        """Return the parts removed at a place."""

    @abstractmethod
    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Name the new parameters at a place, with their shapes; {} if there are none."""

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Return the initial values of the parameters at a place of layer `index`: float32 on the CPU, the same on each call."""
        return {}

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The options that have to be given, or the reason why none would do."""
        cls.check_family(config)
        return super().allowed_options(config)

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse families that the technique does not fit.

        Raises:
            ModelError: the reason.
        """
        config.check_alone()
        name = cls.__module__.rpartition(".")[2].replace("_", "-")
        if why := cls.no_decoders if config.decoder else cls.no_encoders:
            raise ModelError(f"{config.kind} is {'a decoder' if config.decoder else f'an {config.role}'}, and {name} {why}")

    def is_exact(self, config: Config) -> bool:
        """False; techniques override this for their neutral options."""
        return False

    @classmethod
    def recorded(cls, options: Mapping[str, Any]) -> Self:
        """Return the technique that a record of config.json means; where a default has changed since, older records lack the option."""
        return cls(**options)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that config.json keeps."""
        return self.model_dump(mode="json")


class Replacement(Layerwise, Placed):
    """A technique that replaces a place in layers."""

    place: ClassVar[str] = ""  # where it runs: scores, attention, ffn, layer, or a part such as q; empty where its options choose
    drops: ClassVar[tuple[str, ...]] = ()  # parts that it removes
    where: ClassVar[frozenset[str]] = frozenset({"layers"})  # options that choose layers, which config.json does not keep
    chunks: ClassVar[bool] = False  # whether all it does is to run the module of its place some tokens at a time
    by_token: ClassVar[bool] = False  # whether it computes each token by itself, so that any mask and several texts in a row are right
    shifts: ClassVar[bool] = False  # whether it reads earlier tokens at the place of the FFN
    transfer_place: ClassVar[str] = ""  # the place whose output `transfer` trains it to reproduce; empty: its own

    def places(self, config: Config) -> tuple[str, ...]:
        """Return where it runs in a chosen layer: its place, or several of them by its options."""
        return (self.place,)

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the parameters fitted to this layer's activations, float32 on the CPU; called where `needs_calibration` is true."""
        return values

    def cached_width(self, config: Config) -> int:
        """Return how many numbers of keys and values `AttendingProtocol.remember` keeps of a token; 0 for techniques with a state, or without any."""
        return 0

    def cache_slots(self, config: Config) -> Slots:
        """Name the tensors that the cache keeps of earlier tokens, with the shapes for one sequence; empty for encoders, and where none is needed."""
        return {}

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes that one sequence of `context` tokens takes in a layer's cache; the same for every length, unless the technique's cache grows."""
        return sum(math.prod(shape) * BYTES.get(kind, itemsize) for shape, kind in self.cache_slots(config).values())

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return the bytes that a token adds to the cache, on average over a long text."""
        return 0.0

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Return the output for hidden states [B, T, M]; only for places that are modules. The plan refuses such a technique without it."""
        raise TechniqueError(f"{self.name} has no `forward`, which would run at a module; its author has to write it")

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse families that the technique does not fit."""
        config.check_alone()
        if cls.place in ("scores", "attention"):
            config.place(cls.place)  # raises where nothing attends
        super().check_family(config)

    def check(self, config: Config) -> None:
        """Refuse layers that do not exist or have a technique at that place already, and families that the technique does not fit."""
        if wrong := [place for place in self.places(config) if place not in PLACES]:
            raise TechniqueError(f"{self.name} runs at {wrong[0]!r}, and there is no such place; its author can choose from {', '.join(PLACES)}")
        self.check_family(config)
        if not self.chosen(config):
            raise OptionError(self.nothing_chosen)
        self.config(config)

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The options that have to be given, or the reason why none would do; another technique at its place of every layer is one."""
        options = super().allowed_options(config)
        taken = [
            next((record for record in config.replaced_in(layer) if cls.place and overlap(record.place, cls.place)), None) for layer in range(config.layers)
        ]
        if (first := taken[0]) and all(taken):
            raise ModelError(f"this {config.kind} has {first.technique} in place of its {first.place} in every layer already; begin from the original")
        return options

    @property
    def nothing_chosen(self) -> str:
        """The message for a choice without any layer."""
        return "no layer is left to change: --layers names none"

    @property
    def settings(self) -> dict[str, Any]:
        """The options that config.json keeps: all but those that choose layers."""
        return self.model_dump(mode="json", exclude=set(self.where))

    def config(self, config: Config) -> Config:
        """Record the technique for the chosen layers."""
        layers = tuple(sorted(self.chosen(config)))
        for place in self.places(config):
            config = config.with_replaced(Replaced(self.name, self.settings, place, layers, self.dropped(config, place)))
        return config

    def dropped(self, config: Config, place: str) -> tuple[str, ...]:
        """Return the parts removed at a place; a technique at several projections removes each at its own place."""
        return tuple(part for part in self.drops if part == place or part not in self.places(config))

    def layer(self, layer: Layer) -> None:
        """Add the new parameters, and delete the parts that the technique drops."""
        places = self.places(layer.config)
        if layer.shapes_only and layer.index == min(self.chosen(layer.config)):
            self._check_file(layer.config, layer.index)
        fitted = {place: self.values(layer, place) for place in places}  # all are fitted to the layer as it was
        for place, values in fitted.items():
            shapes = self.parameters(layer.config, place)
            self._check_values("values", values, shapes, place)
            for name in shapes:
                layer[f"{place}.{OWN}{name}"] = values[name]
        removed = [part for part in layer if part in self.drops or (part.removesuffix(".bias") in self.drops and part.removesuffix(".bias") not in places)]
        for part in removed:  # the bias of a projection that is itself replaced stays: it is added to the replacement's output
            del layer[part]

    def values(self, layer: Layer, place: str) -> Mapping[str, Tensor]:
        """Return the new parameters of a layer at a place: initial, or fitted."""
        import torch

        shapes = self.parameters(layer.config, place)
        if layer.shapes_only or (self.needs_calibration(layer.config) and not layer.activations):
            return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        initial = self.initial_values(layer.config, layer.index)
        return self.fit(layer, initial) if layer.activations and self.needs_calibration(layer.config) else initial

    def _check_file(self, config: Config, index: int) -> None:
        """Refuse mistakes of the technique's author that would else show when the model is written or run; the plan calls it once.

        Raises:
            TechniqueError: the mistake.
        """
        known = {part for family in CONVERTIBLE.values() for part in family.parts} | config.parts.keys()
        if unknown := [part for part in self.drops if part not in known]:
            raise TechniqueError(f"{self.name} drops {unknown[0]!r}, which is no part of a layer; the parts of {config.kind} are {', '.join(config.parts)}")
        kind = type(self)
        for place in self.places(config):
            if place == "scores" and not hasattr(self, "mix"):
                raise TechniqueError(f"{self.name} runs at scores without a mixer; its author has to derive it from Mixing and write `mix`")
            if place != "scores" and kind.forward is Replacement.forward:
                raise TechniqueError(f"{self.name} has no `forward`, which would run in place of {place}; its author has to write it")
            shapes, initial = self.parameters(config, place), self.initial_values(config, index, place)
            fitted = kind.values is not Replacement.values or (self.needs_calibration(config) and kind.fit is not Replacement.fit)
            self._check_values("initial_values", initial, {name: shapes[name] for name in shapes if name in initial or not fitted}, place)

    def _check_values(self, source: str, values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], place: str) -> None:
        """Refuse values that are not those of `parameters`.

        Raises:
            TechniqueError: one is missing, left over or of another shape.
        """
        if missing := [name for name in shapes if name not in values]:
            raise TechniqueError(f"{self.name} has a parameter {missing[0]!r} at {place}, and its `{source}` gives no value for it")
        if extra := [name for name in values if name not in shapes]:
            raise TechniqueError(f"{self.name} gives a value for {extra[0]!r} in `{source}`, and its `parameters` has none of that name at {place}")
        for name, shape in shapes.items():
            if tuple(values[name].shape) != tuple(shape):
                given, needed = (" x ".join(map(str, sizes)) or "a single number" for sizes in (values[name].shape, shape))
                raise TechniqueError(f"{self.name} has a parameter {name!r} at {place} that is {needed} by `parameters` and {given} by `{source}`")


Rows = Callable[[str, "Tensor | None"], "Tensor"]  # (name of a tensor, numbers or None) -> these rows of it, or all


class OuterReplacement(Placed):
    """A technique in place of the embedding table or the head: at `embed`, which also stands for a head that is tied to it, or at `head`.

    `outer` assigns its tensors (`embed.effconvert.NAME`) and deletes the table.
    """

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return the message for an unknown option `name`; for `--layers` with the reason."""
        return "this technique changes what is outside the layers; leave out --layers" if name == "layers" else super().unknown(name)

    def check(self, config: Config) -> None:
        """Refuse families that the technique does not fit, and models with a technique at that place already."""
        if config.encoder_decoder:
            raise ModelError(f"{config.kind} is an encoder-decoder, which reads its table in two places; give a decoder or an encoder")
        if wrong := [place for place in self.places(config) if place not in OUTSIDE]:
            raise TechniqueError(f"{self.name} runs at {wrong[0]!r}, which is not outside the layers; its author can choose from {', '.join(OUTSIDE)}")
        self.check_family(config)
        self.config(config)

    def config(self, config: Config) -> Config:
        """Record the technique at its places."""
        for place in self.places(config):
            config = config.with_replaced(Replaced(self.name, self.settings, place, (), self.dropped(config, place)))
        return config

    def dropped(self, config: Config, place: str) -> tuple[str, ...]:
        """Return the table itself."""
        return (place,)

    @abstractmethod
    def lookup(self, config: Config, place: str, read: Rows, tokens: Tensor) -> Tensor:
        """Return the rows [..., M] of the table at a place for token ids [...]."""

    @abstractmethod
    def logits(self, config: Config, place: str, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Return the table's products with hidden states [..., M]: [..., V]."""
