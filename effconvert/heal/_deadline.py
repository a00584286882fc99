"""A training that ends after some minutes: its learning rate, its measurements and its end go by the clock."""

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

MEASURING = 0.2  # share of the time that measurements may take,
FEWEST = 2  # but for so many after the first


class Deadline(TrainerCallback):  # type: ignore[misc]
    """Measures the model and saves it when each part of the time is over, and ends the training with the last.

    Args:
        progress: returns the share of the time that is over.
        measured: returns the share of the time that a measurement takes.
        parts: of the time; they are fewer where so many measurements would take more than MEASURING of it.
    """

    def __init__(self, progress: Callable[[], float], measured: Callable[[], float], parts: int) -> None:
        self.progress, self.measured, self.parts, self.over = progress, measured, parts, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin with the part at which a run that goes on was stopped."""
        if state.global_step:
            self._choose_parts()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Learn from the first measurement how long one takes."""
        if not state.global_step:
            self._choose_parts()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask the Trainer for what is due."""
        part = self._part()
        if part > self.over:
            control.should_log = control.should_evaluate = control.should_save = True
        if part == self.parts:
            control.should_training_stop = True
        self.over = part

    def _choose_parts(self) -> None:
        self.parts = max(FEWEST, min(self.parts, int(MEASURING / max(self.measured(), 1e-9))))
        self.over = min(self._part(), self.parts - 1)  # the last part ends with a measurement, however long the first took

    def _part(self) -> int:
        return min(self.parts, int(self.progress() * self.parts))


def rate(progress: float, warmup: float) -> float:
    """Return the learning rate as a share of the highest: it rises in the first `warmup` of a training, and falls with a cosine."""
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) / 2
