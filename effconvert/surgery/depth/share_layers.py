"""Let groups of layers share their parameters."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.errors import OptionError
from effconvert.surgery._surgery import Facts, Layerwise
from effconvert.surgery.depth._groups import SHARED, check_groups, check_model, groups_of, with_shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model


class ShareLayers(Layerwise):
    """Let groups of layers share their parameters.

    The layers of a group compute with one attention and one FFN, stored once on disk and in memory. Each runs as before, with its own norms and its
    own part of the cache: less to store, nothing less to compute. Heads and neurons of the shared layer are those of the group that are worth most on
    the calibration text, and its outputs are fitted to what all layers of the group computed. Without training, dropping layers (prune-layers) costs
    less at the same number of parameters, and saves time too: take that first. docs/share-layers.md has measurements.
    Lan et al. 2019, arXiv 1909.11942 (ALBERT). The result needs effconvert.

    \b
    Examples:
      effconvert share-layers --groups 4 --layers 13-20 --refit ./SmolLM2-135M
      effconvert share-layers --groups 6 --pattern cyclic ./SmolLM2-135M -o ./shared
    """

    facts: ClassVar[Facts] = Facts("models whose layers are alike", saves="parameters", native="", exact="with --groups as many as layers")

    groups: int = Field(ge=1, description="Layers to store; the others share theirs.", json_schema_extra={"metavar": "G"})
    pattern: Literal["contiguous", "cyclic"] = Field(
        "contiguous", description="Which layers share: neighbours (contiguous), or each G-th, so that the stored layers run in turn (cyclic)."
    )
    pool: Literal["fitted", "first"] = Field(
        "fitted", description="What a group shares: a layer that is fitted to all of its layers on the calibration text (fitted), or its first layer (first)."
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The number of layers that can be stored."""
        check_model(config)
        return f"--groups 1 to {config.layers}"

    def check(self, config: Config) -> None:
        """Refuse more groups than layers, and layers that are not alike."""
        check_model(config)
        self.config(config)

    def is_exact(self, config: Config) -> bool:
        """If each layer is a group of its own."""
        return self.groups == len(self.chosen(config))

    def config(self, config: Config) -> Config:
        """Record which layers share their parameters."""
        groups = self._groups(config)
        check_groups(config, groups)
        return with_shared(config, groups)

    def needs_calibration(self, config: Config) -> bool:
        """If the shared layers are fitted."""
        return self.pool == "fitted" and not self.is_exact(config)

    def needs_original(self, config: Config) -> bool:
        """Likewise: the original's hidden states are what they are fitted to at last."""
        return self.needs_calibration(config)

    def reads_ahead(self, config: Config) -> bool:
        """Likewise: all layers of a group are read at its first."""
        return self.needs_calibration(config)

    def fit_bytes(self, config: Config) -> int:
        """Six matrices of the neurons of two layers in float64."""
        return 6 * 8 * (2 * config.ffn) ** 2 if self.needs_calibration(config) else 0

    def rewrite(self, model: Model) -> None:
        """Fit the first layer of each group, and let the others share it."""
        for group in self._groups(model.config):
            for index in group[1:]:
                for what in SHARED:
                    model.layers[index].share(model.layers[group[0]], what)
            if len(group) > 1 and self.pool == "fitted":  # not before: sharing asks the first layer for its parts, which would fit it at once
                model.layers[group[0]].later(partial(self._fit, path=model.layers[group[0] : group[-1] + 1], group=group))

    def _groups(self, config: Config) -> list[tuple[int, ...]]:
        chosen = self.chosen(config)
        if self.groups > len(chosen):
            raise OptionError(f"--groups {self.groups} is more than the {len(chosen)} layers that are to share; give at most {len(chosen)}")
        return groups_of(chosen, self.groups, self.pattern)

    def _fit(self, layer: Layer, path: Sequence[Layer], group: Sequence[int]) -> None:
        for part in [part for part in layer if part.removesuffix(".bias") in ("q", "k", "v", "o", "gate", "up", "down")]:
            layer[part] = layer[part]  # marks it as changed, for the plan
        if layer.activations:
            from effconvert.surgery.depth._fitted import fit_layer

            fit_layer(layer, path, group)
