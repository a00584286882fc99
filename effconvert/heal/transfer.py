"""Train new layers to imitate the ones they replace, layer by layer."""

from __future__ import annotations  # what only types need is not imported: `--help` must not wait for torch

from typing import TYPE_CHECKING

from pydantic import Field

from effconvert.checkpoint.replaced import OWN
from effconvert.errors import OptionError
from effconvert.heal._healing import Healing

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer

LEARN = {"attention": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down")}  # the projections at a place
WHOLE = {part: place for place, parts in LEARN.items() for part in parts} | {"scores": "attention"}  # what is taught of less than that
ORDER = ("attention", "ffn", "layer")


class Transfer(Healing):
    """Train what was put into layers to imitate the original, layer by layer.

    Gradients, a layer at a time: a mixer's parameters and the projections around it learn to give what the original's attention gives on the same
    inputs, which are those of the converted layers below. Where nothing of attention is left, all that the layer still has learns to give what the
    original's layer gives. Memory is that of one layer. What does not predict held-out windows of the text better than before stays as it is.
    MODEL is the converted model. As LoLCATs (Zhang et al. 2024, arXiv 2410.10254) transfers attention, layer after layer.

    \b
    Examples:
      effconvert transfer ./SmolLM2-135M-linear --teacher ./SmolLM2-135M -o ./transferred
      effconvert transfer --calibrate mine.txt --calibration-tokens 65536 ./lolcats --teacher HuggingFaceTB/SmolLM2-135M
    """

    epochs: int = Field(8, ge=1, le=1000, description="Times that each layer sees the text.")
    rate: float = Field(3e-3, gt=0, le=1, description="Highest learning rate of the projections (AdamW); that of the mixer's own parameters is ten times that.")

    def check(self, config: Config) -> None:
        """Refuse models without mixers."""
        if config.attention and not config.replaced:
            raise OptionError("none of its layers has a mixer, so there is nothing to teach; put one in first (effconvert linear, ...), or use refit")

    def notes(self, config: Config) -> str:
        """Say which layers."""
        count = len({index for record in config.replaced for index in record.layers}) if config.attention else config.layers
        return f"teaches the {count} layers that have a mixer"

    def changes(self, layer: Layer, originals: range) -> list[str]:
        """What learns at any place."""
        return list(dict.fromkeys(part for parts in self._lessons(layer).values() for part in parts))

    def heal(self, layer: Layer, originals: range) -> None:
        """See `_teaching`."""
        from effconvert.heal._teaching import teach

        said = []
        for place, parts in self._lessons(layer).items():
            towards = originals if place == "layer" else originals[:1]
            said += [done] if parts and (done := teach(layer, towards, place, parts, self.epochs, self.rate)) else []
        if said and layer.activations:
            layer.activations.note(layer.index, {when: sum(each[when] for each in said) / len(said) for when in said[0]})

    def _lessons(self, layer: Layer) -> dict[str, list[str]]:
        """Return the places of a layer that are taught, smaller ones first, and the parts that learn there: a technique's own, and what stands beside them."""
        from effconvert.surgery._placed import technique_of

        config = layer.config
        own: dict[str, list[str]] = {} if config.attention else {"layer": []}
        for record in config.replaced_in(layer.index):
            technique = technique_of(record)
            place = technique.taught_by or WHOLE.get(record.place, record.place)
            names = [f"{record.place}.{OWN}{name}" for name in technique.parameters(config, record.place) if name not in technique.frozen]
            own.setdefault(place if names or _beside(layer, place) else "layer", []).extend(names)  # the layer, where nothing at the place can learn
        return {place: [*own[place], *_beside(layer, place)] for place in ORDER if place in own}


def _beside(layer: Layer, place: str) -> list[str]:
    """Name the family's own parts at a place."""
    if place == "layer":
        return [part for part in layer if f".{OWN}" not in part]
    return [part for stem in LEARN[place] for part in (stem, f"{stem}.bias") if part in layer]
