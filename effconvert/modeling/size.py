"""The size of a model: parameters, bytes on disk, and bytes of cache for a token."""

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
    """The size of a model."""

    parameters: int  # a tied head is not counted again
    bytes: int  # on disk
    kv_bytes: int  # of the KV cache, for a token
    state_bytes: int = 0  # of the states of techniques for a sequence, however short
    growth_bytes: int = 0  # of kv_bytes, the growth of states for a token, an average
    active: int = 0  # parameters that a token uses: of experts only the chosen ones


def size_of(checkpoint: Checkpoint) -> Size:
    """Return the size of a checkpoint."""
    unread = {checkpoint.outer[name] for name in checkpoint.unread}
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.stored if tensor not in unread]
    return size_of_tensors(tensors, checkpoint.config, checkpoint.dtype)


def size_of_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...]]], config: Config, dtype: str) -> Size:
    """Return the size of a model of these tensors (name, type, shape), with keys and values of type `dtype`."""
    tensors, family = list(tensors), config.family
    embedding = next((shape for name, _, shape in tensors if name.endswith(f"{family.outer['embed']}.weight")), None)
    heads = tuple(family.head.values())
    copies = (".embed_tokens.weight",) if config.encoder_decoder else ()  # of the encoder and the decoder, in old files
    parameters = sum(
        math.prod(shape)
        for name, dtype, shape in tensors
        if dtype in FLOATS and not family.is_buffer(name) and not (config.tied and shape == embedding and (name.startswith(heads) or name.endswith(copies)))
    )
    on_disk = sum(math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in tensors)
    idle = _experts(tensors, config) * (config.experts - config.top_k) // max(1, config.experts)
    itemsize = ITEMSIZE[dtype]
    softmax, growth = kv_bytes(config, itemsize, 1) - state_bytes(config, itemsize, 1), growth_bytes(config, itemsize)
    return Size(parameters, on_disk, softmax + growth, state_bytes(config, itemsize), growth, parameters - idle)


def _experts(tensors: Iterable[tuple[str, str, tuple[int, ...]]], config: Config) -> int:
    """Return how many parameters are in experts that tokens choose from."""
    modules = [re.escape(module).replace(r"\*", r"\d+") for part, module in config.family.parts.items() if part.startswith("experts.")]
    pattern = re.compile(rf"\.({'|'.join(modules)})\.weight$")
    return sum(math.prod(shape) for name, _, shape in tensors if modules and pattern.search(name))
