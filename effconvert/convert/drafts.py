"""Drafts: converted layers in the working folder. Calibration computes them in order, and shards are written file by file."""

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
    """Return the name of each layer's draft; empty without calibration, where layers are computed as they are written."""
    return [f"layer-{index:05}{DRAFT}" for index in range(plan.config.layers)] if plan.needs_calibration else []


def save(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, float]) -> None:
    """Write the tensors of a converted layer, and the notes of steps on it, in one piece."""
    unfinished = file.with_name(f"{file.name}{DRAFT}")
    save_file({name: numbers.contiguous().cpu() for name, numbers in tensors.items()}, unfinished, {"notes": json.dumps(notes)})
    to_disk(unfinished)
    unfinished.replace(file)


def read(plan: Plan, index: int, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of layer `index` that the conversion changed."""
    return load_file(folder / names(plan)[index])


def discard_damaged(file: Path) -> None:
    """Remove a draft that cannot be read, so that its layer is computed again. Disks may lose data in a crash."""
    if file.is_file():
        try:
            read_header(file)
        except ModelError:
            file.unlink()


def notes(plan: Plan, folder: Path) -> dict[str, dict[str, float]]:
    """Return the notes of steps on layers: layer -> name -> value."""
    result = {}
    for index, name in enumerate(names(plan)):
        if (folder / name).is_file():
            with safe_open(folder / name, "pt") as file:
                result[str(index)] = json.loads((file.metadata() or {}).get("notes", "{}"))
    return {index: values for index, values in result.items() if values}


def discard(plan: Plan, folder: Path) -> None:
    """Remove all drafts, when everything is written."""
    for name in names(plan):
        (folder / name).unlink(missing_ok=True)
