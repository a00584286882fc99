"""The tensors that a walk over the layers reads and writes: those outside the layers, a layer as it will be on disk, and the memory that they take."""
# V = vocabulary, M = hidden width.

import ctypes
from collections.abc import Sequence
from contextlib import suppress

import numpy
import torch
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.outer import Outer
from effconvert.checkpoint.parts import ROWS, Deferred
from effconvert.checkpoint.replaced import OWN
from effconvert.checkpoint.shards import StoredTensor, is_finite, rounded
from effconvert.errors import ModelError
from effconvert.surgery._placed import table_rows


def outer_tensors(outer: Outer, ids: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the bare model's tensors outside the layers, by their names in it; only the rows of `ids` of the embedding."""
    config, tokens = outer.config, torch.cat([batch.flatten() for batch in ids]).cpu()
    tensors: dict[str, Tensor] = {}
    if config.replaced_outside("embed"):
        table = embedding_rows(outer, (config.vocabulary, config.embed_width), tokens)
        tensors[f"{config.family.outer['embed']}.weight"] = table.to(ids[0].device)
    for part, name, origin, value in outer.bare():
        if part.startswith("decoder."):
            continue  # behind the layers
        if value is None:
            value = embedding_rows(outer, origin.shape, tokens) if part == "embed" else origin.read("cpu")
        numbers = value.compute() if isinstance(value, Deferred) else value
        tensors[name] = numbers.to(ids[0].device)
    return tensors


def zero_sublayer(layer: Layer, place: str) -> Layer:
    """Return a copy of a layer whose attention or ffn adds zero: its output projection is zero, and what a technique has there."""
    copy = layer.on_top(layer.index, layer.config)
    for part in [part for part in layer.config.sublayer(place) if part == "o" or part.endswith("down")]:
        for name in [name for name in layer if name in (part, f"{part}.bias") or name.startswith(f"{part}.{OWN}")]:
            copy[name] = torch.zeros_like(layer[name])
    return copy


def check_finite(tensors: Sequence[Tensor], where: str) -> None:
    """Refuse NaN and infinity, on which linear algebra would fail later."""
    if not all(map(is_finite, tensors)):
        raise ModelError(f"{where} computes NaN or infinity on the calibration text; give another --calibrate, or ask the model's author")


def stored_tensors(layer: Layer, stored: bool = False) -> dict[str, tuple[StoredTensor, Tensor, bool]]:
    """Return a layer as it will be on disk: name in the layer -> source tensor, numbers rounded to its dtype, whether the numbers are new.

    Args:
        stored: leave out tensors that an earlier layer stores for this one.
    """
    tensors: dict[str, tuple[StoredTensor, Tensor, bool]] = {}
    for name, origin, tensor in layer.tensors(stored):
        if name in layer.config.family.buffers:
            continue
        numbers = tensor.compute() if isinstance(tensor, Deferred) else tensor
        after = origin.own("cpu") if numbers is None else rounded(numbers, origin.dtype)
        tensors[name] = (origin, after, numbers is not None)
    return tensors


def return_memory() -> None:
    """Make glibc return freed memory to the system; it would keep some hundred megabytes for each layer."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries return it by themselves
        ctypes.CDLL(None).malloc_trim(0)


def embedding_rows(outer: Outer, shape: tuple[int, ...], ids: Tensor) -> Tensor:
    """Return the embedding table, [V, M] by `shape`, with only the rows of `ids` filled; the pages of other rows take no memory."""
    table = torch.from_numpy(numpy.zeros(shape, numpy.float32))  # torch.zeros would write every page
    for rows in ids.unique().split(ROWS):
        table[rows] = table_rows(outer, "embed", rows)
    return table
