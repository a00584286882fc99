"""What a model weighs: from its config and headers alone, whatever else lies in its folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from effconvert.convert.checkpoint import Checkpoint
from effconvert.convert.config import Config
from effconvert.convert.shards import FLOATS, ITEMSIZE


@dataclass(frozen=True)
class Size:
    """What a model weighs."""

    parameters: int  # a tied head is not counted again
    bytes: int  # on disk
    kv_bytes: int  # of the KV cache, for a token
    state_bytes: int = 0  # of what mixers remember of a sequence, however short it is
    growth_bytes: int = 0  # of kv_bytes, what mixers remember: an average


def size_of(checkpoint: Checkpoint) -> Size:
    """Return what the model on disk weighs."""
    return weigh([(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.stored], checkpoint.config, checkpoint.dtype)


def weigh(tensors: Sequence[tuple[str, str, tuple[int, ...]]], config: Config, dtype: str) -> Size:
    """Return what a model weighs that has these tensors (name, type, shape) and a cache of type `dtype` (safetensors' codes)."""
    family = config.family
    embedding = next((shape for name, _, shape in tensors if name.endswith(f"{family.outer['embed']}.weight")), None)
    heads = tuple(family.head.values())
    parameters = sum(
        math.prod(shape)
        for name, kind, shape in tensors
        if kind in FLOATS
        and not name.endswith(tuple(f".{buffer}" for buffer in family.buffers))
        and not (config.tied and name.startswith(heads) and shape == embedding)
    )
    on_disk = sum(math.prod(shape) * ITEMSIZE[kind] for _, kind, shape in tensors)
    itemsize = ITEMSIZE[dtype]
    softmax, growth = config.kv_bytes(itemsize, 1) - config.state_bytes(itemsize, 1), config.growth_bytes(itemsize)
    return Size(parameters, on_disk, softmax + growth, config.state_bytes(itemsize), growth)
