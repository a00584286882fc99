"""Base classes of conversion steps: frozen options, checks, a new config, and the change of the model."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, cast, get_args, get_origin

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from effconvert.errors import OptionError
from effconvert.options import Options, as_typed

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model
    from effconvert.checkpoint.outer import Outer


class ForwardProtocol(Protocol):
    """Runs the model after the steps before, on the calibration text with one layer in memory: `effconvert.heal._forward.Forward`.

    States are [B, T, M] for each batch of texts.
    """

    @property
    def config(self) -> Config:
        """The shape of the model."""

    def begin(self, tokens: int, twice: bool = False) -> list[Tensor]:
        """Return the inputs of the first layer for about `tokens` tokens, spread over the text; with `twice` the first half of each text is read twice."""

    def layer(self, index: int, states: Sequence[Tensor], without: str = "", weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return a layer's outputs for the inputs `states`, whole or without its attention or ffn, or with other `weights` of some parts."""

    def weights(self, index: int, part: str) -> Tensor:
        """Return the matrix of a projection of a layer, [out, in] in float32."""

    def capture(self, index: int, states: Sequence[Tensor], part: str) -> Iterator[Any]:
        """Run a layer up to a part, and yield its inputs and outputs for each batch."""

    def parts(self, index: int) -> Layer:
        """Return the tensors of a layer."""

    @property
    def outer(self) -> Outer:
        """The tensors outside the layers."""

    @property
    def ids(self) -> Sequence[Tensor]:
        """The calibration text, [B, T] for each batch."""

    @property
    def counts(self) -> Tensor:
        """How often each token occurs in it, [V]."""

    def table_rows(self, place: str, tokens: Tensor) -> Tensor:
        """Return rows of the table at `embed` or `head`, [N, M] in float32."""

    def head_inputs(self) -> Iterator[Tensor]:
        """Run the model on the whole calibration text, and yield what its head gets, [B, T, M] for each batch."""

    def divergence(self, reference: Sequence[Tensor], states: Sequence[Tensor]) -> float:
        """Return KL(reference || states) in nats a token, of the predictions from two models' last hidden states."""

    def bar(self, steps: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a progress bar for `steps` steps; yields a function that takes how many more are done."""


@dataclass(frozen=True)
class Facts:
    """What `effconvert list` says of a step, in a few words each."""

    applies: str  # to which models
    saves: str  # what becomes smaller or cheaper
    native: str  # the class of transformers that opens the result; "" if that needs effconvert
    exact: str  # the options with which no logit changes; "" if there are none


class Step(Options):
    """A step of a conversion: a surgery or a healing method. Subclasses add options as fields, and implement these methods."""

    facts: ClassVar[Facts | None] = None
    transfer_first: ClassVar[bool] = False  # whether what it puts in wants training before a refit, where both are asked for
    comes_last: ClassVar[bool] = False  # whether no other step may follow it

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
        """This step as a recipe spells it."""
        return {self.name: {key.replace("_", "-"): value for key, value in self.model_dump(mode="json").items()}}

    def stands_for(self, config: Config) -> tuple[Step, ...]:
        """Return what a conversion does and records for it: itself, or the steps that it stands for. `config` is that of the model before any step.

        Raises:
            OptionError: the options do not fit that model.
        """
        return (self,)

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Return the options that this model allows, in a few words for `inspect`. Default: those that have to be given, "as it is" if there are none.

        Raises:
            ModelError: the step cannot be done to this model; the text says why.
        """
        needed = [(name, field) for name, field in cls.model_fields.items() if field.is_required()]
        if not needed:
            with suppress(OptionError):  # other options than the defaults would do
                cls().check(config)
        metavars = ((name, (cast(Any, field.json_schema_extra) or {}).get("metavar") or _choices(field) or "N") for name, field in needed)
        return " ".join(f"--{name.replace('_', '-')} {metavar}" for name, metavar in metavars) or "as it is"

    @abstractmethod
    def check(self, config: Config) -> None:
        """Refuse options or models that do not fit.

        Raises:
            OptionError: other options would fit.
            ModelError: the model is not of a kind that this technique can change.
        """

    @abstractmethod
    def is_exact(self, config: Config) -> bool:
        """Whether the converted model must compute the same logits; verification checks it."""

    @abstractmethod
    def config(self, config: Config) -> Config:
        """Return the config of the converted model."""

    @property
    def undecided(self) -> bool:
        """Whether these options leave a choice to `decide`."""
        return False

    @property
    def rule(self) -> str:
        """By what `decide` chooses, and on how much text, in a few words."""
        return ""

    def decide(self, forward: ForwardProtocol) -> Self:
        """Return this step with every option decided; called before the plan, and the recipe records the result."""
        return self

    def needs_calibration(self, config: Config) -> bool:
        """Whether `layer` needs the model's activations on a text (`Layer.activations`): then the model is calibrated before anything is written."""
        return False

    @property
    def any_width(self) -> bool:
        """Whether an original may have another hidden width than the model."""
        return False

    def needs_survey(self, config: Config) -> bool:
        """Whether `outer` needs what `survey` returns (`Outer.survey`)."""
        return False

    def survey(self, forward: ForwardProtocol) -> Mapping[str, Tensor]:
        """Return what `outer` needs to know of the whole model before this step, as it runs on the calibration text."""
        return {}

    def needs_original(self, config: Config) -> bool:
        """Whether it runs the layers of the original on the inputs of the converted ones."""
        return False

    @property
    def keeps_attention(self) -> bool:
        """Whether it keeps the attention of all calibration tokens, [H, T, T] for each text."""
        return False

    def fit_bytes(self, config: Config) -> int:
        """Estimate the bytes of memory that fitting a layer takes beside what every calibration takes."""
        return 0

    def reads_ahead(self, config: Config) -> bool:
        """Whether the change of a layer reads the weights of later layers."""
        return False

    def notes(self, config: Config) -> str:
        """Return a sentence for the plan about what is special for this model, or ""."""
        return ""

    def rewrite(self, model: Model) -> None:
        """Change the model: its list of layers, or the parts in them and outside them.

        Read and assign parts in functions given to `Parts.later`: at most two layers fit in memory. Runs first on the meta device, where there are only shapes.
        """


def _choices(field: FieldInfo) -> str:
    """Return the words that an option can be, if it is one of some."""
    return " or ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""


class Surgery(Step):
    """A change of architecture."""

    def rewrite(self, model: Model) -> None:
        """Change each layer by itself, and the parts outside; techniques across layers (dropping, sharing) override this."""
        for layer in model.layers:
            layer.later(self.layer)
        model.outer.later(self.outer)

    def layer(self, layer: Layer) -> None:
        """Change one layer: read parts, assign parts."""

    def outer(self, outer: Outer) -> None:
        """Change the parts outside the layers: read parts, assign parts."""

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return the message for an unknown option `name`; for `--layers` with the reason."""
        if name == "layers":
            return "this technique changes all layers alike, since config.json says it once for all of them; leave out --layers"
        return super().unknown(name)


RANGE = r"-?\d+(-\d+(/\d+)?)?"
Layers = Annotated[str | None, BeforeValidator(lambda value: as_typed(value) if isinstance(value, int | list | tuple) else value)]


def layers_field(description: str) -> Any:
    """Make an option that names layers."""
    return Field(None, description=description, pattern=rf"^{RANGE}(,{RANGE})*$", json_schema_extra={"metavar": "LAYERS"})


class Layerwise(Surgery):
    """A surgery that can be confined to some of the layers; the others stay as they are."""

    layers: Layers = layers_field("Layers to change, from 0, negative from the end, /n for each n-th: 0-11, or 0,2,-1, or 1-29/2. Default: all.")

    def chosen(self, config: Config) -> set[int]:
        """Return the layers to change.

        Raises:
            OptionError: a layer does not exist, or a range runs backwards.
        """
        return set(range(config.layers)) if self.layers is None else self.named_layers("layers", config)

    def named_layers(self, option: str, config: Config) -> set[int]:
        """Return the layers that an option names.

        Raises:
            OptionError: as `chosen`.
        """
        layers: set[int] = set()
        value = str(getattr(self, option))
        for first, last, step in re.findall(r"(-?\d+)(?:-(\d+)(?:/(\d+))?)?", value):
            start = int(first) + (config.layers if int(first) < 0 else 0)
            stop = int(last) if last else start
            if not 0 <= start <= stop < config.layers or step == "0":
                flag = option.replace("_", "-")
                raise OptionError(f"--{flag} {value} names what is no layer of this model: it has {config.layers}, from 0 to {config.layers - 1}")
            layers |= set(range(start, stop + 1, int(step or 1)))
        return layers

    def check(self, config: Config) -> None:
        """Refuse layers that do not exist."""
        self.chosen(config)

    def rewrite(self, model: Model) -> None:
        """Change the chosen layers, each by itself, and the parts outside."""
        chosen = self.chosen(model.config)
        for index, layer in enumerate(model.layers):
            if index in chosen:
                layer.later(self.layer)
        model.outer.later(self.outer)
