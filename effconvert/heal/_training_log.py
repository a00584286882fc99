"""The log of a training: its curve, its lines for people, and its progress bar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from effconvert.progress import Advance


@dataclass(frozen=True)
class Report:
    """What shows the progress of a training: told the number of tokens done, and lines of its log."""

    advance: Advance
    tell: Callable[[str], None]


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Tells a progress bar how many tokens are done, and how far the student is after each evaluation."""

    def __init__(self, advance: Advance, tell: Callable[[str], None], tokens: int) -> None:
        self.advance, self.tell, self.tokens, self.done = advance, tell, tokens, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar; a run that goes on begins with what was done before."""
        self.advance((state.global_step - self.done) * self.tokens)
        self.done = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what was measured."""
        self.tell(line(points(state.log_history, self.tokens)[-1]))


def points(history: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return the curve of a Trainer's log, for steps of so many tokens."""
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    found: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "eval_loss" in entry:  # a run that goes on measures its checkpoint again
            step = entry["step"]
            point = {"tokens": step * tokens, "seconds": entry["seconds"], "held_out": entry["eval_loss"]}
            found.setdefault(step, {**point, **({"loss": losses[step]} if step in losses else {})})
    return list(found.values())


def line(point: dict[str, Any]) -> str:
    """Write a point of a curve for people."""
    loss = f", loss {point['loss']:.4f}" if "loss" in point else ""
    return f"{point['tokens']:>12,.0f} tokens, {point['seconds']:.0f} s: held-out {point['held_out']:.4f}{loss}"
