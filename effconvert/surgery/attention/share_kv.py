"""Let layers read the keys and values of an earlier layer."""
# M = hidden width, H = query heads, Hk = KV heads, D = head width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.checkpoint.replaced import overlap
from effconvert.checkpoint.shared import CACHE_PARTS
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._surgery import Facts, Layers, Layerwise, layers_field

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model
    from effconvert.surgery._surgery import ForwardProtocol
    from effconvert.surgery.attention._across import Reader

READ = ("q", "q.bias", "o")  # what changes in a layer that reads
TOKENS = 2048  # of the calibration text, for the choice
KEPT = ("q", "q.bias", "k", "k.bias", "v", "v.bias", "o")  # and in one that is read


class ShareKv(Layerwise):
    """Let layers read the keys and values of an earlier layer.

    Each of these layers reads the cache of the nearest layer before it that keeps one and has the same window. So the KV cache has fewer layers, and the
    projections to keys and values go with them. The layers that are read get keys and values that suit their readers too, fitted on a text; queries
    and outputs are fitted to these. --refit then recovers most of the rest. Neighbours share best: `--layers 1-29/2` makes pairs of 30 layers.
    The result needs effconvert. Without training, `narrow-kv` and `prune-layers --only attention` cost less at the same size of cache: take these first.
    Brandon et al. 2024, arXiv 2405.12981 (CLA); Sun et al. 2024, arXiv 2405.05254 (YOCO: the last layers); docs/share-kv.md measures both.

    \b
    Examples:
      effconvert share-kv --layers 1-29/2 --refit ./SmolLM2-135M
      effconvert share-kv --drop 8 --refit ./SmolLM2-135M
      effconvert share-kv --last 8 --refit ./SmolLM2-135M -o ./yoco
    """

    facts: ClassVar[Facts] = Facts("decoders with keys and values of their own in each layer", saves="KV cache and parameters", native="", exact="")

    layers: Layers = layers_field(
        "Layers that read an earlier layer's keys and values, from 0, negative from the end: 5, or 20-29, or 1-29/2 for each second one."
    )
    last: int | None = Field(None, ge=1, description="Have the last N layers read (num_kv_shared_layers in transformers).", json_schema_extra={"metavar": "N"})
    drop: int | None = Field(
        None,
        ge=1,
        description="Have N layers read their neighbour before, those that lose least by it on the calibration text.",
        json_schema_extra={"metavar": "N"},
    )
    pool: Literal["pca", "first"] = Field(
        "pca",
        description="The keys and values of a layer that is read: a weighted PCA of its own and of its readers', after calibration (pca), or its own (first).",
    )

    @property
    def label(self) -> str:
        """The name, and --last or --drop; a list of layers would be too long."""
        return "-".join([self.name, *(str(number) for number in (self.last, self.drop) if number)])

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Say how many layers can read."""
        config.check_lending()
        if config.readers:
            reader = config.readers[0]
            raise ModelError(
                f"layer {reader} of this {config.kind} reads the keys and values of layer {config.cache_of(reader)} already; begin from the original"
            )
        cls(last=1).check(config)
        return f"--layers LIST, or --last 1 to {config.layers - 1}"

    def check(self, config: Config) -> None:
        """Refuse layers that have none before them to read, and families that cannot share."""
        config.check_lending()
        if [self.layers, self.last, self.drop].count(None) != 2:
            raise OptionError("give one of --layers, which names the layers that read; --last, how many at the end; --drop, how many where it costs least")
        if self.last and self.last >= config.layers:
            raise OptionError(f"--last {self.last} leaves none of the {config.layers} layers with a cache; give at most {config.layers - 1}")
        if self.drop and self.drop > (most := len(pairs(config, {}, config.layers))):
            raise OptionError(f"--drop {self.drop} is more than the {most} pairs of neighbours of this model; give at most that, or name more with --layers")
        if not self.drop:
            self.config(config)

    def is_exact(self, config: Config) -> bool:
        """Never."""
        return False

    def config(self, config: Config) -> Config:
        """Record which layers share a cache."""
        shared = config
        for kept, readers in self._groups(config).items():
            shared = shared.with_shared("cache", (kept, *readers))
        return shared

    @property
    def undecided(self) -> bool:
        """If only their number is known."""
        return self.drop is not None

    @property
    def rule(self) -> str:
        """What is compared, and the tokens that it is compared on."""
        return f"the energy of the errors, on up to {TOKENS:,} tokens"

    def decide(self, forward: ForwardProtocol) -> ShareKv:
        """Choose the layers that read: disjoint pairs of neighbours, whose errors are the least shares of the stream's energy in sum."""
        import torch

        from effconvert.surgery.attention._across import sharing_cost

        config, costs, inputs = forward.config, dict[tuple[int, int], float](), dict[int, torch.Tensor]()
        earlier = {later: before for before, later in neighbours(config)}
        needed = {layer for pair in neighbours(config) for layer in pair}
        states = forward.begin(TOKENS)
        with forward.bar(config.layers) as advance:
            for index in range(config.layers):
                if index in needed:
                    inputs[index] = torch.cat([capture.inputs["q"].flatten(0, -2) for capture in forward.capture(index, states, "q")]).cpu()
                if index in earlier:
                    energy = (
                        torch.cat([state.flatten(0, -2) for state in states]).double().square().sum(1).log().mean().exp()
                    )  # a geometric mean, which a few huge tokens do not decide
                    before = earlier[index]
                    costs[before, index] = sharing_cost(forward.parts(before), forward.parts(index), inputs.pop(before), inputs[index]) / float(energy)
                states = forward.layer(index, states)
                advance(1)
        readers = [reader for _, reader in pairs(config, costs, self.drop or 0)]
        return self.model_copy(update={"layers": ",".join(map(str, sorted(readers))), "drop": None})

    def chosen(self, config: Config) -> set[int]:
        """Return the layers that read."""
        return set(range(config.layers - self.last, config.layers)) if self.last else self.named_layers("layers", config)

    def needs_calibration(self, config: Config) -> bool:
        """If keys and values are fitted."""
        return self.pool == "pca"

    def needs_original(self, config: Config) -> bool:
        """If they are: readers are fitted to what the original's layers give them."""
        return self.pool == "pca"

    def fit_bytes(self, config: Config) -> int:
        """A dozen matrices of each reader in float64."""
        readers = max(map(len, self._groups(config).values()))
        return 8 * readers * (6 * config.hidden**2 + 6 * config.heads * config.head_dim * config.hidden) if self.pool == "pca" else 0

    def reads_ahead(self, config: Config) -> bool:
        """If they are: to later layers."""
        return self.pool == "pca"

    def rewrite(self, model: Model) -> None:
        """Fit the layers that are read to their readers, and take keys and values from these."""
        for kept, readers in self._groups(model.config).items():
            fitted: dict[int, Reader] = {}
            model.layers[kept].later(partial(self._keep, readers=[model.layers[index] for index in readers], fitted=fitted))
            for index in readers:
                model.layers[index].later(partial(self._read, fitted=fitted))

    def _groups(self, config: Config) -> dict[int, list[int]]:
        """Return the layers that are read, each with its readers."""
        readers = self.chosen(config)
        groups: dict[int, list[int]] = {}
        for index in sorted(readers):
            before = [layer for layer in range(index) if layer not in readers and has_own(config, layer) and kind(config, layer) == kind(config, index)]
            if not before:
                raise OptionError(
                    f"layer {index} has no layer before it with the same window that keeps keys and values, and no technique in its attention; "
                    "leave it out of --layers"
                )
            groups.setdefault(before[-1], []).append(index)
        return groups

    def _keep(self, layer: Layer, readers: Sequence[Layer], fitted: dict[int, Reader]) -> None:
        if self.pool == "first":
            return
        for part in KEPT:
            if part in layer:
                layer[part] = layer[part]  # marks it as changed, for the plan
        if layer.activations:
            from effconvert.surgery.attention._across import pool_layers

            fitted.update(pool_layers(layer, readers))

    def _read(self, layer: Layer, fitted: dict[int, Reader]) -> None:
        for part in READ if self.pool == "pca" else ():
            if part in layer:
                layer[part] = layer[part]
        if layer.index in fitted:
            for part, tensor in fitted.pop(layer.index).items():
                layer[part] = tensor
        for part in [part for part in layer if part.removesuffix(".bias") in CACHE_PARTS]:
            del layer[part]


def neighbours(config: Config) -> list[tuple[int, int]]:
    """Return the pairs of a layer with keys and values of its own and the next such layer with the same window and RoPE, which could read them."""
    kinds: dict[tuple[int | None, int], list[int]] = {}
    for index in filter(partial(has_own, config), range(config.layers)):
        kinds.setdefault(kind(config, index), []).append(index)
    return [pair for layers in kinds.values() for pair in pairwise(layers)]


def has_own(config: Config, layer: int) -> bool:
    """Whether a layer keeps keys and values of its own for softmax attention, which others could read."""
    replaced = any(overlap(record.place, "attention") for record in config.replaced_in(layer))
    return "attention" not in config.skips(layer) and not replaced and config.cache_of(layer) == layer


def kind(config: Config, layer: int) -> tuple[int | None, int]:
    """Return what layers must have in common to read the same keys: the window, and how many dimensions RoPE turns."""
    return config.windows()[layer], config.rotary_of(layer)


def pairs(config: Config, costs: Mapping[tuple[int, int], float], count: int) -> list[tuple[int, int]]:
    """Return `count` pairs of neighbours without a common layer, the cheapest in sum, or as many as there are; a pair without a cost is free."""
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {0: (0.0, [])}  # number of pairs -> their cost, and they
    before, last = best, -1  # the same without the pair before, and the later layer of that
    for first, second in neighbours(config):
        fewer = before if first == last else best
        longer = {
            number + 1: (cost + costs.get((first, second), 0.0), [*chosen, (first, second)]) for number, (cost, chosen) in fewer.items() if number < count
        }
        before, last = best, second
        best = {number: min(option[number] for option in (best, longer) if number in option) for number in {*best, *longer}}
    return best[max(best)][1]
