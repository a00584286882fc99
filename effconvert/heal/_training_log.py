"""The log of a training: its curve, its lines for people, and its progress bar."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from effconvert.progress import Advance

SCORE = "score_"  # what the names of scores begin with in the Trainer's log


@dataclass(frozen=True)
class Report:
    """What shows the progress of a training: it gets how much more of it is done, in tokens or in seconds, and lines of its log."""

    advance: Advance
    tell: Callable[[str], None]


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Tells a progress bar how far a training is, and how far the student is from the teacher after each evaluation."""

    def __init__(self, report: Report, done: Callable[[], int], tokens: int) -> None:
        self.report, self.done, self.tokens, self.reported = report, done, tokens, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar; a run that goes on begins with what was done before."""
        done = self.done()
        self.report.advance(done - self.reported)
        self.reported = done

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what was measured."""
        self.report.tell(line(points(state.log_history, self.tokens)[-1]))


class Clock(TrainerCallback):  # type: ignore[misc]
    """Measures the seconds of a step: the shortest, as the first ones are slow."""

    seconds = float("inf")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin to count."""
        self.began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count a step."""
        self.seconds = min(self.seconds, time.monotonic() - self.began)


def first_measurement(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a Trainer's log has of the measurement before the first step."""
    return next(entry for entry in history if "eval_loss" in entry)


def points(history: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return the curve of a Trainer's log, for steps of so many tokens."""
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    curve: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "eval_loss" in entry:  # a run that goes on measures its checkpoint again
            step = entry["step"]
            scores = {key.removeprefix(SCORE): value for key, value in entry.items() if key.startswith(SCORE)}
            point = {"tokens": step * tokens, "seconds": entry["seconds"], "held_out": entry["eval_loss"], "scores": scores}
            curve.setdefault(step, {**point, **({"loss": losses[step]} if step in losses else {})})
    return list(curve.values())


def line(point: dict[str, Any]) -> str:
    """Write a point of a curve for people."""
    loss = f", loss {point['loss']:.4f}" if "loss" in point else ""
    scores = "".join(f", {name} {value:.2f}" for name, value in point["scores"].items())
    return f"{point['tokens']:>12,.0f} tokens, {point['seconds']:.0f} s: held-out {point['held_out']:.4f}{loss}{scores}"
