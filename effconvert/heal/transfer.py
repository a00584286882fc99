"""Train new layers to imitate the ones they replace, layer by layer."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

from pydantic import Field

from effconvert.checkpoint.replaced import OWN
from effconvert.errors import OptionError
from effconvert.heal._healing import Healing

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model

PROJECTIONS = {"attention": ("q", "k", "v", "kv_a", "kv_b", "o"), "ffn": ("gate", "up", "down")}  # the projections at a place
LARGER_PLACE = {part: place for place, parts in PROJECTIONS.items() for part in parts} | {"scores": "attention"}  # the place that is trained for a smaller one
ORDER = ("attention", "ffn", "layer")


class Transfer(Healing):
    """Train new layers to imitate the ones they replace, layer by layer.

    Gradient descent on one layer at a time, in the memory of one layer. A mixer's parameters and the projections around it are trained to reproduce
    the output of the original's attention; the inputs are the output of the converted layers below. A layer without any attention is trained as a
    whole, to reproduce the output of the original's layer. Attention is also trained where its matrices have other shapes than the original's (gqa, mla),
    and so are FFNs (narrow): best after a refit. Where RoPE is in place of a position table, attention is trained in all
    layers, towards the original on its own inputs. A change that does not improve held-out windows is not kept. MODEL is the converted model. The method
    is the attention transfer of LoLCATs (Zhang et al. 2024, arXiv 2410.10254).

    \b
    Examples:
      effconvert transfer ./SmolLM2-135M-linear --teacher ./SmolLM2-135M -o ./transferred
      effconvert transfer --calibrate mine.txt --calibration-tokens 65536 ./lolcats --teacher HuggingFaceTB/SmolLM2-135M
    """

    epochs: int = Field(8, ge=1, le=1000, description="Passes over the text for each layer.")
    rate: float = Field(
        6e-3,
        gt=0,
        le=1,
        description="Highest learning rate (AdamW) of projections of up to 256 inputs where they compute nothing right; it falls with the root of the relative "
        "error, and with more inputs. The mixer's own parameters get ten times that.",
    )

    def notes(self, config: Config) -> str:
        """Say which layers, and what is in them."""
        from effconvert.surgery._placed import unchunked

        records = unchunked(config.plain_outside).replaced
        if not records and config.attention:
            return "trains attention and FFNs where they differ from the original's"
        if not records:
            return f"trains the {config.layers} layers, which have no attention"
        count = len({index for record in records for index in record.layers}) if config.attention else config.layers
        kinds = dict.fromkeys("a mixer" if record.place == "scores" else f"{record.technique} in place of their {record.place}" for record in records)
        return f"trains the {count} layers that have {' or '.join(kinds)}, and what else has other shapes than the original's"

    def rewrite(self, model: Model) -> None:
        """Refuse models whose layers are the original's."""
        from effconvert.surgery._placed import unchunked

        if not unchunked(model.config.plain_outside).replaced and not any(map(_places_that_differ, model.layers)):
            raise OptionError(
                "its attention and FFNs have the shapes of the original's, or are experts, so there is nothing that transfer trains; take refit or distill, or "
                "begin with a technique that changes attention (effconvert gqa, linear, ...)"
            )
        super().rewrite(model)

    def changes(self, layer: Layer, originals: range) -> list[str]:
        """The parts that are trained at any place."""
        return list(dict.fromkeys(part for parts in self._trainable_parts(layer).values() for part in parts))

    def heal(self, layer: Layer, originals: range) -> None:
        """See `_training`."""
        from effconvert.heal._training import train

        errors = []
        for place, parts in self._trainable_parts(layer).items():
            targets = originals if place == "layer" else originals[:1]
            errors += [result] if parts and (result := train(layer, targets, place, parts, self.epochs, self.rate)) else []
        if errors and layer.activations:
            layer.activations.note(layer.index, {when: sum(error[when] for error in errors) / len(errors) for when in errors[0]})

    def _trainable_parts(self, layer: Layer) -> dict[str, list[str]]:
        """Return the places of a layer that are trained, smaller ones first, with their parts: a technique's own, and the family's beside them."""
        from effconvert.surgery._placed import technique_of, unchunked

        config = unchunked(layer.config)
        own: dict[str, list[str]] = {place: [] for place in _places_that_differ(layer)}
        for record in config.replaced_in(layer.index):
            technique = technique_of(record)
            place = technique.transfer_place or LARGER_PLACE.get(record.place, record.place)
            fixed = {*technique.frozen, *technique.whole_numbers}
            names = [f"{record.place}.{OWN}{name}" for name in technique.parameters(config, record.place) if name not in fixed]
            own.setdefault(place if names or _family_parts(layer, place) else "layer", []).extend(names)  # the layer, where nothing at the place is trainable
        return {place: [*own[place], *_family_parts(layer, place)] for place in ORDER if place in own}


def _places_that_differ(layer: Layer) -> list[str]:
    """Return the places where the family's own matrices have other shapes than the original's, or read other inputs; the layer, where nothing attends."""
    config, original = layer.config, layer.teacher
    if not config.attention:
        return ["layer"]
    places = ["attention"] if config.lacks_table_of(original) else []
    for place, parts in PROJECTIONS.items():
        mine, theirs = ({part: each.matrices[part] for part in parts if part in each.parts} for each in (config, original))
        places += [place] if mine != theirs and not all(config.shares(layer.index, part) for part in mine) else []
    return places


def _family_parts(layer: Layer, place: str) -> list[str]:
    """Name the family's own parts at a place, but those that the layer shares with others."""
    parts = [part for part in layer if f".{OWN}" not in part] if place == "layer" else [name for stem in PROJECTIONS[place] for name in (stem, f"{stem}.bias")]
    return [part for part in parts if part in layer and not layer.config.shares(layer.index, part)]
