"""Across layers: each second layer reads the keys and values of the one before it."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

from effconvert.surgery._surgery import Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Model


class LentCache(Surgery):
    """Halve the cache: each second layer reads the keys and values of the one before it."""

    def check(self, config: Config) -> None:
        """Refuse what `with_shared` refuses."""
        self.config(config)

    def is_exact(self, config: Config) -> bool:
        """No."""
        return False

    def config(self, config: Config) -> Config:
        """Say of each pair of layers that its cache is shared; an odd last layer keeps its own."""
        for first in range(0, config.layers - 1, 2):
            config = config.with_shared("cache", (first, first + 1))
        return config

    def rewrite(self, model: Model) -> None:
        """Take the parts of keys and values from each second layer."""
        for first, second in zip(model.layers[::2], model.layers[1::2], strict=False):
            second.share(first, "cache")
