"""Converted layers that wait in the working folder, where they are computed in order and written file by file."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from effconvert.checkpoint.manifest import DRAFT, to_disk
from effconvert.checkpoint.shards import read_header
from effconvert.convert.plan import Plan
from effconvert.errors import ModelError


def names(plan: Plan) -> list[str]:
    """Return the name of each layer's draft; none where layers are computed when they are written."""
    return [f"layer-{index:05}{DRAFT}" for index in range(plan.config.layers)] if plan.needs_calibration else []


def save(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, float]) -> None:
    """Write what became of a layer, and what steps noted of it, in one piece."""
    unfinished = file.with_name(f"{file.name}{DRAFT}")
    save_file({name: numbers.contiguous().cpu() for name, numbers in tensors.items()}, unfinished, {"notes": json.dumps(notes)})
    to_disk(unfinished)
    unfinished.replace(file)


def read(plan: Plan, index: int, folder: Path) -> dict[str, Tensor]:
    """Return what became of layer `index`, but for what did not change."""
    return load_file(folder / names(plan)[index])


def discard_damaged(file: Path) -> None:
    """Remove a draft that cannot be read, so that its layer is computed again: a disk may lose what it had."""
    if file.is_file():
        try:
            read_header(file)
        except ModelError:
            file.unlink()


def notes(plan: Plan, folder: Path) -> dict[str, dict[str, float]]:
    """Return what steps noted of the layers they looked at: layer -> what."""
    noted = {}
    for index, name in enumerate(names(plan)):
        if (folder / name).is_file():
            with safe_open(folder / name, "pt") as file:
                noted[str(index)] = json.loads((file.metadata() or {}).get("notes", "{}"))
    return {index: of_layer for index, of_layer in noted.items() if of_layer}


def discard(plan: Plan, folder: Path) -> None:
    """Remove them: all is written."""
    for name in names(plan):
        (folder / name).unlink(missing_ok=True)
