"""The files beside the weights: which go along, which are left, and what a plan says of that. What belongs is in `checkpoint/belonging.py`."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from effconvert.checkpoint.belonging import ADAPTER, KNOWN, NAMES_CODE, auto_map, belongs, code, is_readable, modules, patterns, read_json, stems_of
from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import CONFIG, Config
from effconvert.checkpoint.manifest import CARD, MANIFEST, RECIPE
from effconvert.checkpoint.replaced import STUB_FILE
from effconvert.checkpoint.tensors import INDEX, PICKLES
from effconvert.errors import ModelError

OURS = (CONFIG, INDEX, MANIFEST, RECIPE, CARD, STUB_FILE)  # written anew, or of no use to the output
SHOWN = 6  # names in a remark

# What loaders or people could miss or mistake, by the names in the model's folder, and what a plan says of it.
SAID = {
    (ADAPTER, "adapter_model.*", "adapters.*"): "an adapter beside whole weights is left out, since loaders with peft would take the folder for that adapter; "
    "if it is not merged into the weights yet, merge it first (PeftModel.merge_and_unload)",
    ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin", "global_step*", "zero_to_fp32.py"): "the state of a "
    "training run is left out, since it does not fit the converted weights; training starts anew",
    (
        "params.json",
        "consolidated*",
        "original",
    ): "the same model in its author's own format is left out, since it is not converted and loaders such as vLLM prefer it",
}
WEIGHTED = ("Dense", "CNN", "LSTM", "LayerNorm", "WordEmbeddings", "WeightedLayerPooling", "StaticEmbedding", "SparseAutoEncoder")  # modules with weights


@dataclass(frozen=True)
class Beside:
    """What stands beside the weights of a converted model, but for what effconvert writes itself."""

    config: Config  # of the output, without an `auto_map` that leads nowhere
    files: tuple[str, ...]
    edits: Mapping[str, str]  # of these, what is not copied: name -> text
    notes: tuple[str, ...]


def beside(checkpoint: Checkpoint, config: Config) -> Beside:
    """Sort what lies beside the weights of `checkpoint`, which becomes `config`; whatever does not belong, none of it is an error.

    Raises:
        ModelError: a file or a folder of the model may not be read.
    """
    folder = checkpoint.folder
    config, edits, notes = _without_dead_code(checkpoint, config)
    said = {CONFIG: config.content, **{name: json.loads(text) for name, text in edits.items()}}
    skipped = {tensor.file.relative_to(folder).as_posix() for tensor in checkpoint.stored} | {*OURS}
    found = _Found(folder, patterns(folder, said), skipped)
    return Beside(config, tuple(sorted(found.files)), edits, (*notes, *_notes(folder, found)))


def home(folder: Path) -> Path:
    """Return where files of a model lie: the folder, or for a snapshot in huggingface_hub's cache the folder of all its versions."""
    place = folder.resolve()
    return place.parent.parent if place.parent.name == "snapshots" else place


class _Found:
    """What lies in a folder: `files` that belong, of these `outside` what links bring from elsewhere, `odd` known names of no file, `left` the rest."""

    def __init__(self, folder: Path, wanted: tuple[str, ...], skipped: set[str]) -> None:
        self.folder, self.wanted, self.skipped, self.bounds = folder, wanted, skipped, home(folder)
        self.files: list[str] = []
        self.outside: list[str] = []
        self.odd: list[str] = []
        self.left: list[str] = []
        self._sort("")

    def _sort(self, above: str) -> None:
        try:
            names = sorted(os.listdir(self.folder / above))
        except OSError as error:
            raise ModelError(f"{self.folder / above} cannot be listed ({error.strerror}); make it readable") from None
        for name in (above + name for name in names):
            path = self.folder / name
            if name in self.skipped:
                if name == CARD:
                    self._can_be_read(name)
                continue
            outside = os.path.exists(path) and not path.resolve().is_relative_to(self.bounds)
            if os.path.isdir(path):
                self._sort(f"{name}/") if self._leads_on(name) and not outside else self.left.append(f"{name}/")
            elif not belongs(name, KNOWN if outside else self.wanted):  # what a model's own files name may not lead out of its folder
                self.left.append(name)
            elif self._can_be_read(name):
                self.files.append(name)
                self.outside += [name] if outside else []

    def _can_be_read(self, name: str) -> bool:
        """Note what is no file at all, such as a pipe or a link to nowhere; refuse a file of the model that may not be read."""
        path = self.folder / name
        if not os.path.isfile(path):
            self.odd.append(name)
            return False
        if not is_readable(path):
            raise ModelError(f"{path} belongs to the model and cannot be read; make it readable, or remove it")
        return True

    def _leads_on(self, name: str) -> bool:
        """Whether something in this folder may belong to the model, or be one of its shards: other folders are not looked into."""
        depth = name.count("/") + 1
        below = (pattern.split("/") for pattern in self.wanted)
        fits = (len(parts) > depth and all(map(fnmatchcase, name.split("/"), parts[:depth])) for parts in below)
        return any(fits) or any(file.startswith(f"{name}/") for file in self.skipped)


def _notes(folder: Path, found: _Found) -> Iterator[str]:
    rest = found.left
    for names, text in SAID.items():
        if known := [name for name in rest if any(fnmatchcase(name.removesuffix("/"), pattern) for pattern in names)]:
            yield f"{_listed(known)}: {text}"
            rest = [name for name in rest if name not in known]
    for place, kind in modules(folder).items():
        name = kind.rpartition(".")[2]
        pickles = [file for file in rest if place and file.startswith(f"{place}/") and file.endswith(PICKLES)]
        stored = any(file.startswith(f"{place}/") and file.endswith(".safetensors") for file in found.files)
        if place and not stored and (pickles or name in WEIGHTED):
            why = f"only pickle ({_listed(pickles)}), which can run code when opened" if pickles else "not there as safetensors"
            yield f"{_listed([place])}: the weights of this module are {why}; put them there as safetensors, else sentence-transformers cannot open the output"
            rest = [file for file in rest if file not in pickles]
        elif place and name.endswith("Transformer"):
            yield f"{_listed([place])}: sentence-transformers opens the model in this folder, which is copied and not converted"
    if found.outside:
        yield f"{_listed(found.outside)}: copied from outside the folder, where links lead"
    if found.odd:
        yield f"{_listed(found.odd)}: left out, since there is no file of that name, but a pipe, a device or a link to nowhere"
    if rest:
        yield f"left out, as no part of the model: {_listed(sorted(rest, key=lambda name: (name.startswith('.'), name)))}"


def _listed(names: Iterable[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _without_dead_code(checkpoint: Checkpoint, config: Config) -> tuple[Config, dict[str, str], list[str]]:
    """Drop entries of `auto_map` whose code is not there, or is of the family that the model was: transformers takes its own class then, as it does anyway."""
    folder, edits, notes = checkpoint.folder, {}, []
    if not config.needs_effconvert and "auto_map" in config.raw:
        kept, lost = _split(folder, config.raw["auto_map"])
        other = [key for key in kept if key.startswith(("AutoConfig", "AutoModel"))] if isinstance(kept, dict) and config.kind != checkpoint.config.kind else []
        kept = {key: value for key, value in kept.items() if key not in other} if other else kept
        if lost or other:
            config = config.saying({"auto_map": kept}) if kept else config.without("auto_map")
        notes += _lost(CONFIG, lost)
        notes += [f"{CONFIG}: {', '.join(other)} of auto_map are dropped, since that code is of a {checkpoint.config.kind}"] if other else []
    for name in NAMES_CODE:
        kept, lost = _split(folder, auto_map(folder, name))
        if lost:
            content: dict[str, Any] = {key: value for key, value in read_json(folder / name).items() if key != "auto_map"}
            edits[name] = json.dumps({**content, **({"auto_map": kept} if kept else {})}, indent=2) + "\n"
            notes += _lost(name, lost)
    return config, edits, notes


def _split(folder: Path, said: Any) -> tuple[Any, dict[str, str]]:
    """Return what stays of an `auto_map`, and of what is dropped which file is missing."""
    entries = said if isinstance(said, dict) else {"AutoTokenizer": said} if isinstance(said, list) else {}  # a list alone is an old way to name a tokenizer
    lost = {}
    for key, entry in entries.items():
        files = sorted(name for stem in stems_of({key: entry}) for name in code(folder, stem))
        if gone := [name for name in files if not is_readable(folder / name)]:
            lost[key] = gone[0]
    return {key: entry for key, entry in entries.items() if key not in lost} if lost else said, lost


def _lost(name: str, lost: Mapping[str, str]) -> list[str]:
    return (
        [f"{name}: {', '.join(lost)} of auto_map dropped, since {_listed(sorted({*lost.values()}))} is not there; transformers' own class is used"]
        if lost
        else []
    )
