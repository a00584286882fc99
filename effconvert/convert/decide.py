"""Choose options that steps leave open, such as which layers to drop. This precedes the plan, so recipe, plan and fingerprint contain the choice.

A choice takes a while, so it is cached by everything that it depends on. After a dry run or an interrupted run it is read from there.
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
from effconvert.convert.calibration import check_caches, prepare
from effconvert.convert.code import code_of
from effconvert.convert.plan import Plan, plan
from effconvert.convert.survey import forward_of
from effconvert.errors import OptionError
from effconvert.eval.results import versions
from effconvert.options import RunOptions
from effconvert.progress import Progress
from effconvert.steps import arguments
from effconvert.surgery._surgery import Step


def decide(
    checkpoint: Checkpoint, steps: Sequence[Step], teacher: Checkpoint | None, options: RunOptions, progress: Progress
) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """Return `steps` with all options set, and a sentence on each choice. Steps choose the open ones by running the model.

    Raises:
        OptionError, ModelError: a step does not fit the model, the text is too short, or the model cannot be run on it.
    """
    complete: list[Step] = []
    choices: list[str] = []
    for step in steps:
        if step.undecided:
            before = plan(checkpoint, tuple(complete), teacher)
            before.config.check_stored_apart()
            step.check(before.config)
            check_caches(before.config, "the model", f"give the options that {step.name} would choose, or choose before the cache is shared")
            if before.needs_text:
                earlier = complete[-1].name
                raise OptionError(
                    f"{step.name} chooses by running the model, and {earlier} before it is not fitted yet; convert twice, "
                    f"or put {step.name} first, where {earlier} can follow it"
                )
            calibration = selftext.write(before, prepare(before, options), progress)
            choice = _decide(step, replace(before, calibration=calibration), progress)
            text = f"{' '.join(calibration.name.split())}, {calibration.ids.numel():,} tokens"
            choices.append(f"{_typed(step)} chose {_typed(choice)} (by {step.rule}; text: {text})")
            step = choice
        complete.append(step)
    return tuple(complete), tuple(choices)


def _typed(step: Step) -> str:
    return " ".join([step.name, *arguments(step.name, step.recipe[step.name])])


def _decide(step: Step, before: Plan, progress: Progress) -> Step:
    file = _cache_file(step, before)
    with suppress(OSError, ValueError, OptionError):
        return type(step)(**json.loads(file.read_bytes()))
    with torch.no_grad():
        choice = step.decide(forward_of(before, len(before.surgeries), progress, f"{step.name}: choosing"))
    _save(file, choice)
    return choice


def _cache_file(step: Step, before: Plan) -> Path:
    key = json.dumps([before.fingerprint, step.recipe, code_of(step), versions()], default=str)
    return cache() / "chosen" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _save(file: Path, choice: Step) -> None:
    """Write a choice in one piece. If the disk cannot be written, the next run chooses again."""
    draft = file.with_name(f"{file.name}.{os.getpid()}.draft")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(choice.model_dump_json(), encoding="utf-8")
        draft.replace(file)
