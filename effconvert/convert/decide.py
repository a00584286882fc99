"""Choose what steps leave open, such as which layers go, before anything is planned: recipe, plan and fingerprint speak of what was chosen.

A choice takes a while, so it is kept by everything that it depends on: after a dry run, or a run that was cut off, nobody chooses again.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.sources import cache
from effconvert.convert import selftext
from effconvert.convert.calibration import prepare
from effconvert.convert.plan import Plan, plan
from effconvert.errors import OptionError
from effconvert.eval.results import versions
from effconvert.options import RunOptions
from effconvert.progress import Progress
from effconvert.surgery._surgery import Step


def decide(checkpoint: Checkpoint, steps: Sequence[Step], teacher: Checkpoint | None, options: RunOptions, progress: Progress) -> tuple[Step, ...]:
    """Return `steps` with options that leave nothing open: what they leave to be chosen is chosen by what the model computes.

    Raises:
        OptionError, ModelError: a step cannot be done, the text is too short, or the model cannot be run on it.
    """
    decided: list[Step] = []
    for step in steps:
        if step.undecided:
            before = plan(checkpoint, tuple(decided), teacher)
            step.check(before.config)
            if before.needs_calibration:
                raise OptionError(
                    f"{step.name} chooses by what the model computes, and that is not known while {decided[-1].name} before it is still to be fitted; "
                    f"put {step.name} first, or convert twice"
                )
            step = _decide(step, replace(before, calibration=selftext.write(before, prepare(before, options), progress)), progress)
        decided.append(step)
    return tuple(decided)


def _decide(step: Step, before: Plan, progress: Progress) -> Step:
    place = _place(step, before)
    with suppress(OSError, ValueError, OptionError):
        return type(step)(**json.loads(place.read_bytes()))
    from effconvert.heal._forward import Forward  # which imports transformers: who has nothing to choose does not wait for it

    assert before.calibration
    forward = Forward(lambda: before.models("cpu")[-1], before.calibration.batches, lambda steps: progress.bar(f"{step.name}: choosing", steps, "steps"))
    with torch.no_grad():
        chosen = step.decide(forward)
    _keep(place, chosen)
    return chosen


def _place(step: Step, before: Plan) -> Path:
    key = json.dumps([before.fingerprint, step.recipe, versions()], default=str)
    return cache() / "chosen" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _keep(place: Path, chosen: Step) -> None:
    """Write a choice in one piece. A disk that cannot be written costs time later, and nothing now."""
    draft = place.with_name(f"{place.name}.{os.getpid()}.draft")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(chosen.model_dump_json(), encoding="utf-8")
        draft.replace(place)
