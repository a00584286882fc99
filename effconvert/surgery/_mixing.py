"""What a technique is that puts another mixer in place of softmax attention: options, new parameters, and the mixing itself."""
# B = batch, H = query heads, Hk = KV heads, T = tokens, D = head width.

from __future__ import annotations  # what only types need is not imported: `--help` must not wait for torch

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Layers, Layerwise, layers_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from effconvert.convert.config import Config
    from effconvert.convert.layer import Layer
    from effconvert.mixers._call import Call, Slots

KEPT = {"layers", "keep_softmax"}  # options that say where, and not what
BYTES = {"float32": 4, "bool": 1, "int64": 8}


class Mixing(Layerwise):
    """A technique with a mixer of its own. In one file are its options, its parameters, what it remembers and how it mixes.

    A converted model keeps the options in its config.json and the parameters beside the projections: `self_attn.mixer.NAME`.
    """

    encoders: ClassVar[str] = ""  # why encoders cannot have this mixer; empty: they can
    decoders: ClassVar[str] = ""  # likewise
    softcaps: ClassVar[bool] = False  # whether soft-capped scores are computed as such
    leaves_windows: ClassVar[bool] = False  # whether layers that see no more than a window stay as they are: these are linear in the length already
    frozen: ClassVar[tuple[str, ...]] = ()  # parameters that nothing trains

    keep_softmax: Layers = layers_field("Layers to leave as they are, written like --layers: 0,-1.")

    @abstractmethod
    def parameters(self, config: Config) -> Mapping[str, tuple[int, ...]]:
        """Name the mixer's new parameters in a layer, with their shapes."""

    def begin(self, config: Config, index: int) -> Mapping[str, Tensor]:
        """Return what they are before anything was fitted; the same on each call."""
        return {}

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what they are for this layer, after a look at what it computes; asked where `looks` says so."""
        return values

    def remembers(self, config: Config) -> Slots:
        """Name what has to be known of earlier tokens to go on, with the shapes for one sequence; empty for encoders."""
        return {}

    @abstractmethod
    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Return what each query mixes, [B, H, T, D]; after T tokens in any number of calls the same."""

    @classmethod
    def suits(cls, config: Config) -> str:
        """Any options, or a reason why none."""
        cls._fits(config)
        return " ".join(f"--{name.replace('_', '-')} {(field.json_schema_extra or {}).get('metavar', 'N')}" for name, field in cls._needed()) or "as it is"

    @classmethod
    def _needed(cls) -> list[tuple[str, Any]]:
        return [(name, field) for name, field in cls.model_fields.items() if field.is_required()]

    @classmethod
    def _fits(cls, config: Config) -> None:
        name = cls.__module__.rpartition(".")[2].replace("_", "-")
        if why := cls.decoders if config.family.decoder else cls.encoders:
            raise ModelError(f"{config.kind} is {'a decoder' if config.family.decoder else 'an encoder'}, and {name} {why}")
        if config.get("attn_logit_softcapping") and not cls.softcaps:
            raise ModelError(
                f"{config.kind} caps its scores (attn_logit_softcapping), which no feature map can follow, so {name} cannot take the place of its attention; "
                "streaming and linformer-causal can"
            )

    def check(self, config: Config) -> None:
        """Refuse layers that are not there, or have a mixer already, and models that this mixer cannot be in."""
        self._fits(config)
        chosen = self.chosen(config)
        if not chosen:
            raise OptionError("no layer is left to change: --layers names none, --keep-softmax all of them, or they have a window that is no longer")
        if taken := [index for index in sorted(chosen) if config.mixer(index)]:
            other = config.mixer(taken[0])
            raise OptionError(f"layer {taken[0]} has the mixer {other.name if other else ''} already; leave it out of --layers, or begin from the original")

    @property
    def softmax_tokens(self) -> int:
        """How many of the last tokens are attended to by softmax all the same: layers with a window of their own that is no longer stay as they are."""
        return 0

    def chosen(self, config: Config) -> set[int]:
        """Return the layers to change: not those that are kept, nor those with a window that has nothing to gain."""
        kept = self.named("keep_softmax", config) if self.keep_softmax else set()
        kept |= {index for index, own in enumerate(config.windows()) if own and (self.leaves_windows or own <= self.softmax_tokens)}
        return super().chosen(config) - kept

    def exact(self, config: Config) -> bool:
        """Only with options that say so: see the techniques."""
        return False

    @property
    def mixer(self) -> Self:
        """The same without what says where."""
        return type(self)(**self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the mixer, as config.json keeps them."""
        return self.model_dump(mode="json", exclude=KEPT)

    def config(self, config: Config) -> Config:
        """Put the mixer into the chosen layers."""
        return config.with_mixer(self.mixer, self.chosen(config))

    def layer(self, layer: Layer) -> None:
        """Add the new parameters, as they begin or as they are fitted."""
        import torch

        shapes = self.parameters(layer.config)
        if layer.shapes_only or (self.looks(layer.config) and not layer.walk):
            values: Mapping[str, Tensor] = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        else:
            values = self.begin(layer.config, layer.index)
            values = self.fit(layer, values) if layer.walk and self.looks(layer.config) else values
        for name in shapes:
            layer[f"mixer.{name}"] = values[name]

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes that one sequence of `context` tokens takes in a layer's cache: the same however long it is, where a technique does not grow."""
        return sum(math.prod(shape) * BYTES.get(kind, itemsize) for shape, kind in self.remembers(config).values())

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return the bytes that a token adds to that, on average over a long text."""
        return 0.0
