"""Which tensors of a checkpoint transformers reads, by config and headers alone. It loads tensors that take no memory; stock means without effconvert."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.shards import CHUNK, FLOATS, StoredTensor
from effconvert.checkpoint.wrappers import head_prefix
from effconvert.errors import ModelError
from effconvert.modeling.loading import class_of
from effconvert.quantities import some
from effconvert.quiet import quiet_transformers
from effconvert.surgery._placed import open_checked

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors' code of the type, shape


@dataclass(frozen=True)
class Reading:
    """How a class of transformers reads the names and shapes of a checkpoint."""

    architecture: str  # the class, with the version of transformers
    parameters: int  # shared ones count once
    missing: tuple[str, ...]  # parameters that it would fill with random numbers
    mismatched: tuple[str, ...]  # tensors whose shape differs from the class's
    unread: frozenset[str]  # tensors that it does not read


def read_as_stock(config: Config, tensors: Shapes) -> Reading:
    """Return how the class that `config` names reads `tensors`.

    Raises:
        ModelError: transformers has no such class, or refuses the config.
    """
    import transformers

    stock = f"{config.architecture} of transformers {transformers.__version__}"
    if not config.needs_effconvert and not hasattr(transformers, config.architecture):
        raise ModelError(
            f"config.json names the class {config.architecture}, which transformers {transformers.__version__} does not have; "
            f"name one that it has in architectures, such as {config.family.lm}"
        )
    return read_by(stock, lambda: _class_and_config(config), tensors)


def _class_and_config(config: Config) -> tuple[Any, Any]:
    kind = class_of(config)
    return kind, kind.config_class.from_dict(config.content)


def read_by(stock: str, build: Callable[[], tuple[Any, Any]], tensors: Shapes) -> Reading:
    """Return how a class reads `tensors`. `stock` names it in messages; `build` returns the class and its config.

    Raises:
        ModelError: the class or its config cannot be built.
    """
    empty = {name: torch.empty(1, dtype=FLOATS.get(code, torch.uint8)).expand(shape or (1,)).view(shape) for name, (code, shape) in tensors.items()}
    try:
        with quiet_transformers(), torch.inference_mode(False):  # in which tied parameters could not be set
            kind, own = build()
            options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": {"": "meta"}}
            model, info = kind.from_pretrained(None, config=own, state_dict=empty, **options)
    except Exception as error:  # classes raise anything over a strange config
        advice = "install that package" if isinstance(error, ImportError) else "mend the file"
        raise ModelError(f"{stock} cannot be built from config.json ({type(error).__name__}: {' '.join(str(error).split())}); {advice}") from error
    names = {what: sorted(name if isinstance(name, str) else str(name[0]) for name in info[what]) for what in ("missing_keys", "mismatched_keys")}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Reading(stock, parameters, tuple(names["missing_keys"]), tuple(names["mismatched_keys"]), frozenset(info["unexpected_keys"]))


def open_as_stock(folder: Path) -> Checkpoint:
    """Open a model folder as transformers does. Tensors in layers that it does not read are left out; missing ones are refused.

    Raises:
        OptionError: there is no such folder, or no model in it.
        ModelError: the model is damaged, contradicts its config, lacks a tensor, or is of an unsupported kind.
    """
    checkpoint = open_checked(folder)
    config = checkpoint.config
    in_layers = {  # complete name -> tensor
        checkpoint.layer_prefix(index) + name: tensor
        for index, layer in enumerate(checkpoint.layers)
        for name, tensor in layer.items()
        if config.stored_in(index, name) == index
    }
    stored = {**checkpoint.outer, **in_layers}
    reading = read_as_stock(config, {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()})
    check_complete(folder, config, reading)
    check_tie(checkpoint)
    buffers = tuple(f".{name}" for name in config.family.buffers)
    unread = {name for name in in_layers if name in reading.unread and not name.endswith(buffers)}
    layers = tuple(
        {name: tensor for name, tensor in layer.items() if checkpoint.layer_prefix(index) + name not in unread} for index, layer in enumerate(checkpoint.layers)
    )
    return replace(checkpoint, layers=layers, ignored=(*checkpoint.ignored, *sorted(unread)), unread=reading.unread & checkpoint.outer.keys())


def check_complete(folder: Path, config: Config | None, reading: Reading) -> None:
    """Refuse a checkpoint that lacks tensors of its class. Without `config` the family is unknown.

    Raises:
        ModelError: the first tensors that are missing or of another shape are named.
    """
    if reading.mismatched:
        raise ModelError(f"{some(reading.mismatched)} in {folder} {_are(reading.mismatched)} of another shape than config.json gives {reading.architecture}")
    if not reading.missing:
        return
    lacks = f"{folder} has no {some(reading.missing)}, which {reading.architecture} reads and would fill with random numbers"
    if config and not config.tied and all(name.startswith(tuple(config.family.head.values())) for name in reading.missing):
        raise ModelError(f"{lacks}: config.json says tie_word_embeddings = false; say true if the head is the embedding, else fetch the missing file")
    raise ModelError(f"{lacks}; fetch the missing file, or name the class that the model was saved from in architectures")


def check_writable(config: Config, tensors: Shapes) -> None:
    """Check before writing that the output can be read: every tensor of a layer, and nothing missing.

    Raises:
        ModelError: it cannot, which is a fault of effconvert.
    """
    reading = read_as_stock(config, tensors)
    buffers = tuple(f".{name}" for name in config.family.buffers)
    prefix = f"{config.family.layers}."
    unread = tuple(sorted(name for name in reading.unread if prefix in name and not name.endswith(buffers)))
    wrong = {"missing": reading.missing, "of another shape": reading.mismatched, "unread": unread}
    if message := "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names):
        raise ModelError(f"{reading.architecture} could not open the output ({message}): a fault of effconvert, please report it")


def check_tie(checkpoint: Checkpoint) -> None:
    """Refuse a separate head in a model with tied embeddings: versions of transformers differ in which one they take.

    Raises:
        ModelError: both exist and differ.
    """
    config, family = checkpoint.config, checkpoint.config.family
    embedding = checkpoint.outer.get(f"{checkpoint.prefix}{family.outer['embed']}.weight")
    if not config.tied or embedding is None:
        return
    for module in family.head.values():
        head = checkpoint.outer.get(f"{head_prefix(checkpoint.prefix)}{module}.weight")
        if head is not None and head.shape == embedding.shape and not _same(head, embedding):
            raise ModelError(
                f"{head.name} and {embedding.name} in {checkpoint.folder} differ, and config.json says that they are one (tie_word_embeddings = true); "
                "say false if the head was trained, or remove it"
            )


def _same(head: StoredTensor, embedding: StoredTensor) -> bool:
    """Whether two tensors of one shape have the same bytes."""
    if head.dtype != embedding.dtype:
        return False
    with head.file.open("rb") as first, embedding.file.open("rb") as second:
        first.seek(head.start)
        second.seek(embedding.start)
        remaining = head.stop - head.start
        while remaining:
            size = min(remaining, CHUNK)
            if first.read(size) != second.read(size):
                return False
            remaining -= size
    return True


def _are(names: tuple[str, ...]) -> str:
    return "are" if len(names) > 1 else "is"
