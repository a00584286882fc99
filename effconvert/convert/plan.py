"""Plan a conversion: run every layer on the meta device, so that errors and sizes are known before a byte is written."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from torch import Tensor

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import CONFIG, Config
from effconvert.checkpoint.digest import sample
from effconvert.checkpoint.layer import ActivationsProtocol, Model
from effconvert.checkpoint.manifest import CARD, RECIPE
from effconvert.checkpoint.outer import outer_prefix
from effconvert.checkpoint.parts import Deferred, Parts
from effconvert.checkpoint.replaced import STUB_FILE
from effconvert.checkpoint.shards import ITEMSIZE, StoredTensor
from effconvert.checkpoint.tensors import INDEX, SINGLE
from effconvert.convert.code import code_of
from effconvert.convert.files import other_files
from effconvert.convert.order import check_reads_ahead, check_shared_caches, check_shared_parameters
from effconvert.convert.originals import stand_for
from effconvert.errors import ModelError
from effconvert.heal._calibration import Calibration
from effconvert.modeling.loading import has_tokenizer
from effconvert.modeling.size import Size, size_of, size_of_tensors
from effconvert.surgery._surgery import Step
from effconvert.version import __version__

TOKENIZER = "tokenizer_config.json"
OUTER = -1  # in place of a layer's number: the tensors outside the layers
LARGEST = 5_000_000_000  # bytes of a shard, as in huggingface_hub, unless the source's shards are larger


@dataclass(frozen=True)
class Target:
    """A tensor to write. `unit` is the layer that computes it, or `OUTER`; None where the bytes of `origin` are copied."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: StoredTensor
    unit: int | None

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will write and need."""

    checkpoint: Checkpoint
    surgeries: tuple[Step, ...]
    config: Config
    shards: dict[str, list[Target]]  # file name -> its tensors in order
    files: tuple[str, ...]  # other files of the model
    peak: int  # bytes of resident memory while writing
    teacher: Checkpoint  # the model that healing goes towards; by default the checkpoint itself
    configs: Sequence[Config]  # before each step, and last the one to write
    originals: Sequence[range]  # for each layer of the checkpoint, the layers of the teacher that it stands for
    calibration: Calibration | None = None  # the calibration tokens, where a step needs activations
    edits: Mapping[str, str] = field(default_factory=dict)  # those of `files` that are not copied: name -> text
    remarks: tuple[str, ...] = ()  # on files that are left out or changed
    trained_on: str = ""  # identifies the text of a distillation, or the models of a transplant
    surveys: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)  # number of a step that needs one -> what it has measured
    folders: Mapping[str, Path] = field(default_factory=dict)  # those of `files` that another model has -> its folder
    others: tuple[Path, ...] = ()  # folders of further models that it is made from

    @property
    def before(self) -> Size:
        """The size of the original."""
        return size_of(self.checkpoint)

    @property
    def after(self) -> Size:
        """The size of the converted model."""
        tensors = ((target.name, target.dtype, target.shape) for target in self.targets if target.name not in self.checkpoint.unread)
        return size_of_tensors(tensors, self.config, self.checkpoint.dtype)

    @property
    def targets(self) -> Iterator[Target]:
        """Every tensor to write, shard by shard."""
        for targets in self.shards.values():
            yield from targets

    @property
    def is_exact(self) -> bool:
        """Whether the converted model must compute the same logits."""
        return all(surgery.is_exact(config) for surgery, config in zip(self.surgeries, self.configs, strict=False))

    @property
    def needs_calibration(self) -> bool:
        """Whether a step needs activations, so that calibration must run before the model is written."""
        return any(surgery.needs_calibration(config) for surgery, config in zip(self.surgeries, self.configs, strict=False))

    @property
    def surveying(self) -> list[int]:
        """The numbers of the steps that measure something on the whole model before it is converted."""
        return [number for number, (surgery, config) in enumerate(zip(self.surgeries, self.configs, strict=False)) if surgery.needs_survey(config)]

    @property
    def needs_text(self) -> bool:
        """Whether the model must be run on the calibration text, for activations or surveys."""
        return self.needs_calibration or bool(self.surveying)

    @property
    def recipe(self) -> list[dict[str, dict[str, object]]]:
        """The steps as a recipe spells them."""
        return [surgery.recipe for surgery in self.surgeries]

    @property
    def notes(self) -> list[str]:
        """Remarks on this conversion: on the folder, on each step, on calibration and on files."""
        steps = [f"{surgery.name}: {note}" for surgery, config in zip(self.surgeries, self.configs, strict=False) if (note := surgery.notes(config))]
        calibration = self.calibration.notes(self.checkpoint.config) if self.calibration else ""
        return [*self.checkpoint.notes, *steps, *([calibration] if calibration else []), *self.remarks]

    @property
    def draft_bytes(self) -> int:
        """Bytes of disk that drafts take."""
        return sum(target.bytes for target in self.targets if target.unit not in (None, OUTER)) if self.needs_calibration else 0

    @property
    def disk(self) -> int:
        """Bytes that the output folder takes."""
        return self.after.bytes + sum(self.source(file).stat().st_size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Identifies source, recipe and layout. An interrupted run with the same fingerprint can be resumed."""
        files = sorted({tensor.file for tensor in self.checkpoint.stored})
        files += sorted({tensor.file for tensor in self.teacher.stored} - {*files})
        source = [(file.name, file.stat().st_size, file.stat().st_mtime_ns, sample(file)) for file in files]
        code = [code_of(surgery) for surgery in self.surgeries]  # a technique's code may change during its development
        targets = [(shard, target.name, target.dtype, target.shape) for shard, members in self.shards.items() for target in members]
        text = json.dumps(
            [__version__, code, self.recipe, self.config.content, source, targets, self.files, self.calibration and self.calibration.identity, self.trained_on]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def has_index(self) -> bool:
        """Whether the checkpoint is in several files with an index."""
        return list(self.shards) != [SINGLE]

    @property
    def output_files(self) -> list[str]:
        """The names of all files of the output but its manifest."""
        tokenizer = [TOKENIZER] if self.tokenizer and TOKENIZER not in self.files else []
        return [*self.shards, *self.files, CONFIG, RECIPE, CARD, *self.code, *tokenizer, *([INDEX] if self.has_index else [])]

    @property
    def tokenizer(self) -> str:
        """The tokenizer's class, which its config must name if the new family has another by default; else empty."""
        before, after = self.checkpoint.config.family.tokenizer, self.config.family.tokenizer
        return before if before != after and has_tokenizer(self.checkpoint.folder) else ""

    @property
    def code(self) -> list[str]:
        """The stub of code beside a model that needs effconvert: it says how to load the model."""
        return [STUB_FILE] if self.config.needs_effconvert else []

    def source(self, file: str) -> Path:
        """Return the file that one of `files` is copied from."""
        return self.folders.get(file, self.checkpoint.folder) / file

    def layer_prefix(self, index: int) -> str:
        """Return the prefix of the names in layer `index` of the converted model."""
        return f"{outer_prefix(self.checkpoint.config, self.checkpoint.prefix, self.config)}{self.config.layer_path(index)}."

    def layer_targets(self, index: int) -> dict[str, Target]:
        """Return all tensors of layer `index` of the converted model by their names inside the layer, also those that an earlier layer stores."""
        result: dict[str, Target] = {}
        for layer in {*self.config.leaders(index), index}:
            prefix = self.layer_prefix(layer)
            names = ((target.name.removeprefix(prefix), target) for target in self.targets if target.name.startswith(prefix))
            result |= {name: target for name, target in names if self.config.stored_in(index, name) == layer}
        return result

    def models(self, device: str, activations: ActivationsProtocol | None = None) -> list[Model]:
        """Return the model before each step and after the last. They are lazy: a tensor is read when it is first used.

        With `activations`, layers must be used in order.
        """
        model = self.checkpoint.model(device, self.originals, activations, self.teacher.config)
        return list(_models(model, self.surgeries, self.configs, {} if device == "meta" else self.surveys))

    def parts(self, unit: int, device: str = "cpu") -> tuple[str, Parts]:
        """Return a layer of the converted model, or the parts outside the layers, and the prefix of its names."""
        model = self.models(device)[-1]
        return ("", model.outer) if unit == OUTER else (self.layer_prefix(unit), model.layers[unit])


def _models(model: Model, surgeries: Sequence[Step], configs: Sequence[Config], surveys: Mapping[int, Mapping[str, Tensor]]) -> Iterator[Model]:
    yield model
    for number, (surgery, config) in enumerate(zip(surgeries, configs[1:], strict=True)):
        model.outer.survey = surveys.get(number)
        surgery.rewrite(model)
        model = model.on_top(config)
        yield model


def plan(checkpoint: Checkpoint, surgeries: tuple[Step, ...], teacher: Checkpoint | None = None) -> Plan:
    """Run `surgeries` over the shapes of `checkpoint`. Healing goes towards `teacher`, by default `checkpoint` itself.

    Raises:
        OptionError, ModelError: the conversion cannot be done.
    """
    configs = [checkpoint.config]
    for surgery in surgeries:
        if surgery.undecided:
            raise ValueError(f"{surgery.name} has options without a value; call effconvert.convert.decide first")
        if surgery.stands_for(configs[-1]) != (surgery,):
            raise ValueError(f"{surgery.name} stands for other steps; plan those that its `stands_for` returns")
        configs[-1].check_stored_apart()
        surgery.check(configs[-1])
        check_reads_ahead(surgery, surgeries, configs)
        configs.append(surgery.config(configs[-1]))
    check_shared_caches(surgeries, configs)
    check_tokenizer(checkpoint, configs[-1])
    layer_by_layer = [surgery for surgery, config in zip(surgeries, configs, strict=False) if surgery.needs_original(config)]
    any_width = all(surgery.any_width for surgery in layer_by_layer)
    files, originals = other_files(checkpoint, configs[-1]), stand_for(checkpoint, teacher if teacher and layer_by_layer else checkpoint, any_width)
    config = configs[-1] = files.config
    draft = Plan(checkpoint, surgeries, config, {}, files.files, 0, teacher or checkpoint, tuple(configs), tuple(originals), None, files.edits, files.notes)
    *before, model = draft.models("meta")
    for surgery, state in zip(surgeries, before, strict=True):
        check_shared_parameters(surgery, state)
    if len(model.layers) != config.layers:
        raise ModelError(f"the conversion has {len(model.layers)} layers, and its config says {config.layers}: a fault of effconvert, please report it")
    targets, work = list(_targets(OUTER, "", model.outer)), model.outer.touched
    for index, layer in enumerate(model.layers):
        targets += _targets(index, draft.layer_prefix(index), layer)
        work = max(work, layer.touched)
    # A layer in float32, a copy while it is read and rounded, and the layer before it. The rest is Python and torch themselves.
    return replace(draft, shards=_shards(targets, checkpoint), peak=psutil.Process().memory_info().rss + 3 * work)


def check_tokenizer(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse a tokenizer's config that must be changed and cannot be read.

    Raises:
        ModelError: it is no JSON object.
    """
    file = checkpoint.folder / TOKENIZER
    if checkpoint.config.family.tokenizer == config.family.tokenizer or not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no names and values; fetch the file again")


def _targets(unit: int, prefix: str, parts: Parts) -> Iterator[Target]:
    for name, origin, value in parts.tensors(stored=True):
        assert not isinstance(value, Deferred)  # nothing is deferred on the meta device
        shape = origin.shape if value is None else value.shape
        yield Target(prefix + name, origin.dtype, tuple(shape), origin, None if value is None else unit)


def _shards(targets: Iterable[Target], checkpoint: Checkpoint) -> dict[str, list[Target]]:
    """Sort targets into files: those of the source, in the order of its bytes. A file that would get too large is split."""
    files: dict[Path, list[Target]] = {}
    for target in sorted(targets, key=lambda target: (target.origin.file, target.origin.start)):
        files.setdefault(target.origin.file, []).append(target)
    pieces = [piece for file, members in files.items() for piece in _pieces(members, max(LARGEST, file.stat().st_size))]
    if len(pieces) == len(files):
        return {file.relative_to(checkpoint.folder).as_posix(): members for file, members in files.items()}
    return {f"model-{number:05}-of-{len(pieces):05}.safetensors": piece for number, piece in enumerate(pieces, 1)}


def _pieces(targets: list[Target], limit: int) -> Iterator[list[Target]]:
    piece: list[Target] = []
    size = 0
    for target in targets:
        if piece and size + target.bytes > limit:
            yield piece
            piece, size = [], 0
        piece.append(target)
        size += target.bytes
    yield piece
