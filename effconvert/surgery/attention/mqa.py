"""Share one key and value head among all query heads (MQA)."""

from __future__ import annotations  # what only types need is not imported: `--help` must not wait for torch

from typing import TYPE_CHECKING

from effconvert.surgery._surgery import Surgery
from effconvert.surgery.attention.gqa import POOL, Gqa, Pool, choices

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer


class Mqa(Surgery):
    """Share one key and value head among all query heads (MQA).

    The same as `effconvert gqa --groups 1`; a gpt2 becomes a gpt_bigcode. Shazeer 2019, arXiv 1911.02150.

    \b
    Examples:
      effconvert mqa --refit openai-community/gpt2
      effconvert mqa --calibrate mine.txt ./SmolLM2-135M -o ./mqa
    """

    pool: Pool = POOL

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """Nothing to choose."""
        choices(config)
        return "as it is"

    def check(self, config: Config) -> None:
        """As `Gqa` with one group."""
        self._gqa.check(config)

    def is_exact(self, config: Config) -> bool:
        """As `Gqa` with one group."""
        return self._gqa.is_exact(config)

    def config(self, config: Config) -> Config:
        """As `Gqa` with one group."""
        return self._gqa.config(config)

    def needs_calibration(self, config: Config) -> bool:
        """As `Gqa` with one group."""
        return self._gqa.needs_calibration(config)

    def notes(self, config: Config) -> str:
        """As `Gqa` with one group."""
        return self._gqa.notes(config)

    def layer(self, layer: Layer) -> None:
        """As `Gqa` with one group."""
        self._gqa.layer(layer)

    @property
    def _gqa(self) -> Gqa:
        return Gqa(groups=1, pool=self.pool)
