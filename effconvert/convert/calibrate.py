"""Run the calibration text through a model while it is converted, layer by layer. Each layer gets the outputs of the *converted* layers below it.

Steps that need activations run here. Converted layers are saved as drafts in the output's working folder, and the shards are written from these.
After a kill, the next run reads the finished drafts. It runs these layers only to get the inputs of the next.
"""

from pathlib import Path

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.shards import NUMBERS, rounded
from effconvert.convert import drafts
from effconvert.convert.plan import Plan
from effconvert.heal._activations import Activations
from effconvert.heal._tensors import return_memory, stored_tensors
from effconvert.progress import Progress


@torch.no_grad()  # not inference mode: transfer trains on these tensors
def calibrate(plan: Plan, folder: Path, progress: Progress) -> None:
    """Convert the layers of `plan` in order, with activations, and save each as a draft in `folder`.

    Raises:
        ModelError: the model computes NaN or infinity.
    """
    assert plan.calibration
    ids = plan.calibration.ids
    after = [model.outer.on_top(config) for model, config in zip(plan.models("cpu"), plan.configs[1:], strict=False)]
    outer = [plan.checkpoint.model("cpu").outer, *after]  # the configs know of all changes outside the layers
    activations = Activations(plan.checkpoint, plan.teacher, outer, plan.calibration.batches)
    activations.turn = None
    layers: list[Layer | None] = [*plan.models("cpu", activations)[-1].layers]
    with progress.bar("calibrating", len(layers) * ids.numel(), "tokens") as advance:
        for index in range(len(layers)):
            layer, file = layers[index], folder / drafts.names(plan)[index]
            users = [later for later in range(index, len(layers)) if index in {later, plan.config.cache_of(later), *plan.config.leaders(later)}]
            drafts.discard_damaged(file)
            complete = all((folder / drafts.names(plan)[user]).is_file() for user in users)
            activations.turn = layer.source_index if layer is not None else None
            if layer is not None and not complete:  # not `if layer`, which computes its length
                tensors = {name: numbers.to(NUMBERS[origin.dtype]) for name, (origin, numbers, new) in stored_tensors(layer, stored=True).items() if new}
                if not file.is_file():  # else the layer was computed again for a later one, before activations advance
                    drafts.save(file, tensors, activations.notes.get(index, {}))
            activations.advance(index, _layer_tensors(plan, index, folder))
            layers[index] = None  # its tensors are on disk
            return_memory()
            advance(ids.numel())


def _layer_tensors(plan: Plan, index: int, folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a converted layer but the family's buffers, in float32; whole numbers as they are."""
    targets, buffers = plan.layer_targets(index), plan.config.family.buffers
    changed = {unit: drafts.read(plan, unit, folder) for unit in {target.unit for target in targets.values()} if unit is not None}
    return {
        name: target.origin.own("cpu") if target.unit is None else rounded(changed[target.unit][name], target.dtype)
        for name, target in targets.items()
        if name not in buffers
    }
