"""What every step of a conversion is: frozen options, a refusal, a new config, and what happens to the model."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self

from pydantic import BeforeValidator, Field

from effconvert.errors import OptionError
from effconvert.options import Options

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model
    from effconvert.checkpoint.outer import Outer


class Forward(Protocol):
    """The model as the steps before leave it, run on the calibration text with one layer in memory: `effconvert.heal._forward.Forward`.

    States are [B, T, M] for each batch of texts.
    """

    @property
    def config(self) -> Config:
        """The shape of the model."""

    def begin(self, tokens: int) -> list[Tensor]:
        """Return what arrives at the first layer, for about so many tokens from all over the text."""

    def layer(self, index: int, states: Sequence[Tensor], without: str = "") -> list[Tensor]:
        """Return what a layer makes of what arrives, as it is or without its attention or ffn."""

    def divergence(self, reference: Sequence[Tensor], states: Sequence[Tensor]) -> float:
        """Return KL(reference || states) in nats a token, of the predictions from two models' last hidden states."""

    def bar(self, steps: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show whoever waits how many of so many steps are done: those that the function which this gives is told."""


class Step(Options):
    """A step of a conversion: a surgery or a healing method. Subclasses add options as fields, and say these few things."""

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
    def allowed_options(cls, config: Config) -> str:
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
    def is_exact(self, config: Config) -> bool:
        """Whether the converted model must compute the same logits: then this is verified."""

    @abstractmethod
    def config(self, config: Config) -> Config:
        """Return the config of the converted model."""

    @property
    def undecided(self) -> bool:
        """Whether these options leave something open, which `decide` chooses."""
        return False

    def decide(self, forward: Forward) -> Self:
        """Return this step with options that leave nothing open: asked before anything is planned, and what it chooses is what the recipe says then."""
        return self

    def needs_calibration(self, config: Config) -> bool:
        """Whether `layer` looks at what the model computes on a text (`Layer.activations`): then it is run, layer by layer, before anything is written."""
        return False

    def notes(self, config: Config) -> str:
        """Say what is different for this model, where something is; one sentence of the plan."""
        return ""

    def rewrite(self, model: Model) -> None:
        """Change the model: its list of layers, or what is in them and outside them.

        What reads or assigns parts belongs into `Parts.later`: at most two layers fit in memory. Runs on the meta device first, where there are shapes only.
        """


class Surgery(Step):
    """A change of architecture."""

    def rewrite(self, model: Model) -> None:
        """Change each layer for itself, and what is outside; techniques that go across layers (dropping, sharing) override this."""
        for layer in model.layers:
            layer.later(self.layer)
        model.outer.later(self.outer)

    def layer(self, layer: Layer) -> None:
        """Change one layer: read parts, assign parts."""

    def outer(self, outer: Outer) -> None:
        """Change what is outside the layers: read parts, assign parts."""

    @classmethod
    def unknown(cls, name: str) -> str:
        """Say that there is no option `name`, and of `--layers` why."""
        if name == "layers":
            return "this technique changes all layers alike, since config.json says it once for all of them; leave out --layers"
        return super().unknown(name)


RANGE = r"-?\d+(-\d+(/\d+)?)?"
Layers = Annotated[str | None, BeforeValidator(lambda given: str(given) if type(given) is int else given)]


def layers_field(description: str) -> Any:
    """Make an option that names layers."""
    return Field(None, description=description, pattern=rf"^{RANGE}(,{RANGE})*$", json_schema_extra={"metavar": "LAYERS"})


class Layerwise(Surgery):
    """A surgery that can be confined to some of the layers; the others stay as they are."""

    layers: Layers = layers_field("Layers to change, from 0, negative from the end, /n for each n-th: 0-11, or 0,2,-1, or 1-29/2. Default: all.")

    def chosen(self, config: Config) -> set[int]:
        """Return the layers to change.

        Raises:
            OptionError: there is no such layer, or a range runs backwards.
        """
        return set(range(config.layers)) if self.layers is None else self.named("layers", config)

    def named(self, option: str, config: Config) -> set[int]:
        """Return the layers that an option names.

        Raises:
            OptionError: as `chosen`.
        """
        found: set[int] = set()
        given = str(getattr(self, option))
        for first, last, step in re.findall(r"(-?\d+)(?:-(\d+)(?:/(\d+))?)?", given):
            start = int(first) + (config.layers if int(first) < 0 else 0)
            stop = int(last) if last else start
            if not 0 <= start <= stop < config.layers or step == "0":
                spelt = option.replace("_", "-")
                raise OptionError(f"--{spelt} {given} names what is no layer of this model: it has {config.layers}, from 0 to {config.layers - 1}")
            found |= set(range(start, stop + 1, int(step or 1)))
        return found

    def check(self, config: Config) -> None:
        """Refuse layers that are not there."""
        self.chosen(config)

    def rewrite(self, model: Model) -> None:
        """Change the chosen layers, each for itself, and what is outside."""
        chosen = self.chosen(model.config)
        for index, layer in enumerate(model.layers):
            if index in chosen:
                layer.later(self.layer)
        model.outer.later(self.outer)
