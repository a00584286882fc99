"""Drop whole layers, or their attention or MLP alone."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections import deque
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.checkpoint.replaced import overlap
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Facts, Layers, Layerwise, layers_field

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model
    from effconvert.surgery._surgery import ForwardProtocol

    States = Sequence[Tensor]  # hidden states between two layers, [B, T, M] for each batch of texts

TOKENS = 4096  # of the calibration text, for the choice
LEAST = 2  # layers that must stay
PLACE = {"attention": "attention", "mlp": "ffn"}


class PruneLayers(Layerwise):
    """Drop whole layers, or their attention or MLP alone.

    A model without some whole layers stays in its own class. One without some attention or MLP modules needs effconvert's class, and config.json uses
    transformers' per_layer_config. --layers names the layers. --drop chooses them on a text: by search, by how little a layer changes its input (Men et
    al. 2024, arXiv 2403.03853), or as the run of layers with the smallest angle (Gromov et al. 2024, arXiv 2403.17887). --refit recovers a part of the
    loss. docs/prune.md has the measurements.

    \b
    Examples:
      effconvert prune-layers --drop 4 --refit ./SmolLM2-135M
      effconvert prune-layers --drop 8 --only attention --refit ./SmolLM2-135M
      effconvert prune-layers --layers 9,12-14 ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts(
        "models with layers that add to the stream", saves="parameters, time and KV cache", native="its own class (--only needs effconvert)", exact=""
    )

    layers: Layers = layers_field("Layers to drop, from 0, negative from the end, /n for each n-th: 4-7, or 5,-3.")
    drop: int | None = Field(None, ge=1, description="Number of layers to drop, chosen on the calibration text.", json_schema_extra={"metavar": "N"})
    by: Literal["search", "influence", "angular"] | None = Field(
        None,
        description="How --drop chooses: one layer at a time, the one without which predictions change least (search, the default); in one pass, by how little "
        "a layer changes its input (influence); or as the run of neighbours with the smallest angle between input and output (angular).",
    )
    only: Literal["attention", "mlp"] | None = Field(None, description="Drop only this part of each layer. Default: whole layers.")

    @property
    def label(self) -> str:
        """The name, --only and --drop; a list of layers would be too long."""
        return "-".join([self.name, *filter(None, [self.only, str(self.drop or "")])])

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Say how many layers can be dropped."""
        most = config.layers - LEAST - len(cls()._required(config))
        if config.readers:  # to choose is to run layers by themselves, which those that read another's cache cannot
            return "--layers LIST"
        return f"--layers LIST, or --drop 1 to {most}" if most > 0 else "--only attention, or mlp"

    def check(self, config: Config) -> None:
        """Refuse layers that do not exist or must stay, too many of them, and rules of choice that this model does not allow."""
        if (self.layers is None) == (self.drop is None):
            raise OptionError("give either --layers, which names the layers to drop, or --drop, which says how many")
        if self.by and self.drop is None:
            raise OptionError(f"--by {self.by} is for --drop, and --layers leaves nothing to choose; leave one of them out")
        self._check_model(config)
        required = self._required(config)
        if self.drop is None and (blocked := sorted(self.chosen(config) & required.keys())):
            raise OptionError(f"--layers {self.layers} names layer {blocked[0]}, {required[blocked[0]]}; leave it out")
        count, least = self.drop or len(self.chosen(config)), 1 if self.only else LEAST
        available = sum(PLACE[self.only] not in config.skips(index) for index in range(config.layers)) if self.only else config.layers
        if count > min(available - least, config.layers - len(required)):
            most = max(0, min(available - least, config.layers - len(required)))
            what = f"layers that have {self.only}" if self.only else "layers"
            raise OptionError(f"{count} of this model's {available} {what} would be dropped, and at least {least} must stay; drop at most {most}")
        if self.drop:
            self._check_choice(config)

    def is_exact(self, config: Config) -> bool:
        """Never."""
        return False

    def config(self, config: Config) -> Config:
        """Leave the layers out, or record the parts that they skip."""
        dropped = self.chosen(config)
        if self.only:
            return config.with_skips(PLACE[self.only], dropped)
        return config.with_layers([index for index in range(config.layers) if index not in dropped])

    @property
    def undecided(self) -> bool:
        """If only their number is known."""
        return self.drop is not None

    @property
    def rule(self) -> str:
        """The value of --by, and the tokens that it looks at."""
        return f"{self.by or 'search'}, on up to {TOKENS:,} tokens"

    def decide(self, forward: ForwardProtocol) -> PruneLayers:
        """Choose the layers, and name them in the order of choice, so that a user can drop fewer of them."""
        ways = {"influence": self._by_influence, "angular": self._by_angle}
        chosen = ways.get(self.by or "", self._by_search)(forward, self.drop or 0)
        return self.model_copy(update={"layers": ",".join(map(str, chosen)), "drop": None, "by": None})

    def chosen(self, config: Config) -> set[int]:
        """Return the layers to drop."""
        return self.named_layers("layers", config)

    def rewrite(self, model: Model) -> None:
        """Leave the layers out, or the parts that they skip."""
        dropped = self.chosen(model.config)
        if not self.only:
            model.layers = [layer for index, layer in enumerate(model.layers) if index not in dropped]
        for index in dropped if self.only else ():
            model.layers[index].later(self.layer)

    def layer(self, layer: Layer) -> None:
        """Delete the attention or the MLP of a layer, with its norms."""
        parts = layer.config.sublayer(PLACE[str(self.only)])
        for part in [part for part in layer if part.removesuffix(".bias") in parts]:
            del layer[part]

    def _check_model(self, config: Config) -> None:
        if self.only and config.norms_stream:
            raise ModelError(f"{config.kind} normalises what its layers add to, so a layer without {self.only} would still change it; drop whole layers")
        if self.only and not config.place(PLACE[self.only]):
            raise ModelError(f"{config.kind} has no {self.only} to drop; drop whole layers")
        if not self.only and config.get("scale_attn_by_inverse_layer_idx"):
            raise ModelError(f"this {config.kind} divides scores by the number of the layer, which would change for later layers; use --only")

    def _check_choice(self, config: Config) -> None:
        if self.by == "angular" and self.only:
            raise OptionError(f"--by angular chooses a run of whole layers; for --only {self.only} use --by search or influence")
        if self.by in (None, "search") and not config.predicts:
            raise OptionError(f"--by search compares predictions, and {config.architecture} has no language-model head; use --by influence or angular")
        if self.by in (None, "search") and not config.decoder:
            raise OptionError(f"--by search compares predictions of the next token, and {config.kind} is an {config.role}; use --by influence or angular")

    def _required(self, config: Config) -> dict[int, str]:
        """Return the layers that must stay, and why."""
        if not self.only:
            return {0: f"in whose place no other can stand: the first alone has no {', '.join(config.family.first_lacks)}"} if config.family.first_lacks else {}
        place, required = PLACE[self.only], {}
        for index in range(config.layers):
            if place in config.skips(index):
                required[index] = f"which has no {self.only} already"
            elif config.skips(index):
                required[index] = "of which nothing would be left: drop it whole"
            elif others := [record.technique for record in config.replaced_in(index) if overlap(record.place, place)]:
                required[index] = f"where {others[0]} stands in place of that"
        return required

    def _by_search(self, forward: ForwardProtocol, count: int) -> list[int]:
        """Drop one layer at a time, the one without which predictions change least.

        The divergence that a drop adds hardly falls after other drops. So a layer is tested again only while its last known increase is the smallest.
        """
        candidates = [index for index in range(forward.config.layers) if index not in self._required(forward.config)]
        dropped: list[int] = []
        total, increase = 0.0, dict.fromkeys(candidates, float("-inf"))
        streams = [first := forward.begin(TOKENS), *self._run_from(forward, first, 0, dropped)]  # inputs of each layer, and the output of the last
        reference = streams[-1]
        with forward.bar(len(candidates) + count) as advance:
            for _ in range(count):
                tested: set[int] = set()
                while (best := min((index for index in candidates if index not in dropped), key=lambda index: increase[index])) not in tested:
                    *_, last = self._run_from(forward, streams[best], best, [*dropped, best])
                    increase[best] = forward.divergence(reference, last) - total
                    tested.add(best)
                    advance(1)
                dropped.append(best)
                total += increase[best]
                streams[best + 1 :] = self._run_from(forward, streams[best], best, dropped)
        return dropped

    def _by_influence(self, forward: ForwardProtocol, count: int) -> list[int]:
        """Choose the layers that change the direction of the stream least, each by itself: 1 - cosine of input and output."""
        influence: dict[int, float] = {}
        states: States = forward.begin(TOKENS)
        with forward.bar(forward.config.layers) as advance:
            for index in range(forward.config.layers):
                after = forward.layer(index, states)
                between = forward.layer(index, states, without="ffn") if self.only else states
                before, behind = {None: (states, after), "attention": (states, between), "mlp": (between, after)}[self.only]
                influence[index] = 1 - float(_cosines(before, behind).mean())
                states = after
                advance(1)
        candidates = influence.keys() - self._required(forward.config).keys()
        return sorted(candidates, key=lambda index: influence[index])[:count]

    def _by_angle(self, forward: ForwardProtocol, count: int) -> list[int]:
        """Choose the run of layers with the smallest mean angle between its input and its output."""
        angles: dict[int, float] = {}
        states: States = forward.begin(TOKENS)
        streams = deque([states], maxlen=count + 1)
        with forward.bar(forward.config.layers) as advance:
            for index in range(forward.config.layers):
                streams.append(forward.layer(index, streams[-1]))
                if len(streams) > count:
                    angles[index - count + 1] = float(_cosines(streams[0], streams[-1]).clamp(-1, 1).arccos().mean())
                advance(1)
        candidates = angles.keys() - self._required(forward.config).keys()
        first = min(candidates, key=lambda index: angles[index])
        return list(range(first, first + count))

    def _run_from(self, forward: ForwardProtocol, states: States, first: int, dropped: Sequence[int]) -> Iterator[States]:
        """Yield the output of each layer from `first` on, without the dropped ones."""
        for index in range(first, forward.config.layers):
            if index not in dropped:
                states = forward.layer(index, states)
            elif self.only:
                states = forward.layer(index, states, without=PLACE[self.only])
            yield states


def _cosines(before: States, after: States) -> Tensor:
    """Return the cosine between two states of each token, [tokens]."""
    import torch

    return torch.cat([torch.cosine_similarity(old, new, dim=-1).flatten() for old, new in zip(before, after, strict=True)])
