"""What every healing method is that goes layer by layer: a step that changes no architecture, and has a teacher."""

from __future__ import annotations  # what only types need is not imported: `--help` must not wait for torch

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from effconvert.errors import ModelError
from effconvert.surgery._surgery import Step

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model


class Healing(Step):
    """Bring a converted model's layers nearer to what the original's made of the same inputs."""

    teacher: str | None = Field(
        None,
        description="The original: folder, Hub id or .gguf file. In a recipe by default the model that it begins from.",
        json_schema_extra={"metavar": "MODEL"},
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Any model."""
        return "--teacher the model that it was made from"

    def check(self, config: Config) -> None:
        """Refuse nothing: what has to fit is teacher and student, see `rewrite`."""

    def is_exact(self, config: Config) -> bool:
        """Never: it is there to change what is computed."""
        return False

    def config(self, config: Config) -> Config:
        """Change nothing."""
        return config

    def needs_calibration(self, config: Config) -> bool:
        """Always."""
        return True

    def rewrite(self, model: Model) -> None:
        """Heal each layer towards those of the original that it stands for: its own, and those that were dropped after it."""
        starts = [layer.originals.start for layer in model.layers]
        stops = [*starts[1:], max(model.layers[-1].originals.stop, model.original.layers)]
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            raise ModelError("the layers stand in another order than in the original, or twice, so there is nothing that each could be healed towards")
        for layer, start, stop in zip(model.layers, starts, stops, strict=True):
            layer.later(partial(self._heal, originals=range(start, stop)))

    def _heal(self, layer: Layer, originals: range) -> None:
        for part in self.changes(layer, originals):
            if part in layer:
                layer[part] = layer[part]  # what will be written is known before what is in it
        if layer.activations:
            self.heal(layer, originals)

    @abstractmethod
    def changes(self, layer: Layer, originals: range) -> list[str]:
        """Name the parts of a layer that may change."""

    @abstractmethod
    def heal(self, layer: Layer, originals: range) -> None:
        """Change them; there are activations to look at."""
