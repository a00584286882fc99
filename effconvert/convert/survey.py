"""Run the whole model on the calibration text before it is converted, for steps that change what is outside the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effconvert.convert.plan import Plan
from effconvert.progress import Progress

if TYPE_CHECKING:
    from effconvert.heal._forward import Forward


def forward_of(plan: Plan, number: int, progress: Progress, title: str) -> Forward:
    """Return what runs the model before step `number` of a plan."""
    from effconvert.heal._forward import Forward  # imports transformers, so only where a model is run

    assert plan.calibration
    before = replace(plan, surgeries=plan.surgeries[:number], configs=plan.configs[: number + 1])
    return Forward(lambda: before.models("cpu")[-1], plan.calibration.batches, lambda steps: progress.bar(title, steps, "steps"))


@torch.no_grad()
def surveyed(plan: Plan, progress: Progress) -> Plan:
    """Return the plan with what its steps measure. A resumed run measures again: the same text gives the same numbers."""
    results: dict[int, Mapping[str, Tensor]] = {}
    for number in plan.surveying:
        step = plan.surgeries[number]
        results[number] = step.survey(forward_of(replace(plan, surveys=dict(results)), number, progress, f"{step.name}: reading the text"))
    return replace(plan, surveys=results)
