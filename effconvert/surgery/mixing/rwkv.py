"""RWKV's time mixing, a recurrence whose state has a fixed size."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Field

from effconvert.errors import ModelError
from effconvert.surgery._replacement import PlaceContext
from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing import _channel_mix, _rwkv4, _rwkv7
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.surgery.mixing._call import Call, Slots


class Version(Protocol):
    """The maths of a version: a module of this folder, with functions as `Mixing` has them."""

    def parameters(self, config: Config) -> Mapping[str, tuple[int, ...]]:
        """Name the parameters."""

    def initial_values(self, config: Config, index: int) -> Mapping[str, Tensor]:
        """Return their values without calibration."""

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return their values with calibration."""

    def cache_slots(self, config: Config) -> Slots:
        """Name what is kept of earlier tokens."""

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Return the output of each query."""


def _word(value: Any) -> Any:
    """Return a number as it is typed: recipes have numbers, the command line has words."""
    return str(value) if isinstance(value, int) else value


class Rwkv(Mixing):
    """RWKV's time mixing, a recurrence whose state has a fixed size.

    --version 7: S <- diag(w) S - (a * c) (c S) + k v, o = r S, with a decay w and a rate a for each channel, c = k at length 1; then a norm, a bonus for
    the own token and a gate. Decays begin as each KV head's attention falls with the distance, outputs at their original size. As in RADLADS (Goldstein
    et al. 2025, arXiv 2505.03005) queries are receptances, and keys, values, outputs, norms and FFN stay. Peng et al. 2025, arXiv 2503.14456.
    --version 4: a mean of earlier values, weighted by exp(k - w distance) in each channel, times a gate. No query chooses what it sees. Keys and decays
    begin as they come closest to the attention, by least squares. Peng et al. 2023, arXiv 2305.13048.
    --channel-mix: the FFN too becomes RWKV's, value relu(key x)^2, with a receptance in version 4, for each of whose neurons two stand: a product g u is a
    difference of squares, and least squares mend the rest. It begins without a shift and loses little by itself; it is no smaller than the FFN.
    Both see the token before (token shift), and have to be trained again. transformers' rwkv has no class for the result: its norms, FFN and biases are
    RWKV's own. On a CPU no version is faster than softmax up to 2,048 tokens; at 16,384 version 7 reads 2.6 and version 4 1.8 times as fast.

    \b
    Examples:
      effconvert rwkv --layers 1-29/2 ./SmolLM2-135M -o ./rwkv
      effconvert rwkv --version 4 --channel-mix --transfer ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("decoders", saves="KV cache: a state of fixed size", native="", exact="")

    shifts = True
    no_encoders = "goes through a text once, from its first token; encoders see later tokens too: linear and performer are for them"

    version: Annotated[Literal["4", "7"], BeforeValidator(_word)] = Field("7", description="RWKV-4, or RWKV-7 with a matrix for each KV head.")

    channel_mix: bool = Field(False, description="RWKV's channel mixing in place of the FFN too: it begins as the FFN, with twice the neurons.")

    def places(self, config: Config) -> tuple[str, ...]:
        """Between the projections, and with --channel-mix the FFN."""
        return ("scores", "ffn") if self.channel_mix else ("scores",)

    def dropped(self, config: Config, place: str) -> tuple[str, ...]:
        """Return the FFN's own projections."""
        return tuple(part for part in ("gate", "up", "down") if part in config.parts) if place == "ffn" else ()

    def check(self, config: Config) -> None:
        """Refuse families without a module for their FFN, where that is to go."""
        if self.channel_mix and config.family.experts_key:
            raise ModelError(f"{config.kind} has experts in place of an FFN, which channel mixing cannot take the place of; leave out --channel-mix")
        super().check(config)
        for place in self.places(config):
            config.place(place)

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Decays, shifts, and what the tokens' weights depend on."""
        return _channel_mix.parameters(config, self.version == "4") if place == "ffn" else self._maths.parameters(config)

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """No shift, no bonus and an open gate; channel mixing begins with calibration alone."""
        return {} if place == "ffn" else self._maths.initial_values(config, index)

    def needs_calibration(self, config: Config) -> bool:
        """Decays are fitted."""
        return True

    def fit(self, layer: Layer, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Fit what can be read off the attention."""
        return self._maths.fit(layer, values)

    def values(self, layer: Layer, place: str) -> Mapping[str, Tensor]:
        """Fit channel mixing to the FFN; see `fit`."""
        if place != "ffn" or layer.shapes_only or not layer.activations:
            return super().values(layer, place)
        return _channel_mix.fitted(layer, self.version == "4")

    def layer(self, layer: Layer) -> None:
        """Add the new parameters, and delete the FFN that channel mixing replaces."""
        super().layer(layer)
        for part in [part for place in self.places(layer.config) for part in self.dropped(layer.config, place)]:
            for name in (part, f"{part}.bias"):
                if name in layer:
                    del layer[name]

    def fit_bytes(self, config: Config) -> int:
        """With --channel-mix the moments of twice the neurons, and what solving takes."""
        return 4 * 8 * (2 * config.ffn) ** 2 if self.channel_mix else 0

    def cache_slots(self, config: Config) -> Slots:
        """The state, and the last token."""
        slots = self._maths.cache_slots(config)
        return {**slots, _channel_mix.LAST: ((config.hidden,), "model")} if self.channel_mix else slots

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Mix tokens over time."""
        return self._maths.mix(weights, call)

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Mix channels in place of the FFN."""
        assert context.call
        return _channel_mix.mix(weights, context.call)

    @property
    def _maths(self) -> Version:
        if self.version == "4":
            return _rwkv4
        return _rwkv7
