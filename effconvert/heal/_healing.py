"""Base class of healing methods: steps that change weights layer by layer towards a teacher, and no architecture."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

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
    """Bring the outputs of a converted model's layers nearer to those of the original's layers on the same inputs."""

    teacher: str | None = Field(
        None,
        description="The original: folder, Hub id or .gguf file. Default in a recipe: the model that it begins from.",
        json_schema_extra={"metavar": "MODEL"},
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Any model."""
        return "--teacher the original model"

    def check(self, config: Config) -> None:
        """Refuse nothing: `rewrite` checks teacher and student against each other."""

    def is_exact(self, config: Config) -> bool:
        """Never: it changes what the model computes."""
        return False

    def config(self, config: Config) -> Config:
        """Change nothing."""
        return config

    def needs_calibration(self, config: Config) -> bool:
        """Always."""
        return True

    def needs_original(self, config: Config) -> bool:
        """Always."""
        return True

    def rewrite(self, model: Model) -> None:
        """Heal each layer towards the original's layers that it stands for: its own, and those dropped after it."""
        starts = [layer.originals.start for layer in model.layers]
        stops = [*starts[1:], max(model.layers[-1].originals.stop, model.original.layers)]
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            raise ModelError(
                "the layers are in another order than in the original, or repeated, so no original layer can be assigned to each; leave healing out"
            )
        for layer, start, stop in zip(model.layers, starts, stops, strict=True):
            layer.later(partial(self._heal, originals=range(start, stop)))

    def _heal(self, layer: Layer, originals: range) -> None:
        for part in self.changes(layer, originals):
            if part in layer:
                layer[part] = layer[part]  # marks it as changed, so that the plan knows before any number is computed
        if layer.activations:
            self.heal(layer, originals)

    @abstractmethod
    def changes(self, layer: Layer, originals: range) -> list[str]:
        """Name the parts of a layer that may change."""

    @abstractmethod
    def heal(self, layer: Layer, originals: range) -> None:
        """Change them; `layer.activations` is there."""
