"""Which other files are copied with the weights, which are left out, and the plan's notes on them. The patterns are in `checkpoint/belonging.py`."""

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

OURS = (CONFIG, INDEX, MANIFEST, RECIPE, CARD, STUB_FILE)  # written anew, or useless in the output
SHOWN = 6  # names in a note

# Notes on files that somebody may miss: patterns of names in the model's folder -> note.
REASONS = {
    (ADAPTER, "adapter_model.*", "adapters.*"): "an adapter beside whole weights is left out: what is converted and measured are those weights without it, "
    "and loaders with peft would put it on top of them; if it is not merged into the weights yet, merge it first (PeftModel.merge_and_unload)",
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
class OtherFiles:
    """The files beside the weights of a converted model, without those that effconvert writes itself."""

    config: Config  # of the output, without entries of `auto_map` whose code is missing
    files: tuple[str, ...]
    edits: Mapping[str, str]  # those of `files` that are not copied: name -> text
    notes: tuple[str, ...]


def other_files(checkpoint: Checkpoint, config: Config) -> OtherFiles:
    """Sort the files beside the weights of `checkpoint`, which becomes `config`. A file that does not belong is no error.

    Raises:
        ModelError: a file or a folder of the model may not be read.
    """
    folder = checkpoint.folder
    config, edits, notes = _without_dead_code(checkpoint, config)
    contents = {CONFIG: config.content, **{name: json.loads(text) for name, text in edits.items()}}
    own = {tensor.file.relative_to(folder).as_posix() for tensor in checkpoint.stored} | {*OURS}
    listing = _Listing(folder, patterns(folder, contents), own)
    return OtherFiles(config, tuple(sorted(listing.files)), edits, (*notes, *_notes(folder, listing)))


def home(folder: Path) -> Path:
    """Return the folder that holds a model's files: for a snapshot in huggingface_hub's cache the folder of all versions."""
    place = folder.resolve()
    return place.parent.parent if place.parent.name == "snapshots" else place


class _Listing:
    """The names in a folder, sorted by whether they belong to the model; weights and effconvert's own files are skipped."""

    def __init__(self, folder: Path, patterns: tuple[str, ...], own: set[str]) -> None:
        self.folder, self.patterns, self.own, self.bounds = folder, patterns, own, home(folder)
        self.files: list[str] = []  # that belong
        self.outside: list[str] = []  # of these, what links bring from outside the folder
        self.odd: list[str] = []  # names that belong, of something that is no file
        self.rest: list[str] = []
        self._sort("")

    def _sort(self, above: str) -> None:
        try:
            names = sorted(os.listdir(self.folder / above))
        except OSError as error:
            raise ModelError(f"{self.folder / above} cannot be listed ({error.strerror}); make it readable") from None
        for name in (above + name for name in names):
            path = self.folder / name
            if name in self.own:
                if name == CARD:
                    self._can_be_read(name)
                continue
            outside = os.path.exists(path) and not path.resolve().is_relative_to(self.bounds)
            if os.path.isdir(path):
                self._sort(f"{name}/") if self._leads_on(name) and not outside else self.rest.append(f"{name}/")
            elif not belongs(name, KNOWN if outside else self.patterns):  # files that the model itself names must be in its folder
                self.rest.append(name)
            elif self._can_be_read(name):
                self.files.append(name)
                self.outside += [name] if outside else []

    def _can_be_read(self, name: str) -> bool:
        """Check a file of the model. A pipe or a link to nowhere goes to `odd`; a file without permission to read is refused."""
        path = self.folder / name
        if not os.path.isfile(path):
            self.odd.append(name)
            return False
        if not is_readable(path):
            raise ModelError(f"{path} belongs to the model and cannot be read; make it readable, or remove it")
        return True

    def _leads_on(self, name: str) -> bool:
        """Whether this folder may hold files or shards of the model. Other folders are not listed."""
        depth = name.count("/") + 1
        below = (pattern.split("/") for pattern in self.patterns)
        fits = (len(parts) > depth and all(map(fnmatchcase, name.split("/"), parts[:depth])) for parts in below)
        return any(fits) or any(file.startswith(f"{name}/") for file in self.own)


def _notes(folder: Path, listing: _Listing) -> Iterator[str]:
    rest = listing.rest
    for names, text in REASONS.items():
        if known := [name for name in rest if any(fnmatchcase(name.removesuffix("/"), pattern) for pattern in names)]:
            yield f"{_listed(known)}: {text}"
            rest = [name for name in rest if name not in known]
    for place, kind in modules(folder).items():
        name = kind.rpartition(".")[2]
        pickles = [file for file in rest if place and file.startswith(f"{place}/") and file.endswith(PICKLES)]
        stored = any(file.startswith(f"{place}/") and file.endswith(".safetensors") for file in listing.files)
        if place and not stored and (pickles or name in WEIGHTED):
            why = f"only pickle ({_listed(pickles)}), which can run code when opened" if pickles else "not there as safetensors"
            yield f"{_listed([place])}: the weights of this module are {why}; put them there as safetensors, else sentence-transformers cannot open the output"
            rest = [file for file in rest if file not in pickles]
        elif place and name.endswith("Transformer"):
            yield f"{_listed([place])}: sentence-transformers opens the model in this folder, which is copied and not converted"
    if listing.outside:
        yield f"{_listed(listing.outside)}: copied from outside the folder, where links lead"
    if listing.odd:
        yield f"{_listed(listing.odd)}: left out, since there is no file of that name, but a pipe, a device or a link to nowhere"
    if rest:
        yield f"left out, as no part of the model: {_listed(sorted(rest, key=lambda name: (name.startswith('.'), name)))}"


def _listed(names: Iterable[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _without_dead_code(checkpoint: Checkpoint, config: Config) -> tuple[Config, dict[str, str], list[str]]:
    """Drop entries of `auto_map` whose code is missing, or is of the family before the conversion. transformers uses its own class then."""
    folder, edits, notes = checkpoint.folder, {}, []
    if not config.needs_effconvert and "auto_map" in config.raw:
        entries, missing = _split(folder, config.raw["auto_map"])
        changed = isinstance(entries, dict) and config.kind != checkpoint.config.kind
        obsolete = [key for key in entries if key.startswith(("AutoConfig", "AutoModel"))] if changed else []
        entries = {key: value for key, value in entries.items() if key not in obsolete} if obsolete else entries
        if missing or obsolete:
            config = config.with_keys({"auto_map": entries}) if entries else config.without("auto_map")
        notes += _missing_code(CONFIG, missing)
        notes += [f"{CONFIG}: {', '.join(obsolete)} of auto_map are dropped, since that code is of a {checkpoint.config.kind}"] if obsolete else []
    for name in NAMES_CODE:
        entries, missing = _split(folder, auto_map(folder, name))
        if missing:
            content: dict[str, Any] = {key: value for key, value in read_json(folder / name).items() if key != "auto_map"}
            edits[name] = json.dumps({**content, **({"auto_map": entries} if entries else {})}, indent=2) + "\n"
            notes += _missing_code(name, missing)
    return config, edits, notes


def _split(folder: Path, content: Any) -> tuple[Any, dict[str, str]]:
    """Return what stays of an `auto_map`, and the missing file of each entry that is dropped."""
    entries = content if isinstance(content, dict) else {"AutoTokenizer": content} if isinstance(content, list) else {}  # a list: the old form for a tokenizer
    missing = {}
    for key, entry in entries.items():
        files = sorted(name for stem in stems_of({key: entry}) for name in code(folder, stem))
        if gone := [name for name in files if not is_readable(folder / name)]:
            missing[key] = gone[0]
    return {key: entry for key, entry in entries.items() if key not in missing} if missing else content, missing


def _missing_code(name: str, missing: Mapping[str, str]) -> list[str]:
    return (
        [f"{name}: {', '.join(missing)} of auto_map dropped, since {_listed(sorted({*missing.values()}))} is not there; transformers' own class is used"]
        if missing
        else []
    )
