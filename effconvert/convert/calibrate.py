"""Run a model on a text while it is converted, layer by layer: each is fed by the *converted* layers below it, which is what it will see.

Steps that look at what layers compute do so here. What becomes of a layer is left in the output's working folder, from where it is written, so a
killed run takes the finished layers from there, and runs them, but for nothing else.
"""

from pathlib import Path

import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.shards import FLOATS
from effconvert.convert import drafts
from effconvert.convert.plan import Plan
from effconvert.heal._activations import Activations
from effconvert.heal._layerwise import return_memory, stored_tensors
from effconvert.progress import Progress


@torch.no_grad()  # and not inference mode: transfer trains on what is made here
def calibrate(plan: Plan, folder: Path, progress: Progress) -> None:
    """Convert the layers of `plan` one after the other, looking at what they compute, and leave what became of each in `folder`.

    Raises:
        ModelError: the model computes NaN or infinity.
    """
    assert plan.calibration
    ids = plan.calibration.ids
    after = [model.outer.on_top(config) for model, config in zip(plan.models("cpu"), plan.configs[1:], strict=False)]
    outer = [plan.checkpoint.model("cpu").outer, *after]  # none has changes in it that its config knows nothing of
    activations = Activations(plan.checkpoint, plan.teacher, outer, plan.calibration.batches)
    layers: list[Layer | None] = [*plan.models("cpu", activations)[-1].layers]
    with progress.bar("calibrating", len(layers) * ids.numel(), "tokens") as advance:
        for index in range(len(layers)):
            layer, file = layers[index], folder / drafts.names(plan)[index]
            waited = [folder / drafts.names(plan)[other] for other in range(index, len(layers)) if index in {other, *plan.config.leaders(other)}]
            drafts.discard_damaged(file)
            if layer is not None and not all(draft.is_file() for draft in waited):  # a layer's truth value would be its number of parts, and compute it
                made = {name: numbers.to(FLOATS[origin.dtype]) for name, (origin, numbers, new) in stored_tensors(layer, stored=True).items() if new}
                if not file.is_file():  # what it stores for a later layer, which is still to be made, was computed again: activations have gone on by then
                    drafts.save(file, made, activations.notes.get(index, {}))
            activations.advance(index, _finished(plan, index, folder))
            layers[index] = None  # what it computed is on disk
            return_memory()
            advance(ids.numel())


def _finished(plan: Plan, index: int, folder: Path) -> dict[str, Tensor]:
    """Return all of a layer of the converted model, in float32."""
    inside, buffers = plan.inside(index), plan.config.family.buffers
    made = {unit: drafts.read(plan, unit, folder) for unit in {target.unit for target in inside.values()} if unit is not None}
    return {
        name: target.origin.read("cpu") if target.unit is None else made[target.unit][name].float() for name, target in inside.items() if name not in buffers
    }
