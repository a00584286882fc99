"""The tokens that a model is calibrated on. A plan needs these alone, so nothing here imports transformers."""
# N = windows, B = texts run at a time, T = tokens.

import hashlib
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from torch import Tensor

from effconvert.checkpoint.config import Config

BATCH = 1  # windows in a batch: each is a step of `transfer`, and these learn more from a text than half as many of two windows


@dataclass(frozen=True)
class Calibration:
    """The texts that a model is calibrated on."""

    name: str  # of the text
    ids: Tensor  # token ids, [N, T]
    pieces: tuple[int, ...] = (1,)  # how many texts each window is cut into; batches take these numbers in turn
    ends: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # special tokens that replace the first and last tokens of each text
    key: str = ""  # identifies a text that the model writes, whose ids are on the meta device until it is written

    @property
    def batches(self) -> list[Tensor]:
        """The texts of each batch, [B, T]: windows, or their pieces; the first batch has the longest texts."""
        batches = []
        for batch, pieces in zip(self.ids.split(BATCH), cycle(self.pieces), strict=False):
            length = batch.shape[1] // pieces
            texts = batch[:, : length * pieces].reshape(-1, length).clone()
            for place, token in enumerate(self.ends[0]):
                texts[:, place] = token
            for place, token in enumerate(reversed(self.ends[1])):
                texts[:, -1 - place] = token
            batches.append(texts)
        return batches

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
        """The hash of all texts."""
        return hashlib.sha256(b"".join(f"{[*batch.shape]}".encode() + batch.numpy().tobytes() for batch in self.batches)).hexdigest()

    def notes(self, config: Config) -> str:
        """Warn where there are fewer tokens than inputs of a projection."""
        tokens, inputs = self.ids.numel(), max(config.hidden, config.heads * config.head_dim)
        return f"{tokens} tokens for {inputs} inputs: the statistics are singular, and regularised; give more --calibration-tokens" if tokens < inputs else ""

    @property
    def record(self) -> dict[str, Any]:
        """The manifest's entry."""
        window = self.ids.shape[1]
        return {"text": self.name, "tokens": self.ids.numel(), "windows": [window // pieces for pieces in self.pieces], "sha256": self.sha256}
