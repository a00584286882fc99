"""The tokens that a model is calibrated on: all that a plan has to know of calibration, without the transformers that it is run with."""
# N = windows, B = texts run at a time, T = tokens.

import hashlib
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from torch import Tensor

from effconvert.checkpoint.config import Config

BATCH, TOGETHER = 2, 1024  # windows that are run at a time at most, and tokens where more than one is


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on."""

    name: str  # of the text
    ids: Tensor  # token ids, [N, T]
    pieces: tuple[int, ...] = (1,)  # into how many texts each window is cut, a batch after the other in turn
    ends: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # tokens that begin and end a text, in place of its own
    key: str = ""  # identifies a text that the model writes, whose ids are on the meta device until it is written

    @property
    def batches(self) -> list[Tensor]:
        """The texts that are run at a time, [B, T]; all batches have about as many tokens, the first one the longest texts."""
        made = []
        for batch, pieces in zip(self.ids.split(at_a_time(self.ids.shape[1])), cycle(self.pieces), strict=False):
            length = batch.shape[1] // pieces
            texts = batch[:, : length * pieces].reshape(-1, length).clone()
            for place, token in enumerate(self.ends[0]):
                texts[:, place] = token
            for place, token in enumerate(reversed(self.ends[1])):
                texts[:, -1 - place] = token
            made.append(texts)
        return made

    @property
    def pending(self) -> bool:
        """Whether the text is still to be written."""
        return self.ids.is_meta

    @property
    def identity(self) -> str:
        """Identify the texts before they are written, too."""
        return self.key or self.sha256

    @property
    def sha256(self) -> str:
        """Identify the texts."""
        return hashlib.sha256(b"".join(f"{[*batch.shape]}".encode() + batch.numpy().tobytes() for batch in self.batches)).hexdigest()

    def notes(self, config: Config) -> str:
        """Say where there are fewer tokens than numbers to find for each output of a projection."""
        tokens, inputs = self.ids.numel(), max(config.hidden, config.heads * config.head_dim)
        return f"{tokens} tokens for {inputs} inputs: the statistics are singular, and regularised; give more --calibration-tokens" if tokens < inputs else ""

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        window = self.ids.shape[1]
        return {"text": self.name, "tokens": self.ids.numel(), "windows": [window // pieces for pieces in self.pieces], "sha256": self.sha256}


def at_a_time(window: int) -> int:
    """Return how many windows of so many tokens are run at a time."""
    return max(1, min(BATCH, TOGETHER // window))
