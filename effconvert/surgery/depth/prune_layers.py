"""Drop whole layers, or their attention or MLP alone."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections import deque
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from effconvert.checkpoint.replaced import overlap
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Layers, Layerwise, layers_field

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model
    from effconvert.surgery._surgery import Forward

    States = Sequence[Tensor]  # what stands between two layers, [B, T, M] for each batch of texts

TOKENS = 2048  # of the calibration text, on which is chosen
LEAST = 2  # layers that must stay
PLACE = {"attention": "attention", "mlp": "ffn"}


class PruneLayers(Layerwise):
    """Drop whole layers, or their attention or MLP alone.

    Without whole layers a model stays in its own class. Without the attention or the MLP of some it is in one of ours, and says so in transformers' words
    (per_layer_config). Which ones go is said by --layers, or chosen on a text: by search, by how little a layer changes what arrives at it (Men et al. 2024,
    arXiv 2403.03853), or as the run of layers over which that turns least (Gromov et al. 2024, arXiv 2403.17887). --refit makes up for a part of what is lost;
    attention alone is cheapest to lose. docs/prune.md has the measurements.

    \b
    Examples:
      effconvert prune-layers --drop 4 --refit ./SmolLM2-135M
      effconvert prune-layers --drop 8 --only attention --refit ./SmolLM2-135M
      effconvert prune-layers --layers 9,12-14 ./SmolLM2-135M
    """

    layers: Layers = layers_field("Layers to drop, from 0, negative from the end, /n for each n-th: 4-7, or 5,-3.")
    drop: int | None = Field(None, ge=1, description="How many to drop: which ones is chosen on the calibration text.", json_schema_extra={"metavar": "N"})
    by: Literal["search", "influence", "angular"] | None = Field(
        None,
        description="How they are chosen: one after the other, each time the one without which predictions change least (search, the default: each layer is "
        "tried), or in one pass by how little each changes its input (influence), or as a run of neighbours over which that turns least (angular).",
    )
    only: Literal["attention", "mlp"] | None = Field(None, description="Drop this of the layers, and leave the rest of them. Default: whole layers.")

    @property
    def label(self) -> str:
        """The name, and what is asked for in short: a list of layers would be long."""
        return "-".join([self.name, *filter(None, [self.only, str(self.drop or "")])])

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Say how many can go."""
        most = config.layers - LEAST - len(cls()._kept(config))
        return f"--layers LIST, or --drop 1 to {most}" if most > 0 else "--only attention, or mlp"

    def check(self, config: Config) -> None:
        """Refuse layers that are not there or cannot go, too many of them, and ways to choose that cannot be with this model."""
        if (self.layers is None) == (self.drop is None):
            raise OptionError("give either --layers, which says which ones are dropped, or --drop, which says how many")
        if self.by and self.drop is None:
            raise OptionError(f"--by {self.by} says how --drop chooses, and --layers leaves nothing to choose; leave one of them out")
        self._check_model(config)
        kept = self._kept(config)
        if self.drop is None and (stuck := sorted(self.chosen(config) & kept.keys())):
            raise OptionError(f"--layers {self.layers} names layer {stuck[0]}, {kept[stuck[0]]}; leave it out")
        count, least = self.drop or len(self.chosen(config)), 1 if self.only else LEAST
        have = sum(PLACE[self.only] not in config.skips(index) for index in range(config.layers)) if self.only else config.layers
        if count > min(have - least, config.layers - len(kept)):
            most = max(0, min(have - least, config.layers - len(kept)))
            what = f"layers that have {self.only}" if self.only else "layers"
            raise OptionError(f"{count} of this model's {have} {what} are to go, and at least {least} must stay; {most} can go at most")
        if self.drop:
            self._check_way(config)

    def is_exact(self, config: Config) -> bool:
        """Never: that a layer adds nothing is not known before it is run."""
        return False

    def config(self, config: Config) -> Config:
        """Leave the layers out, or say what they skip."""
        dropped = self.chosen(config)
        if self.only:
            return config.with_skips(PLACE[self.only], dropped)
        return config.with_layers([index for index in range(config.layers) if index not in dropped])

    @property
    def undecided(self) -> bool:
        """While only their number is known."""
        return self.drop is not None

    def decide(self, forward: Forward) -> PruneLayers:
        """Choose the layers, and name them: those that go first stand first, so that fewer of them can be dropped."""
        ways = {"influence": self._by_influence, "angular": self._by_angle}
        chosen = ways.get(self.by or "", self._by_search)(forward, self.drop or 0)
        return self.model_copy(update={"layers": ",".join(map(str, chosen)), "drop": None, "by": None})

    def chosen(self, config: Config) -> set[int]:
        """Return the layers to drop."""
        return self.named("layers", config)

    def rewrite(self, model: Model) -> None:
        """Leave the layers out, or what they skip."""
        dropped = self.chosen(model.config)
        if not self.only:
            model.layers = [layer for index, layer in enumerate(model.layers) if index not in dropped]
        for index in dropped if self.only else ():
            model.layers[index].later(self.layer)

    def layer(self, layer: Layer) -> None:
        """Take the attention or the MLP out of a layer, with its norms."""
        gone = layer.config.sublayer(PLACE[str(self.only)])
        for part in [part for part in layer if part.removesuffix(".bias") in gone]:
            del layer[part]

    def _check_model(self, config: Config) -> None:
        if self.only and config.norms_stream:
            raise ModelError(f"{config.kind} normalises what its layers add to, so none of them is done with when it adds nothing; drop whole layers")
        if self.only and not config.place(PLACE[self.only]):
            raise ModelError(f"{config.kind} has no {self.only} to drop; drop whole layers")
        if not self.only and config.get("scale_attn_by_inverse_layer_idx"):
            raise ModelError(f"this {config.kind} divides scores by the number of the layer, which would change for layers that move up; use --only")

    def _check_way(self, config: Config) -> None:
        if self.by == "angular" and self.only:
            raise OptionError(f"--by angular chooses whole layers, neighbours of each other; for their {self.only} use --by search or influence")
        if self.by in (None, "search") and config.architecture != config.family.lm:
            raise OptionError(f"--by search compares predictions, and {config.architecture} has no language-model head; use --by influence or angular")
        if self.by in (None, "search") and not config.family.decoder:
            raise OptionError(f"--by search compares predictions of the next token, and {config.kind} is an encoder; use --by influence or angular")

    def _kept(self, config: Config) -> dict[int, str]:
        """Return the layers that cannot be dropped, and why."""
        if not self.only:
            return {0: f"in whose place no other can stand: the first alone has no {', '.join(config.family.first_lacks)}"} if config.family.first_lacks else {}
        place, kept = PLACE[self.only], {}
        for index in range(config.layers):
            if place in config.skips(index):
                kept[index] = f"which has no {self.only} already"
            elif config.skips(index):
                kept[index] = "of which nothing would be left: drop it whole"
            elif others := [record.technique for record in config.replaced_in(index) if overlap(record.place, place)]:
                kept[index] = f"where {others[0]} stands in place of that"
        return kept

    def _by_search(self, forward: Forward, count: int) -> list[int]:
        """Drop one after the other, each time the one without which predictions change least.

        What a drop adds to the divergence from the original hardly falls when others went before: a layer is tried again only while it adds least as last seen.
        """
        able = [index for index in range(forward.config.layers) if index not in self._kept(forward.config)]
        gone: list[int] = []
        total, added = 0.0, dict.fromkeys(able, float("-inf"))
        arrived = [first := forward.begin(TOKENS), *self._after(forward, first, 0, gone)]  # at each layer, and what the last one makes
        wanted = arrived[-1]
        with forward.bar(len(able) + count) as advance:
            for _ in range(count):
                tried: set[int] = set()
                while (best := min((index for index in able if index not in gone), key=lambda index: added[index])) not in tried:
                    *_, last = self._after(forward, arrived[best], best, [*gone, best])
                    added[best] = forward.divergence(wanted, last) - total
                    tried.add(best)
                    advance(1)
                gone.append(best)
                total += added[best]
                arrived[best + 1 :] = self._after(forward, arrived[best], best, gone)
        return gone

    def _by_influence(self, forward: Forward, count: int) -> list[int]:
        """Choose those over which the stream turns least, each by itself: 1 - cosine before and after."""
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
        able = influence.keys() - self._kept(forward.config).keys()
        return sorted(able, key=lambda index: influence[index])[:count]

    def _by_angle(self, forward: Forward, count: int) -> list[int]:
        """Choose the run of layers over which the stream turns least: the mean angle before and after."""
        angles: dict[int, float] = {}
        states: States = forward.begin(TOKENS)
        arrived = deque([states], maxlen=count + 1)
        with forward.bar(forward.config.layers) as advance:
            for index in range(forward.config.layers):
                arrived.append(forward.layer(index, arrived[-1]))
                if len(arrived) > count:
                    angles[index - count + 1] = float(_cosines(arrived[0], arrived[-1]).clamp(-1, 1).arccos().mean())
                advance(1)
        able = angles.keys() - self._kept(forward.config).keys()
        first = min(able, key=lambda index: angles[index])
        return list(range(first, first + count))

    def _after(self, forward: Forward, states: States, first: int, gone: Sequence[int]) -> Iterator[States]:
        """Yield what stands after each layer from `first` on, without those that are gone."""
        for index in range(first, forward.config.layers):
            if index not in gone:
                states = forward.layer(index, states)
            elif self.only:
                states = forward.layer(index, states, without=PLACE[self.only])
            yield states


def _cosines(before: States, after: States) -> Tensor:
    """Return the cosine between two states of each token, [tokens]."""
    import torch

    return torch.cat([torch.cosine_similarity(one, other, dim=-1).flatten() for one, other in zip(before, after, strict=True)])
