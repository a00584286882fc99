"""What a model weighs: parameters, bytes on disk, and what a token takes in its cache."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.shards import FLOATS, ITEMSIZE
from effconvert.modeling.caches import growth_bytes, kv_bytes, state_bytes


@dataclass(frozen=True)
class Size:
    """What a model weighs."""

    parameters: int  # a tied head is not counted again
    bytes: int  # on disk
    kv_bytes: int  # of the KV cache, for a token
    state_bytes: int = 0  # of what techniques remember of a sequence, however short it is
    growth_bytes: int = 0  # of kv_bytes, what techniques remember: an average
    active: int = 0  # of the parameters, those that a token uses: of experts only the chosen ones


def size_of(checkpoint: Checkpoint) -> Size:
    """Return what a checkpoint weighs."""
    unread = {checkpoint.outer[name] for name in checkpoint.unread}
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.stored if tensor not in unread]
    return size_of_tensors(tensors, checkpoint.config, checkpoint.dtype)


def size_of_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...]]], config: Config, dtype: str) -> Size:
    """Return what a model of these tensors (name, type, shape) weighs, whose keys and values are of type `dtype`."""
    tensors, family = list(tensors), config.family
    embedding = next((shape for name, _, shape in tensors if name.endswith(f"{family.outer['embed']}.weight")), None)
    heads = tuple(family.head.values())
    parameters = sum(
        math.prod(shape)
        for name, dtype, shape in tensors
        if dtype in FLOATS
        and not name.endswith(tuple(f".{buffer}" for buffer in family.buffers))
        and not (config.tied and name.startswith(heads) and shape == embedding)
    )
    on_disk = sum(math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in tensors)
    idle = _experts(tensors, config) * (config.experts - config.top_k) // max(1, config.experts)
    itemsize = ITEMSIZE[dtype]
    softmax, growth = kv_bytes(config, itemsize, 1) - state_bytes(config, itemsize, 1), growth_bytes(config, itemsize)
    return Size(parameters, on_disk, softmax + growth, state_bytes(config, itemsize), growth, parameters - idle)


def _experts(tensors: Iterable[tuple[str, str, tuple[int, ...]]], config: Config) -> int:
    """Return how many of the parameters are in experts of which a token chooses some."""
    modules = [re.escape(module).replace(r"\*", r"\d+") for part, module in config.family.parts.items() if part.startswith("experts.")]
    inside = re.compile(rf"\.({'|'.join(modules)})\.weight$")
    return sum(math.prod(shape) for name, _, shape in tensors if modules and inside.search(name))
