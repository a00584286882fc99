"""Plan a conversion: run every layer on the meta device, so that all errors and all sizes are known before a byte is written."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from effconvert import __version__
from effconvert.convert.checkpoint import INDEX, PICKLES, SINGLE, Checkpoint
from effconvert.convert.config import CONFIG, Config
from effconvert.convert.families import Family
from effconvert.convert.layer import Layer
from effconvert.convert.mixed import STUB_FILE
from effconvert.convert.shards import ITEMSIZE, Stored
from effconvert.convert.size import Size, size_of, weigh
from effconvert.convert.walk import Calibration
from effconvert.errors import ModelError
from effconvert.surgery._surgery import Surgery

if TYPE_CHECKING:
    from effconvert.convert.calibrate import Walk

RECIPE, CARD = "effconvert.yaml", "README.md"  # written anew beside every conversion
WEIGHTS = (".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".mlmodel", *PICKLES)


@dataclass(frozen=True)
class Target:
    """A tensor to write: `layer` computes it, or None where the bytes of `origin` are copied."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: Stored
    layer: int | None

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Plan:
    """What will be written and what it will take."""

    checkpoint: Checkpoint
    surgeries: tuple[Surgery, ...]
    config: Config
    shards: dict[str, list[Target]]  # file name -> its tensors in order
    files: tuple[str, ...]  # everything else in the folder, to be copied
    peak: int  # bytes of resident memory while writing
    teacher: Checkpoint  # what healing goes towards: by default the checkpoint itself
    calibration: Calibration | None = None  # what it is run on, where a step looks at what layers compute

    @property
    def before(self) -> Size:
        """The size of the original."""
        return size_of(self.checkpoint)

    @property
    def after(self) -> Size:
        """The size of the converted model."""
        tensors = [(target.name, target.dtype, target.shape) for shard in self.shards.values() for target in shard]
        return weigh(tensors, self.config, self.checkpoint.dtype)

    @property
    def exact(self) -> bool:
        """Whether the converted model must compute the same logits."""
        return all(surgery.exact(config) for surgery, config in zip(self.surgeries, self.configs, strict=False))

    @property
    def looks(self) -> bool:
        """Whether a step looks at what layers compute, so that the model has to be calibrated before it is written."""
        return any(surgery.looks(config) for surgery, config in zip(self.surgeries, self.configs, strict=False))

    @cached_property
    def originals(self) -> list[range]:
        """Return for each layer of the checkpoint which layers of the teacher it stands for."""
        return stand_for(self.checkpoint, self.teacher)

    @cached_property
    def configs(self) -> list[Config]:
        """The config before each surgery, and at last the one to write."""
        return configs(self.checkpoint.config, self.surgeries)

    @property
    def recipe(self) -> list[dict[str, dict[str, object]]]:
        """The surgeries as a recipe."""
        return [surgery.recipe for surgery in self.surgeries]

    @property
    def remarks(self) -> list[str]:
        """What is different for this model, step by step, and on this text."""
        told = [f"{surgery.name}: {said}" for surgery, config in zip(self.surgeries, self.configs, strict=False) if (said := surgery.remark(config))]
        about = self.calibration.remark(self.checkpoint.config) if self.calibration else ""
        return [*told, *([about] if about else [])]

    @property
    def draft_bytes(self) -> int:
        """Bytes of disk that converted layers take while they wait to be written."""
        return sum(target.bytes for shard in self.shards.values() for target in shard if target.layer is not None) if self.looks else 0

    @property
    def disk(self) -> int:
        """Bytes that the output folder takes."""
        return self.after.bytes + sum((self.checkpoint.folder / file).stat().st_size for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """Identify source, recipe and layout: a half-written output with the same fingerprint can be finished."""
        files = sorted({tensor.file for tensor in self.checkpoint.stored})
        files += sorted({tensor.file for tensor in self.teacher.stored} - {*files})
        source = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        targets = [(shard, target.name, target.dtype, target.shape) for shard, inside in self.shards.items() for target in inside]
        text = json.dumps([__version__, self.recipe, self.config.content, source, targets, self.files, self.calibration and self.calibration.sha256])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def indexed(self) -> bool:
        """Whether the checkpoint is in several files with an index."""
        return list(self.shards) != [SINGLE]

    @property
    def written(self) -> list[str]:
        """The names of all files of the output but its manifest."""
        return [*self.shards, *self.files, CONFIG, RECIPE, CARD, *self.code, *([INDEX] if self.indexed else [])]

    @property
    def code(self) -> list[str]:
        """The file that says what a model in a class of ours needs to be loaded."""
        return [STUB_FILE] if self.config.ours else []

    def layer_prefix(self, index: int) -> str:
        """Return what stands before the names of layer `index` of the converted model."""
        return f"{self.checkpoint.prefix}{self.config.family.layers}.{index}."

    def operate(self, device: str, walk: "Walk | None" = None) -> list[Layer]:
        """Run the surgeries, and return the layers that come of it: lazy, so that nothing is read before a layer is asked for its tensors.

        With a `walk` for steps that look, layers are to be asked in order.
        """
        layers = [self.checkpoint.layer(index, device, originals, walk) for index, originals in enumerate(self.originals)]
        for surgery, config in zip(self.surgeries, self.configs[1:], strict=True):
            layers = [layer.on_top(index, config) for index, layer in enumerate(surgery.rewrite(layers))]
        return layers


def stand_for(student: Checkpoint, teacher: Checkpoint) -> list[range]:
    """Return for each layer of `student` which layers of `teacher` it stands for: its own, and those that were dropped after it.

    Raises:
        ModelError: they cannot be two stages of one model.
    """
    less, more = student.config, teacher.config
    if less.hidden != more.hidden:
        raise ModelError(
            f"the teacher is {more.hidden} wide and the student {less.hidden}: what is refitted is what layers make of the same inputs, "
            "so the width must be the same; distil instead, or name the model that the student was made from"
        )
    if less.layers == more.layers:
        return [range(index, index + 1) for index in range(less.layers)]
    if less.layers > more.layers:
        raise ModelError(f"the teacher has {more.layers} layers and the student {less.layers}; name the model that the student was made from")
    signs = [_sign(student, index) for index in range(less.layers)], [_sign(teacher, index) for index in range(more.layers)]
    starts: list[int] = []
    for sign in signs[0]:
        later = range(starts[-1] + 1 if starts else 0, more.layers)
        found = next((index for index in later if sign and signs[1][index] == sign), None)
        if found is None:
            raise ModelError(
                f"the teacher has {more.layers} layers and the student {less.layers}, and layer {len(starts)} of the student has the norms of none of them, "
                "so nobody can tell which ones it stands for; only layers that were dropped, and whose norms were not trained since, can be refitted"
            )
        starts.append(found)
    return [range(start, stop) for start, stop in pairwise([*starts, more.layers])]


def _sign(checkpoint: Checkpoint, index: int) -> tuple[bytes, ...]:
    """Return what tells a layer from others: its vectors that no technique changes."""
    layer = checkpoint.layer(index, "cpu")
    return tuple(layer[part].numpy().tobytes() for part in layer if part in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"))


def configs(config: Config, surgeries: tuple[Surgery, ...]) -> list[Config]:
    """Return the config before each surgery and after the last."""
    steps = [config]
    for surgery in surgeries:
        steps.append(surgery.config(steps[-1]))
    return steps


def plan(checkpoint: Checkpoint, surgeries: tuple[Surgery, ...], teacher: Checkpoint | None = None) -> Plan:
    """Run `surgeries` over the shapes of `checkpoint`, healing towards `teacher`, or else what it was itself.

    Raises:
        OptionError, ModelError: the conversion cannot be done.
    """
    config = checkpoint.config
    for surgery in surgeries:
        surgery.check(config)
        config = surgery.config(config)
    draft = Plan(checkpoint, surgeries, config, {}, other_files(checkpoint), 0, teacher or checkpoint)
    targets, work = [], 0
    layers = draft.operate("meta")
    if len(layers) != config.layers:
        raise ModelError(f"{len(layers)} layers came of the surgery, and its config says {config.layers}: a fault of effconvert, please report it")
    for index, layer in enumerate(layers):
        for name, origin, tensor in layer.tensors(config.family):
            shape = origin.shape if tensor is None else tuple(tensor.shape)
            targets.append(Target(draft.layer_prefix(index) + name, origin.dtype, shape, origin, None if tensor is None else index))
        work = max(work, layer.touched)
    family = checkpoint.config.family
    for name, origin in checkpoint.outer.items():
        targets.append(Target(rename(name, checkpoint.prefix, family, config.family), origin.dtype, origin.shape, origin, None))
    targets.sort(key=lambda target: (target.origin.file, target.origin.start))
    shards: dict[str, list[Target]] = {}
    for target in targets:
        shards.setdefault(target.origin.file.relative_to(checkpoint.folder).as_posix(), []).append(target)
    # A layer in float32, the same again while it is read and rounded, and the layer before it; the rest is Python and torch themselves.
    return replace(draft, shards=shards, peak=psutil.Process().memory_info().rss + 3 * work)


def rename(name: str, prefix: str, source: Family, target: Family) -> str:
    """Return what the tensor `name`, outside the layers of a `source` model, is called in a `target` model."""
    places = [(prefix + module, prefix + target.outer.get(part, "")) for part, module in source.outer.items()]
    places += [(module, target.head.get(part, "")) for part, module in source.head.items()]
    for before, after in places:
        if after and (name == before or name.startswith(before + ".")):
            return after + name.removeprefix(before)
    if source.base == target.base:
        return name  # a head of the user's own
    raise ModelError(f"{name} has no counterpart in {target.lm}; remove it, or save the model from {source.lm}")


def other_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what else belongs to the model: tokenizer, generation config, chat template, licence, code.

    Raises:
        ModelError: a link among them leads out of the folder.
    """
    folder = checkpoint.folder
    shards = {tensor.file for tensor in checkpoint.stored}
    ours = (CONFIG, "effconvert.json", RECIPE, CARD, STUB_FILE)
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
