"""The course of a training, as the manifest keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MEASURES = {"kl": "KL(original || model), nats a token", "hidden": "distance of hidden states"}  # on held-out text


@dataclass(frozen=True)
class Point:
    """What was measured after some tokens of training."""

    tokens: int
    seconds: float
    held_out: float
    loss: float | None = None  # the mean since the point before
    scores: Mapping[str, float] = field(default_factory=dict)  # of tasks and passkeys, by name


@dataclass(frozen=True)
class Training:
    """A training towards another model's predictions."""

    text: str
    sha256: str  # of its tokens
    measure: str  # of the distance on held-out windows: kl or hidden
    before: float
    after: float  # of the model that was written: the least of the curve
    curve: tuple[Point, ...]
    held_out_windows: int
    cache: Mapping[str, Any] | None = None  # what was kept of the original's predictions, where it was not in memory

    @property
    def unit(self) -> str:
        """What the distance on held-out windows is."""
        return MEASURES.get(self.measure, self.measure)

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of what else was measured on the way."""
        return tuple(dict.fromkeys(name for point in self.curve for name in point.scores))

    @property
    def closed(self) -> float | None:
        """The share of the distance that training closed; None where there was none."""
        return 1 - self.after / self.before if self.before else None
