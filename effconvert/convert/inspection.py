"""Inspect a checkpoint: its size, its parts, and the techniques that fit, from its config and headers alone."""

import math
import re
from collections import Counter
from dataclasses import dataclass

from effconvert import steps
from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.shards import FLOATS, ITEMSIZE
from effconvert.errors import ModelError, OptionError, TechniqueError, UnknownLayoutError
from effconvert.modeling.caches import kv_bytes
from effconvert.modeling.size import Size, size_of
from effconvert.modeling.unknown import Described, Unknown, describe

CONTEXTS = (4096, 32768, 131072)
BROKEN = "its file is broken"  # begins the reason where a technique cannot be asked


@dataclass(frozen=True)
class Inspection:
    """The result of `effconvert inspect`."""

    checkpoint: Checkpoint
    size: Size
    parts: dict[str, int]  # part -> parameters, over all layers
    kv_bytes: dict[int, int]  # tokens of context -> bytes of KV cache
    allowed_options: dict[str, str]  # technique -> the options that this model allows
    refusals: dict[str, str]  # technique -> why it cannot be applied


@dataclass(frozen=True)
class Look:
    """The result of `effconvert inspect` for a model whose layout effconvert does not know."""

    model: Unknown
    described: Described | None  # None where transformers does not open it
    unconvertible: str  # why it cannot be converted
    unmeasurable: str  # why it cannot be measured; empty where it can


def inspect_unknown(model: Unknown, reason: UnknownLayoutError) -> Look:
    """Ask transformers what it can say of `model`, which cannot be converted for this `reason`."""
    described, unmeasurable = None, ""
    try:
        described = describe(model)
        described.check_measurable()
    except ModelError as error:
        unmeasurable = str(error)
    return Look(model, described, str(reason), unmeasurable)


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Inspect `checkpoint` without reading a weight."""
    config = checkpoint.config
    allowed_options, refusals = applicable(config)
    cache = {context: kv_bytes(config, ITEMSIZE[checkpoint.dtype], context) for context in CONTEXTS}
    return Inspection(checkpoint, size_of(checkpoint), parts(checkpoint), cache, allowed_options, refusals)


def applicable(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """Ask each technique about a model. Returns the options that it allows, of those that apply, and the reasons of the others."""
    allowed_options, refusals = {}, {}
    for name in steps.techniques():
        try:
            config.check_stored_apart()
            allowed_options[name] = steps.load(name).allowed_options(config)
        except (ModelError, OptionError) as error:  # the latter where no options are left, as of a technique that is in every layer
            refusals[name] = str(error)
        except Exception as error:  # of a technique that its author has to mend: what the others say of this model holds all the same
            refusals[name] = f"{BROKEN}: {error if isinstance(error, TechniqueError) else f'{name} fails with {error!r}'}"
    return allowed_options, refusals


def parts(checkpoint: Checkpoint) -> dict[str, int]:
    """Count the parameters of each part, biases with their matrices, and all experts together."""
    family = checkpoint.config.family
    counts: Counter[str] = Counter()
    places = {f"{checkpoint.prefix}{module}": part for part, module in family.outer.items()} | {module: part for part, module in family.head.items()}
    for name, tensor in checkpoint.outer.items():
        part = next((part for module, part in places.items() if name.startswith(f"{module}.")), "other")
        counts[part] += math.prod(tensor.shape) if tensor.dtype in FLOATS and not family.is_buffer(name) else 0
    for index in range(checkpoint.config.layers):
        layer = checkpoint.layer(index, "meta")
        for part in [part for part in layer if checkpoint.config.stored_for(index, part) == index]:
            counts[re.sub(r"^experts\.\d+", "experts", part.removesuffix(".bias"))] += layer[part].numel()
    return {part: number for part, number in counts.items() if number}  # old files contain position ids, which are no parameters
