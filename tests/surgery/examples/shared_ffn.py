"""Across layers: one FFN for each two layers, the mean of both."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from functools import partial
from typing import TYPE_CHECKING

from effconvert.surgery._surgery import Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model


class SharedFfn(Surgery):
    """Have each two layers share their FFN."""

    def check(self, config: Config) -> None:
        """Refuse what `with_shared` refuses."""
        self.config(config)

    def is_exact(self, config: Config) -> bool:
        """No."""
        return False

    def config(self, config: Config) -> Config:
        """Say of each pair of layers that its FFN is shared; an odd last layer keeps its own."""
        for first in range(0, config.layers - 1, 2):
            config = config.with_shared("ffn", (first, first + 1))
        return config

    def rewrite(self, model: Model) -> None:
        """Average the FFNs of a pair in its first layer, and share that."""
        for first, second in zip(model.layers[::2], model.layers[1::2], strict=False):
            first.later(partial(self._average, other=second))
            second.share(first, "ffn")

    def _average(self, layer: Layer, other: Layer) -> None:
        for part in [part for part in layer if part.partition(".")[0] in ("gate", "up", "down")]:
            layer[part] = (layer[part] + other.before(part)) / 2  # as it was before it shared
