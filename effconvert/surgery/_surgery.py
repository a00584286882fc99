"""What every technique is: frozen options, a refusal, a new config, and what happens inside a layer."""

from __future__ import annotations  # what only types need is not imported: `--help` must not wait for torch

from abc import abstractmethod
from typing import TYPE_CHECKING

from effconvert.options import Options

if TYPE_CHECKING:
    from effconvert.convert.config import Config
    from effconvert.convert.layer import Layer


class Surgery(Options):
    """A change of architecture. Subclasses add options as fields, and say these few things."""

    @property
    def name(self) -> str:
        """The command: ExpandKv in expand_kv.py is expand-kv."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @property
    def label(self) -> str:
        """The command and the options that have no default, for a folder's name: gqa-8."""
        chosen = [getattr(self, name) for name, field in type(self).model_fields.items() if field.is_required()]
        return "-".join([self.name, *map(str, chosen)])

    @property
    def recipe(self) -> dict[str, dict[str, object]]:
        """This surgery as a step of a recipe."""
        return {self.name: {key.replace("_", "-"): value for key, value in self.model_dump(mode="json").items()}}

    @classmethod
    @abstractmethod
    def suits(cls, config: Config) -> str:
        """Say in a few words which options this model allows.

        Raises:
            ModelError: none; the text says why.
        """

    @abstractmethod
    def check(self, config: Config) -> None:
        """Refuse what cannot be done with these options.

        Raises:
            OptionError: other options would do.
            ModelError: the model is not of a kind that this technique can change.
        """

    @abstractmethod
    def exact(self, config: Config) -> bool:
        """Whether the converted model must compute the same logits: then this is verified."""

    @abstractmethod
    def config(self, config: Config) -> Config:
        """Return the config of the converted model."""

    def layers(self, layers: list[Layer]) -> list[Layer]:
        """Return the layers of the converted model: fewer, in another order, or tied to each other; by default each changed for itself.

        Overridden by techniques that go across layers. What reads or assigns parts belongs into `Layer.later`: at most two layers fit in memory.
        """
        for layer in layers:
            layer.later(self.layer)
        return layers

    def layer(self, layer: Layer) -> None:
        """Change one layer: read parts, assign parts. Runs on the meta device first, so it must not look at values."""
