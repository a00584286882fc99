"""Let layers share their matrices, and add a thin difference to each."""
# K = rank.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.checkpoint.replaced import OWN, Replaced
from effconvert.errors import OptionError
from effconvert.quantities import count
from effconvert.surgery._replacement import PlaceContext, Replacement
from effconvert.surgery._surgery import Facts
from effconvert.surgery.depth._groups import check_groups, check_model, groups_of
from effconvert.surgery.projections._parts import PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model


class Recursive(Replacement):
    """Let layers share their matrices, and add a thin difference to each.

    The layers of a group share the matrices of their projections, stored once, and each adds the product of two thin matrices of its own to every one
    (a relaxed recursive transformer). All of them are fitted to the weights on the inputs that the calibration text gives. Norms and biases stay each
    layer's own. --refit and --transfer fit the differences. Without training, dropping layers (prune-layers) is the simpler way to fewer parameters,
    and saves time too; docs/share-layers.md has measurements. The result needs effconvert.
    Bae et al. 2024, arXiv 2410.20672.

    \b
    Examples:
      effconvert recursive --groups 4 --layers 13-20 --lora-rank 64 --refit ./SmolLM2-135M
      effconvert recursive --groups 10 --lora-rank 32 --pattern cyclic ./SmolLM2-135M -o ./recursive
    """

    by_token: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        "models whose layers are alike, with projections that are modules of their own", saves="parameters", native="", exact="with --lora-rank at full rank"
    )
    where: ClassVar[frozenset[str]] = frozenset({"layers", "groups", "pattern"})

    groups: int = Field(1, ge=1, description="Matrices to store of each projection; the layers share them.", json_schema_extra={"metavar": "G"})
    lora_rank: int = Field(ge=1, description="Rank of the difference of each projection in each layer.", json_schema_extra={"metavar": "N"})
    pattern: Literal["contiguous", "cyclic"] = Field(
        "contiguous", description="Which layers share: neighbours (contiguous), or each G-th, so that the stored layers run in turn (cyclic)."
    )

    @property
    def label(self) -> str:
        """The name, the groups and the rank."""
        return f"{self.name}-{self.groups}-{self.lora_rank}"

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The numbers of groups and ranks."""
        technique = cls(groups=1, lora_rank=1)
        technique.check(config)
        return f"--groups 1 to {config.layers} --lora-rank 1 to {technique._full(config)}"

    def places(self, config: Config) -> tuple[str, ...]:
        """Return all projections, in the order in which a layer computes them."""
        return tuple(part for part in PARTS if part in config.parts)

    def check(self, config: Config) -> None:
        """Refuse models without such projections, and ranks that these cannot have."""
        check_model(config)
        for place in ("k", "v", *self.places(config)):
            config.place(place)  # raises where it is fused with others, or latents are in its place
        if self.lora_rank > (full := self._full(config)):
            raise OptionError(f"--lora-rank {self.lora_rank} is more than the full rank of every projection; give at most {full}")

    def is_exact(self, config: Config) -> bool:
        """If the differences have full rank, or no layers share anything."""
        return self.lora_rank == self._full(config) or not self._groups(config)

    def needs_calibration(self, config: Config) -> bool:
        """If something is lost."""
        return not self.is_exact(config)

    def reads_ahead(self, config: Config) -> bool:
        """If layers share: all layers of a group are read at its first."""
        return bool(self._groups(config))

    def fit_bytes(self, config: Config) -> int:
        """A dozen matrices of a FFN's inputs in float64, and the matrices of a group."""
        layers = max(map(len, self._groups(config)), default=0)
        return 12 * 8 * max(config.ffn, config.hidden) ** 2 + 8 * layers * sum(
            out * inner for out, inner in map(config.matrices.__getitem__, self.places(config))
        )

    def notes(self, config: Config) -> str:
        """Say what is saved."""
        groups = self._groups(config)
        sizes = [(out * inner, self._rank(config, place) * (out + inner)) for place in self.places(config) for out, inner in [config.matrices[place]]]
        before = sum(len(group) * whole for group in groups for whole, _ in sizes)
        after = sum(whole + len(group) * thin for group in groups for whole, thin in sizes)
        if not groups:
            return "each layer is a group of its own, so nothing changes"
        if after >= before:
            return f"nothing is saved: at this rank shared matrices and differences have {count(after)} parameters, and the projections have {count(before)}"
        return f"the projections of {sum(map(len, groups))} layers keep {after / before:.1%} of their parameters"

    def config(self, config: Config) -> Config:
        """Record which layers share their matrices, and their differences."""
        groups = self._groups(config)
        check_groups(config, groups)
        for group in groups:
            config = config.with_shared("weights", group)
        layers = tuple(sorted(layer for group in groups for layer in group))
        for place in self.places(config) if layers else ():
            config = config.with_replaced(Replaced(self.name, self.settings, place, layers))
        return config

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Two factors of a difference, [O, K] and [K, I]."""
        out, inner = config.matrices[place]
        return {"left": (out, self._rank(config, place)), "right": (self._rank(config, place), inner)}

    def rewrite(self, model: Model) -> None:
        """Fit the matrices of each group at its first layer, and hand the others their differences."""
        for group in self._groups(model.config):
            fitted: dict[int, dict[str, Tensor]] = {}
            for index in group[1:]:
                model.layers[index].share(model.layers[group[0]], "weights")
                model.layers[index].later(partial(self._take, first=model.layers[group[0]], fitted=fitted))
            model.layers[group[0]].later(partial(self._fit, path=model.layers[group[0] : group[-1] + 1], group=group, fitted=fitted))

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Add the difference to what the shared matrix gives."""
        return context.original(hidden) + hidden @ weights["right"].T @ weights["left"].T

    def _fit(self, layer: Layer, path: Sequence[Layer], group: Sequence[int], fitted: dict[int, dict[str, Tensor]]) -> None:
        from effconvert.surgery.depth._deltas import fit_deltas

        places = self.places(layer.config)
        for part in [part for part in places if part in layer]:
            layer[part] = layer[part]  # marks it as changed, for the plan
        if not layer.shapes_only and (layer.activations or not self.needs_calibration(layer.config)):
            fitted.update(fit_deltas(layer, path, group, {place: self._rank(layer.config, place) for place in places}))
        self._take(layer, layer, fitted)

    def _take(self, layer: Layer, first: Layer, fitted: dict[int, dict[str, Tensor]]) -> None:
        import torch

        assert first.assigned  # fits it, if that is still to be done
        for part in ("gate.bias", "up.bias"):
            if part in layer:
                layer[part] = layer[part]
        for place in self.places(layer.config):
            for name, shape in self.parameters(layer.config, place).items():
                layer[f"{place}.{OWN}{name}"] = torch.empty(shape, device="meta")
        for part, tensor in fitted.pop(layer.index, {}).items():
            layer[part] = tensor

    def _groups(self, config: Config) -> list[tuple[int, ...]]:
        """Return the groups of two or more layers."""
        chosen = self.chosen(config)
        if self.groups > len(chosen):
            raise OptionError(f"--groups {self.groups} is more than the {len(chosen)} layers that are to share; give at most {len(chosen)}")
        return [group for group in groups_of(chosen, self.groups, self.pattern) if len(group) > 1]

    def _rank(self, config: Config, place: str) -> int:
        return min(self.lora_rank, *config.matrices[place])

    def _full(self, config: Config) -> int:
        return max(min(config.matrices[place]) for place in self.places(config))
