"""Which files beside the weights belong to a model, and go along."""

import os
from collections.abc import Iterator
from pathlib import Path

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import CONFIG
from effconvert.checkpoint.manifest import CARD, MANIFEST, RECIPE
from effconvert.checkpoint.replaced import STUB_FILE
from effconvert.checkpoint.tensors import PICKLES
from effconvert.errors import ModelError

WEIGHTS = (".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".mlmodel", *PICKLES)


def other_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what else belongs to the model: tokenizer, generation config, chat template, licence, code.

    Raises:
        ModelError: a link among them leads out of the folder.
    """
    folder = checkpoint.folder
    shards = {tensor.file for tensor in checkpoint.stored}
    ours = (CONFIG, MANIFEST, RECIPE, CARD, STUB_FILE)
    return tuple(sorted(name for path, name in _walk(folder, "", home(folder)) if path not in shards and name not in ours))


def home(folder: Path) -> Path:
    """Return where links may lead: the folder, or for a snapshot in huggingface_hub's cache the folder of all its versions."""
    place = folder.resolve()
    return place.parent.parent if place.parent.name == "snapshots" else place


def _walk(folder: Path, above: str, bounds: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__" or path.name.endswith(WEIGHTS):
            continue
        if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(bounds)):
            raise ModelError(f"{path} is a link to {path.resolve()}, and what it leads to would be copied; remove it, or put the file itself there")
        if path.is_dir():
            yield from _walk(path, f"{above}{path.name}/", bounds)
        elif path.is_file() and os.access(path, os.R_OK):
            yield path, above + path.name
        else:
            raise ModelError(f"{path} is among the model's files and cannot be read; remove it, or make it readable")
