"""A checkpoint as a sequence of lazy layers: the tensors of a folder, sorted by the family's row.

Opening reads only the config and the headers: kilobytes, whatever the model's size. Damaged or contradictory files are refused.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import ActivationsProtocol, Layer, Model
from effconvert.checkpoint.outer import Outer, outer_part
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.replaced import OWN
from effconvert.checkpoint.shards import FLOATS, StoredTensor
from effconvert.checkpoint.tensors import check_plain, read_tensors
from effconvert.checkpoint.wrappers import PREFIXES, head_prefix
from effconvert.errors import ModelError, OptionError, UnknownLayoutError
from effconvert.quantities import some

HEAD_PREFIXES = ("transformer.",)  # of the base model in classes with their own name for it: ...ForQuestionAnswering


@dataclass(frozen=True)
class Checkpoint:
    """The content of a folder: a config, the tensors outside the layers, and those of each layer (name inside the layer -> tensor)."""

    folder: Path
    config: Config
    prefix: str  # of the base model in the names on disk, with its dot; may be empty
    outer: Mapping[str, StoredTensor]  # full name -> tensor
    layers: tuple[Mapping[str, StoredTensor], ...]  # a shared tensor is in each of its layers
    ignored: tuple[str, ...] = ()  # tensors in layers that transformers does not read; they are not copied
    unread: frozenset[str] = frozenset()  # those outside the layers, such as the pooler of a language model; they are copied
    remarks: tuple[str, ...] = ()  # oddities of the folder that do no harm

    def layer(
        self, index: int, device: str, originals: range | None = None, activations: ActivationsProtocol | None = None, teacher: Config | None = None
    ) -> Layer:
        """Return layer `index`, its tensors on `device` (cpu, or meta for shapes alone); see `Layer` for the rest."""
        return Layer(index, self.config, self.layers[index], device, originals=originals, activations=activations, teacher=teacher)

    def model(
        self, device: str, originals: Sequence[range] | None = None, activations: ActivationsProtocol | None = None, teacher: Config | None = None
    ) -> Model:
        """Return the model for surgeries, its tensors on `device`. Healing goes towards `teacher`, by default this model itself."""
        ranges = originals or [range(index, index + 1) for index in range(self.config.layers)]
        layers = [self.layer(index, device, layers, activations, teacher) for index, layers in enumerate(ranges)]
        return Model(self.config, layers, Outer(self.config, self.prefix, self.outer, device), teacher or self.config)

    def layer_prefix(self, index: int) -> str:
        """Return the prefix of the names in layer `index`, in the family's layout."""
        return f"{self.prefix}{self.config.layer_path(index)}."

    @property
    def notes(self) -> list[str]:
        """Oddities of the folder that do no harm, each as a sentence."""
        dropped = f"transformers does not read {some(self.ignored)} in the layers, and the output leaves that out"
        copied = f"transformers does not read {some(sorted(self.unread))} outside the layers, and the output has a plain copy of that"
        return [*self.remarks, *([dropped] if self.ignored else []), *([copied] if self.unread else [])]

    @property
    def dtype(self) -> str:
        """The type of the attention weights, and so of the KV cache (safetensors' code). Without attention, that of most weights."""
        key = f"{self.config.parts.get('k')}.weight"
        keys = [layer[key].dtype for layer in self.layers if key in layer]
        return Counter(keys or [tensor.dtype for layer in self.layers for tensor in layer.values() if tensor.dtype in FLOATS]).most_common(1)[0][0]

    @property
    def computing(self) -> torch.dtype:
        """The type that the model computes in by default: that of its weights, or float32 if its class needs it."""
        return torch.float32 if self.config.family.float32_only else FLOATS[self.dtype]

    @property
    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor on disk."""
        yield from self.outer.values()
        yield from dict.fromkeys(tensor for layer in self.layers for tensor in layer.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and the headers of a model folder: kilobytes, whatever the model's size.

    Raises:
        OptionError: there is no such folder, or no model in it.
        ModelError: the model is damaged, or contradicts its config.
        UnknownLayoutError: effconvert has no row for such a model.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise OptionError(f"{folder} {what}; give a folder with config.json and safetensors, a Hub id such as HuggingFaceTB/SmolLM2-135M, or a .gguf file")
    config = read_config(folder)
    tensors, remarks = read_tensors(folder, config.family)
    check_quantised(folder, config, tensors)
    prefix = _prefix(folder, config, tensors)
    pattern = re.compile(rf"^{re.escape(prefix)}{config.layer_pattern}\.(.+)$")
    storing = {config.group_of(index): index for index in reversed(range(config.layers))}  # number on disk -> the layer that stores it
    outer: dict[str, StoredTensor] = {}
    ignored: list[str] = []
    layers: list[dict[str, StoredTensor]] = [{} for _ in range(config.layers)]
    for name, tensor in tensors.items():
        if not (match := pattern.match(name)):
            place = outer_part(name, prefix, config).partition(f".{OWN}")[0].removeprefix("old_")  # a head under its former name
            if OWN in name and not config.replaced_outside(place):
                raise ModelError(f"{folder} holds {name}, for which its config.json has no place; take the file that effconvert wrote")
            outer[name] = tensor
            continue
        inside = match[2]
        if (number := int(match[1])) not in storing:
            key = config.family.groups_key or config.family.layers_key
            raise ModelError(f"{folder} holds {name}, and its config.json says {key} = {len(storing)}; one of the two is wrong")
        index = storing[number]
        if config.stored_in(index, inside) != index:
            raise ModelError(f"{folder} holds {name}, and by its config.json an earlier layer stores that for this one; one of the two is wrong")
        own = any(inside.startswith(_own_prefix(config, record.place)) for record in config.replaced_in(index))
        if own or inside in config.family.buffers or config.parts_in(inside):
            layers[index][inside] = tensor
        elif OWN in inside:
            raise ModelError(f"{folder} holds {name}, for which its config.json has no place; take the file that effconvert wrote")
        else:
            check_plain(folder, name)
            ignored.append(name)
    for index, layer in enumerate(layers):  # layers that store something for later ones come first
        for first in config.leaders(index):
            layer |= {name: tensor for name, tensor in layers[first].items() if config.stored_in(index, name) == first}
    embed, head = f"{prefix}{config.family.outer['embed']}.weight", re.compile(rf"{re.escape(head_prefix(prefix) + config.family.head['head'])}\..*weight")
    if config.tied and embed not in outer and not config.replaced_outside("embed"):  # safetensors' save_model keeps one name of a tensor that has two
        for name in [name for name, tensor in outer.items() if head.fullmatch(name) and tensor.shape[:-1] == (config.vocabulary,)]:
            outer[embed] = replace(outer.pop(name), name=embed)
    checkpoint = Checkpoint(folder, config, prefix, outer, tuple(layers), tuple(ignored), remarks=remarks)
    check_types(checkpoint)
    check_shapes(checkpoint)
    return checkpoint


def check_quantised(folder: Path, config: Config, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a model whose config says that it is quantised.

    Raises:
        UnknownLayoutError: it is.
        ModelError: its tensors are plain numbers all the same.
    """
    quantization = (config.wrapper.raw if config.wrapper else config.raw).get("quantization_config") or config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else quantization
    try:
        for name in tensors:
            check_plain(folder, name)
    except ModelError as error:
        raise UnknownLayoutError(str(error)) from None
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    matrices = [name for name, tensor in weights.items() if len(tensor.shape) == 2 and re.search(rf"{config.layer_pattern}\.", name)]
    if matrices and all(tensor.dtype in FLOATS for tensor in weights.values()):
        raise ModelError(
            f"config.json of {folder} says that it is quantised ({method}), and its tensors are plain numbers: remove quantization_config from it, "
            "since transformers would read them as quantised"
        )
    raise UnknownLayoutError(f"{folder} is quantised ({method}), and surgery needs the numbers themselves; give the checkpoint that it was made from")


def _prefix(folder: Path, config: Config, tensors: Mapping[str, StoredTensor]) -> str:
    """Return the prefix of the base model's names, with its dot; empty where the base model was saved alone."""
    pattern = re.compile(rf"^(.*?){config.layer_pattern}\.(.+)\.\w+$")
    matches = [match for match in map(pattern.match, tensors) if match and match[3] in config.modules]
    prefixes = [prefix for prefix, _ in Counter(match[1] for match in matches).most_common()]
    allowed = PREFIXES if config.wrapper else ("", f"{config.family.prefix}.", *HEAD_PREFIXES)
    known = [prefix for prefix in prefixes if prefix in allowed]
    if len(known) > 1:
        raise ModelError(f"{folder} names some layers {known[0]}{config.family.layers}.… and others {known[1]}{config.family.layers}.…; save the model anew")
    if not known:
        for name in tensors:
            check_plain(folder, name)
        expected = f"{config.family.prefix}.{config.family.layers}".removeprefix(".")
        raise ModelError(f"{folder} has no tensors named {expected}.0.… as {config.kind} has; its first are {', '.join(list(tensors)[:3])}")
    return known[0]


def _own_prefix(config: Config, place: str) -> str:
    """Return the prefix of a technique's own tensors in a layer."""
    return ".".join(filter(None, [config.place(place), OWN]))


def check_types(checkpoint: Checkpoint) -> None:
    """Refuse weights that are no floating-point numbers. Buffers may be of any type, since nothing reads them."""
    family = checkpoint.config.family
    places = (*(checkpoint.prefix + module for module in family.outer.values()), *(head_prefix(checkpoint.prefix) + module for module in family.head.values()))
    for name, tensor in checkpoint.outer.items():
        if name.startswith(tuple(f"{place}." for place in places)) and OWN not in name:
            tensor.check_float()
    for layer in checkpoint.layers:
        for name, tensor in layer.items():
            if name not in family.buffers and OWN not in name:
                tensor.check_float()


def check_shapes(checkpoint: Checkpoint) -> None:
    """Check every matrix against the config, and all layers against the first."""
    config, family, width = checkpoint.config, checkpoint.config.family, checkpoint.config.hidden
    first: dict[str, tuple[int, ...]] = {}  # of the first layer that has such a tensor
    for index, stored in enumerate(checkpoint.layers):
        at, lacks = checkpoint.layer_prefix(index), config.lacks(index)
        for parts in config.modules.values():
            name = config.tensor_name(parts[0])
            if name not in stored and not family.optional.intersection(parts) and not lacks.issuperset(parts):
                raise ModelError(f"{checkpoint.folder} has no {at}{name}, which {config.kind} needs; fetch the missing shard")
            if lacks.intersection(parts) and name in stored:
                raise ModelError(f"{checkpoint.folder} holds {at}{name}, which its config.json says was dropped; one of the two is wrong")
        for name, tensor in stored.items():
            parts = config.parts_in(name)
            if not parts:
                continue  # of a technique, which checks the shape itself
            expected = first.setdefault(name, tensor.shape)
            if name.endswith(".weight") and parts[0] in config.matrices:
                expected = config.stored_shape(parts)
            _check_shape(at + name, tensor.shape, expected, config)
    # OPT and ELECTRA may have embeddings narrower than their layers, with a projection between them.
    narrow = f"{checkpoint.prefix}{family.outer.get('project_in')}.weight" in checkpoint.outer
    table = (config.get("vocab_size"), config.get(family.embed_key) if narrow else width)
    places: dict[str, tuple[Any, ...]] = {f"{checkpoint.prefix}{family.outer['embed']}.weight": table}
    if config.replaced_outside("embed"):
        gone = next(iter(places))
        if gone in checkpoint.outer:
            raise ModelError(f"{checkpoint.folder} holds {gone}, which its config.json says was dropped; one of the two is wrong")
        places = {}
    if "final_norm" in family.outer:
        places[f"{checkpoint.prefix}{family.outer['final_norm']}.weight"] = (width,)
    for name in places:
        if name not in checkpoint.outer and not ("norm" in name and "final_norm" in family.optional):
            raise ModelError(f"{checkpoint.folder} has no {name}, which {config.kind} needs; fetch the missing shard")
    for name, tensor in checkpoint.outer.items():
        expected = places.get(name, table if name == f"{head_prefix(checkpoint.prefix)}{family.head['head']}.weight" else tensor.shape)
        if None not in expected:
            _check_shape(name, tensor.shape, expected, config)
    positions = checkpoint.outer.get(f"{checkpoint.prefix}{family.outer.get('positions')}.weight")
    if positions and positions.shape[:1] < ((length := config.get(family.positions_key) or 0),):  # transformers makes buffers of that length
        raise ModelError(f"{positions.name} is {_times(positions.shape)}, but config.json says {family.positions_key} = {length}; one is wrong")


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], config: Config) -> None:
    if 0 in shape:
        raise ModelError(f"{name} is empty, as DeepSpeed ZeRO-3 leaves it where weights were not gathered; save with zero_to_fp32.py, or save_16bit_model")
    if shape != expected:
        family = config.family
        keys = (family.hidden_key, family.heads_key, family.kv_heads_key, "head_dim", family.ffn_key, "vocab_size")
        values = ", ".join(f"{key} = {config.get(key)}" for key in keys if config.get(key) is not None)
        raise ModelError(f"{name} is {_times(shape)}, but config.json ({values}) makes it {_times(expected)}; one is wrong")


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
