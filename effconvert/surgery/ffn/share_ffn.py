"""Let layers share one FFN."""
# B = texts, T = tokens, M = hidden width, F = neurons of a layer's FFN, W = neurons of the shared one.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.checkpoint.replaced import OWN, Replaced, overlap
from effconvert.checkpoint.shared import SHARES
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._replacement import PlaceContext, Replacement
from effconvert.surgery._surgery import Facts, Layers, layers_field

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model


class ShareFfn(Replacement):
    """Let layers share one FFN.

    The neurons of all these layers are pooled. Those that write most on the calibration text stay, and one output projection is fitted to what each
    layer's own FFN gives. Each layer keeps a gain for each neuron and a shift of the output, which are few numbers and most of the quality (--no-gains
    leaves them out). The FFN is stored once, on disk and in memory; a token computes as much as before. --refit then fits the outputs of attention to
    the original's hidden states. The result needs effconvert. On a decoder it cost as much as dropped layers, which also save
    time and cache: take prune-layers first. Of a model with an encoder and a decoder (bart, marian) the encoder's layers share; --drop-decoder drops the
    decoder's FFNs, as the paper does, for a model that is trained afterwards.
    Pessoa Pires et al. 2023, arXiv 2309.01826 (One Wide Feedforward is All You Need); docs/share-ffn.md has measurements.

    \b
    Examples:
      effconvert share-ffn ./all-MiniLM-L6-v2
      effconvert share-ffn --width 4608 ./all-MiniLM-L6-v2 -o ./wide
      effconvert share-ffn --drop-decoder ./opus-mt-en-de
      effconvert share-ffn --layers 11-18 --group 2 --refit ./SmolLM2-135M
    """

    by_token: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts("models with an FFN whose output projection is a module", saves="parameters", native="", exact="")

    where: ClassVar[frozenset[str]] = frozenset({"layers", "width", "group", "drop_decoder"})
    layers: Layers = layers_field("Layers that share, from 0, negative from the end: 10-17, or 0,1. Default: all.")
    width: int | None = Field(
        None, ge=1, description="Neurons of the shared FFN. Default: as many as each layer's own has.", json_schema_extra={"metavar": "W"}
    )
    group: int | None = Field(
        None, ge=2, description="Have each N of these layers share, in order: 2 makes pairs. Default: all share one.", json_schema_extra={"metavar": "N"}
    )
    gains: bool = Field(True, description="Give each layer a gain for each neuron and a shift of the output.")
    drop_decoder: bool = Field(
        False, description="Of a model with an encoder and a decoder, drop the decoder's FFNs. Nothing makes up for them before the model is trained."
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Any layers; another width where the family's class can have one."""
        cls().check(config)
        try:
            config.with_ffn(config.ffn)
        except ModelError:
            return "as it is"
        return f"--width W, up to {config.layers * config.ffn}{'; --drop-decoder' if config.encoder_decoder and not config.decoder_lacks else ''}"

    def places(self, config: Config) -> tuple[str, ...]:
        """Run at the output projection, for gains."""
        return ("down",) if self.gains else ()

    def check(self, config: Config) -> None:
        """Refuse layers without an FFN of their own, a width that not all layers would have, and families that cannot share."""
        if config.experts:
            raise ModelError(f"{config.kind} has experts in place of an FFN, which stay as they are; give a model without")
        if config.layers < 2:
            raise ModelError(f"this {config.kind} has a single layer, which shares with no other; give a deeper model")
        super().check(config)
        groups = self._groups(config)
        if self.width and self.width > (most := config.ffn * min(map(len, groups))):
            raise OptionError(f"--width {self.width} is more than the {most} neurons that these layers have together; give at most that")
        if self.width not in (None, config.ffn) and sum(map(len, groups)) < config.layers:
            raise OptionError(f"config.json has one width for all layers, and --layers leaves some out; leave out --layers, or --width {self.width}")

    def is_exact(self, config: Config) -> bool:
        """Never."""
        return False

    def config(self, config: Config) -> Config:
        """Record which layers share an FFN, its width, the gains, and that a decoder has no FFNs."""
        config = config.without_decoder_ffn() if self.drop_decoder else config
        for group in self._groups(config):
            config = config.with_shared("ffn", group)
        members = tuple(sorted(self.chosen(config)))
        for layer in members:
            if technique := next((record for record in config.replaced_in(layer) if overlap(record.place, "ffn")), None):
                raise OptionError(f"layer {layer} has {technique.technique} in place of its {technique.place} already; leave it out of --layers")
            if "ffn" in config.skips(layer):
                raise OptionError(f"layer {layer} has no FFN to share; leave it out of --layers")
        config = config if self.width is None else config.with_ffn(self.width)
        return config.with_replaced(Replaced(self.name, self.settings, "down", members)) if self.gains else config

    def needs_calibration(self, config: Config) -> bool:
        """Always."""
        return True

    def reads_ahead(self, config: Config) -> bool:
        """To the last layer that shares."""
        return True

    def fit_bytes(self, config: Config) -> int:
        """Some matrices of all pooled neurons in float64."""
        from effconvert.surgery.ffn._common import SPARE

        return 7 * 8 * (self._width(config) + min(SPARE, (config.layers - 1) * config.ffn)) ** 2

    def notes(self, config: Config) -> str:
        """Say that decoders are not what the paper shows, and what it takes to drop a decoder's FFNs."""
        shown = "that one FFN is enough was shown for encoders and translation models, trained as such"
        rest = "on a decoder dropped layers cost as much, and save time and cache (docs/share-ffn.md)" if config.decoder else "train it further"
        dropped = "; the decoder's FFNs go, and nothing makes up for them, not refit nor transfer: it writes nothing sensible before it is trained"
        return f"{shown}; {rest}{dropped if self.drop_decoder else ''}"

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """A gain for each neuron, [W], and a shift of the output, [M]."""
        return {"gain": (self._width(config),), "shift": (config.hidden,)} if self.gains else {}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Those that change nothing."""
        import torch

        return {"gain": torch.ones(self._width(config)), "shift": torch.zeros(config.hidden)}

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Scale the neurons' values, [B, T, W], and shift the output of the shared projection."""
        return context.original(hidden * weights["gain"]) + weights["shift"]

    def rewrite(self, model: Model) -> None:
        """Fit the shared FFN where the first layer of a group is converted, with what each has of its own. Drop the decoder's FFNs."""
        if self.drop_decoder:
            lacking = model.config.without_decoder_ffn().decoder_lacks
            gone = tuple(f".{module}.{name}" for module in lacking for name in ("weight", "bias"))
            for part in [part for part in model.outer if part.startswith("decoder.layers.") and part.endswith(gone)]:
                del model.outer[part]
        for group in self._groups(model.config):
            own: dict[int, dict[str, Tensor]] = {}
            between = model.layers[group[0] : group[-1] + 1]
            for index in group:
                layer = model.layers[index]
                if index == group[0]:
                    layer.later(partial(self._fit, between=between, members=group, own=own))
                else:
                    layer.share(between[0], "ffn")
                layer.later(partial(self._give_own, own=own))

    def _give_own(self, layer: Layer, own: dict[int, dict[str, Tensor]]) -> None:
        for name, shape in self.parameters(layer.config).items():
            part = f"down.{OWN}{name}"
            layer.defer(part, shape, partial(lambda index, part: own[index][part], layer.index, part))

    def _width(self, config: Config) -> int:
        return self.width or config.ffn

    def _groups(self, config: Config) -> list[list[int]]:
        """Return the layers that share, by FFN."""
        members = sorted(self.chosen(config))
        size = self.group or max(2, len(members))
        groups = [members[start : start + size] for start in range(0, len(members), size)]
        if not members or len(groups[-1]) < 2:
            raise OptionError(f"layer {members[-1] if members else '?'} shares with no other; name two layers or more for each FFN")
        return groups

    def _fit(self, layer: Layer, between: Sequence[Layer], members: Sequence[int], own: dict[int, dict[str, Tensor]]) -> None:
        import torch

        width = self._width(layer.config)
        for part in [part for part in layer if part.removesuffix(".bias") in (SHARES["ffn"] or ())]:
            shape = list(layer[part].shape)
            if part != "down.bias":
                shape[-1 if part == "down" else 0] = width
            if not layer.activations:
                layer[part] = torch.empty(shape, device="meta" if layer.shapes_only else "cpu")
        if layer.activations:
            from effconvert.surgery.ffn._common import shared_ffn

            shared = shared_ffn(between, members, width, self.config(layer.config), self.gains)
            own |= shared.own
            for part, tensor in shared.parts.items():
                layer[part] = tensor
