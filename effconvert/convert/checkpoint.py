"""A checkpoint as a sequence of lazy layers: nothing is read from disk until a surgery asks for a part.

`Checkpoint(config, outer, layers)` is what a folder holds, sorted by the family's row. A `Layer` maps a part (`"k"`, `"k.bias"`) to its
tensor; parts that nobody assigns stay where they lie, as bytes.
"""
# M = hidden width, H = query heads, Hk = KV heads, D = head width.

import json
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from effconvert.convert.config import Config, read_config
from effconvert.convert.families import Family
from effconvert.convert.shards import Stored, read_header
from effconvert.errors import ModelError, OptionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: a config, the tensors outside the layers, and those of each layer (name inside the layer -> tensor)."""

    folder: Path
    config: Config
    prefix: str  # of the base model in the names on disk, with its dot; may be empty
    outer: Mapping[str, Stored]  # full name -> tensor
    layers: tuple[Mapping[str, Stored], ...]

    def layer(self, index: int, device: str) -> "Layer":
        """Return layer `index`, its tensors on `device` (cpu, or meta for shapes alone)."""
        return Layer(index, self.config, self.layers[index], device)

    def layer_prefix(self, index: int) -> str:
        """Return what stands before the names of layer `index`, in the family's layout."""
        return f"{self.prefix}{self.config.family.layers}.{index}."

    @property
    def dtype(self) -> str:
        """The type of the attention weights, and so of the KV cache (safetensors' code)."""
        return self.layers[0][f"{self.config.family.parts['k']}.weight"].dtype

    @property
    def stored(self) -> Iterator[Stored]:
        """Every tensor on disk."""
        yield from self.outer.values()
        for layer in self.layers:
            yield from layer.values()


class Layer(MutableMapping[str, torch.Tensor]):
    """One layer: `layer["k"]` is its key projection [Hk*D, M] in float32, `layer["k.bias"]` the bias; assigning replaces them.

    Fused and transposed storage is undone on reading and done again on writing: a surgery sees plain [out, in] matrices. What is read is a
    copy: to change a part, assign it.

    Attributes:
        index: which layer of the model this is, from 0.
        config: the shape of the model as the surgery at hand finds it.
        touched: bytes in float32 of all that was read or assigned, for the estimate of peak memory.
    """

    def __init__(self, index: int, config: Config, stored: Mapping[str, Stored], device: str) -> None:
        self.index, self.config, self.touched = index, config, 0
        self._source, self._stored, self._device = config, stored, device
        self._assigned: dict[str, torch.Tensor] = {}
        self._deleted: set[str] = set()
        self._waiting: list[tuple[Config, Callable[[Layer], None]]] = []

    @property
    def per_kv_head(self) -> list[str]:
        """The parts of this layer, biases among them, whose rows come KV head by KV head: [Hk*D, ...]."""
        names = self.config.family.per_kv_head
        return [part for stem in names for part in (stem, f"{stem}.bias") if part in self]

    def later(self, change: "Callable[[Layer], None]") -> None:
        """Have `change` called with this layer, and the config of now, before anything is asked of it."""
        self._waiting.append((self.config, change))

    def __getitem__(self, part: str) -> torch.Tensor:
        if part not in self:
            raise ModelError(f"layer {self.index} of this {self._source.kind} has no part {part!r}; it has {', '.join(self)}")
        if part not in self._assigned:
            tensor = self._read(part)
            self.touched += 4 * tensor.numel()
            return tensor
        return self._assigned[part]

    def __setitem__(self, part: str, tensor: torch.Tensor) -> None:
        self._catch_up()
        self._deleted.discard(part)
        self._assigned[part] = tensor
        self.touched += 4 * tensor.numel()

    def __delitem__(self, part: str) -> None:
        self._catch_up()
        self._assigned.pop(part, None)
        self._deleted.add(part)

    def __iter__(self) -> Iterator[str]:
        self._catch_up()
        known = [part for stem in self._source.family.parts for part in (stem, f"{stem}.bias")]
        yield from (part for part in dict.fromkeys([*known, *self._assigned]) if part in self)

    def __contains__(self, part: object) -> bool:
        self._catch_up()
        if part in self._assigned or part in self._deleted or not isinstance(part, str):
            return part in self._assigned
        return self._name(part) in self._stored

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def tensors(self, family: Family) -> Iterator[tuple[str, Stored, torch.Tensor | None]]:
        """Yield this layer in the layout of `family`: a name, the tensor on disk that it comes from, and what it became.

        None: it did not change, and its bytes on disk can be copied. Of several origins the first counts; what is new goes with the layer's first.

        Raises:
            ModelError: the layout has no place for a part, or lacks one that it fuses with another.
        """
        if lost := [part for part in self if part.removesuffix(".bias") not in family.parts]:
            raise ModelError(f"layer {self.index} became one with {', '.join(lost)}, for which {family.lm} has no place; it has {', '.join(family.parts)}")
        for module, parts in family.modules.items():
            for suffix in ("", ".bias"):
                present = [part + suffix for part in parts if part + suffix in self]
                if not present:
                    continue
                if len(present) != len(parts):
                    raise ModelError(f"layer {self.index}: {module} holds {', '.join(parts)} in one tensor, and only {', '.join(present)} is there")
                name = f"{module}.bias" if suffix else f"{module}.weight"
                origins = (self._stored.get(self._name(part)) for part in (present[0], *parts))
                origin = next((stored for stored in origins if stored), next(iter(self._stored.values())))
                yield name, origin, None if self._untouched(present, family) else join([self[part] for part in present], family, self.config)
        if family == self._source.family:
            yield from ((name, self._stored[name], None) for name in family.buffers if name in self._stored)

    def _catch_up(self) -> None:
        """Do what was put off, in order, each change with the config it was put off with, and none inside another."""
        waiting, self._waiting = self._waiting, []
        config = self.config
        for self.config, change in waiting:
            change(self)
        self.config = config

    def _untouched(self, parts: list[str], family: Family) -> bool:
        """Whether these parts, fused in one tensor of `family`, lie on disk just so."""
        source = self._source.family
        together = tuple(part.removesuffix(".bias") for part in parts)
        same = family.modules.get(source.parts[together[0]]) == source.modules[source.parts[together[0]]] == together
        return same and (family.transposed, family.per_head) == (source.transposed, source.per_head) and not self._assigned.keys() & set(parts)

    def _name(self, part: str) -> str:
        stem = part.removesuffix(".bias")
        return f"{self._source.family.parts.get(stem, stem)}.{'bias' if part != stem else 'weight'}"

    def _read(self, part: str) -> torch.Tensor:
        family = self._source.family
        stem = part.removesuffix(".bias")
        fused = family.modules[family.parts[stem]]
        tensor = self._stored[self._name(part)].read(self._device)
        if family.transposed and tensor.ndim == 2:
            tensor = tensor.T
        return split(tensor, fused, family, self._source)[fused.index(stem)]


def split(tensor: torch.Tensor, parts: tuple[str, ...], family: Family, config: Config) -> tuple[torch.Tensor, ...]:
    """Take a tensor [out, ...] apart into the `parts` that are fused in it."""
    if "q" not in parts:
        return tuple(tensor.chunk(len(parts)))
    if family.per_head:
        by_head = tensor.unflatten(0, (config.heads, len(parts), config.head_dim))  # [H, 3, D, ...]
        return tuple(by_head[:, i].flatten(0, 1) for i in range(len(parts)))
    heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    return tuple(tensor.split([heads[part] * config.head_dim for part in parts])) if len(parts) > 1 else (tensor,)


def join(tensors: list[torch.Tensor], family: Family, config: Config) -> torch.Tensor:
    """Undo `split`, and store [in, out] where the family does."""
    if family.per_head and len(tensors) == 3:
        tensor = torch.stack([part.unflatten(0, (config.heads, config.head_dim)) for part in tensors], 1).flatten(0, 2)
    else:
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return tensor.T if family.transposed and tensor.ndim == 2 else tensor


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and the headers of a model folder: kilobytes, whatever the model's size.

    Raises:
        OptionError: there is no such folder, or no model in it.
        ModelError: the model is damaged, contradicts its config, or is of a kind that cannot be operated on.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise OptionError(f"{folder} {what}; give a folder with config.json and safetensors, a Hub id such as HuggingFaceTB/SmolLM2-135M, or a .gguf file")
    config = read_config(folder)
    family = config.family
    tensors = read_tensors(folder)
    pattern = re.compile(rf"^({re.escape(family.prefix)}\.)?{re.escape(family.layers)}\.(\d+)\.(.+)$")
    outer: dict[str, Stored] = {}
    layers: list[dict[str, Stored]] = [{} for _ in range(config.layers)]
    prefixes: set[str] = set()
    for name, tensor in tensors.items():
        if not (match := pattern.match(name)):
            outer[name] = tensor
            continue
        prefix, index, inside = match[1] or "", int(match[2]), match[3]
        if index >= config.layers:
            raise ModelError(f"{folder} holds {name}, and its config.json says {family.layers_key} = {config.layers}; one of the two is wrong")
        if inside not in family.buffers and inside.rpartition(".")[0] not in family.modules:
            raise ModelError(f"{folder} holds {name}, for which {config.kind} has no place; is it a plain {config.kind}, without adapters or quantisation?")
        layers[index][inside] = tensor
        prefixes.add(prefix)
    if len(prefixes) != 1:
        raise ModelError(
            f"{folder} has no tensors named {family.prefix}.{family.layers}.0.… as {config.kind} has; its first are {', '.join(list(tensors)[:3])}"
        )
    checkpoint = Checkpoint(folder, config, prefixes.pop(), outer, tuple(layers))
    check_shapes(checkpoint)
    return checkpoint


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Return all tensors of `folder` from its index and shards, each shard's in the order of its bytes."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():  # where there are both, transformers takes the single file
        if not (folder / SINGLE).is_file():
            pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
            if pickles:
                raise ModelError(
                    f"{folder} has its weights only as pickle ({pickles[0]}), which can run code when opened; "
                    "save it as safetensors first (from_pretrained, then save_pretrained), or take a revision that has them"
                )
            raise ModelError(f"{folder} has a config.json and no weights: neither {SINGLE} nor {INDEX} is there; fetch them")
        return read_header(folder / SINGLE)
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(where.values()))
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise ValueError("no names of shards")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of shards ({error}); fetch the file again") from None
    tensors: dict[str, Stored] = {}
    for shard in shards:
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard:
            raise ModelError(f"{index} names the shard {shard!r}, which is outside the folder; that is no sound checkpoint")
        if not (folder / path).is_file():
            raise ModelError(f"{index} names the shard {shard!r}, which is missing; fetch it")
        inside = read_header(folder / path)
        if unnamed := inside.keys() - where.keys():
            raise ModelError(f"{folder / path} holds {min(unnamed)}, which {INDEX} does not name; fetch both again")
        tensors |= {name: tensor for name, tensor in inside.items() if where[name] == shard}
    if lost := where.keys() - tensors.keys():
        name = min(lost)
        raise ModelError(f"{index} says that {name} is in {where[name]!r}, which does not hold it; fetch both again")
    return tensors


def check_shapes(checkpoint: Checkpoint) -> None:
    """Hold every matrix against the config, and all layers against the first."""
    config, family = checkpoint.config, checkpoint.config.family
    rows, kv_rows, width, ffn = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.hidden, config.ffn
    expected = {"q": (rows, width), "k": (kv_rows, width), "v": (kv_rows, width), "o": (width, rows)}
    expected |= {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)}
    first = {name: tensor.shape for name, tensor in checkpoint.layers[0].items()}
    for index, stored in enumerate(checkpoint.layers):
        at = checkpoint.layer_prefix(index)
        for module, parts in family.modules.items():
            if f"{module}.weight" not in stored and not family.optional.intersection(parts):
                raise ModelError(f"{checkpoint.folder} has no {at}{module}.weight, which {config.kind} needs; fetch the missing shard")
        for name, tensor in stored.items():
            module, _, kind = name.rpartition(".")
            parts = family.modules.get(module, ())
            want = first.get(name, tensor.shape)
            if kind == "weight" and parts and parts[0] in expected:
                want = (sum(expected[part][0] for part in parts), expected[parts[0]][1])
                want = want[::-1] if family.transposed else want
            _hold(at + name, tensor.shape, want, config)
    # OPT may have embeddings narrower than its layers, with a projection between them.
    narrow = f"{checkpoint.prefix}{family.outer.get('project_in')}.weight" in checkpoint.outer
    table = (config.get("vocab_size"), config.get("word_embed_proj_dim") if narrow else width)
    places: dict[str, tuple[Any, ...]] = {f"{checkpoint.prefix}{family.outer['embed']}.weight": table}
    if "final_norm" in family.outer:
        places[f"{checkpoint.prefix}{family.outer['final_norm']}.weight"] = (width,)
    for name in places:
        if name not in checkpoint.outer and not ("norm" in name and "final_norm" in family.optional):
            raise ModelError(f"{checkpoint.folder} has no {name}, which {config.kind} needs; fetch the missing shard")
    for name, tensor in checkpoint.outer.items():
        want = places.get(name, table if name == f"{family.head['head']}.weight" else tensor.shape)
        if None not in want:
            _hold(name, tensor.shape, want, config)


def _hold(name: str, shape: tuple[int, ...], want: tuple[int, ...], config: Config) -> None:
    if shape != want:
        family = config.family
        keys = (family.hidden_key, family.heads_key, family.kv_heads_key, "head_dim", family.ffn_key, "vocab_size")
        said = ", ".join(f"{key} = {config.get(key)}" for key in keys if config.get(key) is not None)
        raise ModelError(f"{name} is {_times(shape)}, but config.json ({said}) makes it {_times(want)}; one is wrong")


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
