"""Across layers: keep every second layer, and give it the mean of both layers' down projections."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from typing import TYPE_CHECKING

from effconvert.surgery._surgery import Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model


class EverySecondLayer(Surgery):
    """Drop every second layer. With an odd number of layers the last one stays as it is."""

    def check(self, config: Config) -> None:
        """Take every model."""

    def is_exact(self, config: Config) -> bool:
        """No."""
        return False

    def config(self, config: Config) -> Config:
        """Say which layers stay."""
        return config.with_layers(range(0, config.layers, 2))

    def rewrite(self, model: Model) -> None:
        """Put off the averaging until a layer is needed: two layers fit in memory, not the model."""
        for kept, dropped in zip(model.layers[::2], model.layers[1::2], strict=False):
            kept.later(partial(self._average, other=dropped))
        model.layers = model.layers[::2]

    def _average(self, layer: Layer, other: Layer) -> None:
        layer["down"] = (layer["down"] + other["down"]) / 2
