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


class Transfer(Healing):
    """Teach mixers to do what the attention did that they replace.

    Gradients, a layer at a time: the mixer's parameters and the projections around it learn to give what the original's attention gives on the same
    inputs, which are those of the converted layers below. Memory is that of one layer. What does not predict held-out windows of the text better than
    before stays as it is. MODEL is the converted model. As LoLCATs (Zhang et al. 2024, arXiv 2410.10254) transfers attention, layer after layer.

    \b
    Examples:
      effconvert transfer ./SmolLM2-135M-linear --teacher ./SmolLM2-135M -o ./transferred
      effconvert transfer --calibrate mine.txt --calibration-tokens 65536 ./lolcats --teacher HuggingFaceTB/SmolLM2-135M
    """

    epochs: int = Field(8, ge=1, le=1000, description="Times that each layer sees the text.")
    rate: float = Field(3e-3, gt=0, le=1, description="Highest learning rate of the projections (AdamW); that of the mixer's own parameters is ten times that.")

    def check(self, config: Config) -> None:
        """Refuse models without mixers."""
        if not config.replaced:
            raise OptionError("none of its layers has a mixer, so there is nothing to teach; put one in first (effconvert linear, ...), or use refit")

    def notes(self, config: Config) -> str:
        """Say which layers."""
        return f"teaches the {len({index for record in config.replaced for index in record.layers})} layers that have a mixer"

    def changes(self, layer: Layer, originals: range) -> list[str]:
        """The mixer's parameters, and the projections around it."""
        from effconvert.surgery._placed import technique_of

        own, records = [], layer.config.replaced_in(layer.index)
        for record in records:
            technique = technique_of(record)
            own += [f"{record.place}.{OWN}{name}" for name in technique.parameters(layer.config, record.place) if name not in technique.frozen]
        return own + [part for stem in ("q", "k", "v", "o") for part in (stem, f"{stem}.bias") if part in layer] if records else []

    def heal(self, layer: Layer, originals: range) -> None:
        """See `_teaching`."""
        if parts := self.changes(layer, originals):
            from effconvert.heal._teaching import teach

            teach(layer, originals[0], parts, self.epochs, self.rate)
