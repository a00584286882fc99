"""Other family: a llama as the mistral that it is."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

from effconvert.surgery._surgery import Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config


class AsMistral(Surgery):
    """Write a llama as a mistral without a window."""

    def check(self, config: Config) -> None:
        """Refuse families that are no mistral."""
        config.become("mistral")

    def is_exact(self, config: Config) -> bool:
        """Yes: both classes compute the same."""
        return True

    def config(self, config: Config) -> Config:
        """Become a mistral, which has a window unless its config says otherwise."""
        return config.become("mistral").with_keys({"sliding_window": None})
