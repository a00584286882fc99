"""Write a planned conversion, a tensor at a time. A kill at any moment loses one shard at most.

A finished shard is flushed to disk, renamed and recorded in the manifest. The same command resumes after it. Writing holds two layers in memory,
whatever the model's size.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Self

from torch import Tensor

from effconvert.checkpoint.config import CONFIG
from effconvert.checkpoint.manifest import CARD, DRAFT, RECIPE, read_manifest, save_manifest, to_disk
from effconvert.checkpoint.parts import Deferred
from effconvert.checkpoint.replaced import STUB, STUB_FILE
from effconvert.checkpoint.shards import as_bytes, copy_run, header
from effconvert.checkpoint.tensors import INDEX
from effconvert.convert import drafts
from effconvert.convert.plan import OUTER, TOKENIZER, Plan, Target
from effconvert.progress import Advance


def write(plan: Plan, partial: Path, advance: Advance) -> int:
    """Write the missing files of `plan` to `partial`, and return how many shards were there already."""
    manifest = read_manifest(partial)
    stamps: dict[str, list[int]] = manifest["shards"]
    resumed = 0
    with _Layers(plan, partial) as layers:
        for name, targets in plan.shards.items():
            path = partial / name
            if path.is_file() and stamps.get(name) == _stamp(path):
                resumed += 1
                layers.mark_written(targets)
                advance(sum(target.bytes for target in targets))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_shard(path, targets, layers, advance)
            stamps[name] = _stamp(path)
            save_manifest(partial, manifest)
    write_others(plan, partial)
    return resumed


def is_unfinished(plan: Plan, partial: Path) -> bool:
    """Whether a shard of `plan` is still missing in `partial`, which need not be there, or may be another conversion's."""
    manifest = read_manifest(partial)
    stamps = manifest.get("shards") if manifest.get("fingerprint") == plan.fingerprint else None
    return not isinstance(stamps, dict) or not all((partial / name).is_file() and stamps.get(name) == _stamp(partial / name) for name in plan.shards)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


class _Layers:
    """The converted tensors of the current layer, and of the next one, which a thread computes while this one is written."""

    def __init__(self, plan: Plan, partial: Path) -> None:
        self.plan, self.partial = plan, partial
        units = (target.unit for shard in plan.shards.values() for target in shard)
        self.remaining = Counter(unit for unit in units if unit is not None)  # layer -> its tensors that are not written yet
        self.ready: dict[int, dict[str, Tensor | Deferred]] = {}
        self.futures: dict[int, Future[dict[str, Tensor | Deferred]]] = {}
        self.order = list(self.remaining)
        self.worker = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.shutdown(cancel_futures=True)

    def take(self, target: Target) -> Iterator[Tensor]:
        """Yield the converted tensor, in pieces where it is large."""
        index = target.unit
        assert index is not None
        if index not in self.ready:
            self._start(index)
            self.ready[index] = self.futures.pop(index).result()
            if len(self.ready) > 2:  # in a file sorted by kind of tensor; computing a layer again saves memory
                del self.ready[next(iter(self.ready))]
            if later := [unit for unit in self.order[self.order.index(index) + 1 :] if self.remaining[unit]]:
                self._start(later[0])
        value = self.ready[index].pop(target.name)
        self.mark_written([target])
        yield from value.pieces() if isinstance(value, Deferred) else [value]

    def mark_written(self, targets: list[Target]) -> None:
        """Count `targets` as written."""
        for target in targets:
            if target.unit is not None:
                self.remaining[target.unit] -= 1
                if not self.remaining[target.unit]:
                    self.ready.pop(target.unit, None)

    def _start(self, index: int) -> None:
        if index not in self.futures and index not in self.ready:
            self.futures[index] = self.worker.submit(self._compute, index)

    def _compute(self, unit: int) -> dict[str, Tensor | Deferred]:
        if self.plan.needs_calibration and unit != OUTER:
            prefix = self.plan.layer_prefix(unit)
            return {prefix + name: tensor for name, tensor in drafts.read(self.plan, unit, self.partial).items()}
        prefix, parts = self.plan.parts(unit)
        return {prefix + name: value for name, _, value in parts.tensors(stored=True) if value is not None}


def _write_shard(path: Path, targets: list[Target], layers: _Layers, advance: Advance) -> None:
    draft = path.with_name(path.name + DRAFT)
    try:
        with draft.open("wb") as file:
            file.write(header({target.name: (target.dtype, target.shape) for target in targets}))
            for target in _runs(targets, file, advance):
                for piece in layers.take(target):
                    file.write(as_bytes(piece, target.dtype, target.name))
                advance(target.bytes)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _runs(targets: list[Target], file: BinaryIO, advance: Advance) -> Iterator[Target]:
    """Copy runs of unchanged neighbours. Yield, between the runs, the targets that must be computed."""
    source, start, stop = targets[0].origin.file, 0, 0
    for target in [*targets, None]:
        if target is not None and target.unit is None and (target.origin.file, target.origin.start) == (source, stop):
            stop = target.origin.stop
            continue
        if stop > start:
            with source.open("rb", buffering=0) as original:
                copy_run(original, file, start, stop, advance)
        start = stop = 0
        if target is not None and target.unit is None:
            source, start, stop = target.origin.file, target.origin.start, target.origin.stop
        elif target is not None:
            yield target


def write_others(plan: Plan, partial: Path) -> None:
    """Write the files beside the shards."""
    folder = plan.checkpoint.folder
    for name in plan.files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        if name in plan.edits:
            (partial / name).write_text(plan.edits[name], encoding="utf-8")
        else:
            shutil.copyfile(plan.source(name), partial / name)
    if plan.tokenizer:
        _name_tokenizer(partial / TOKENIZER, plan.tokenizer)
    if plan.config == plan.checkpoint.config:
        shutil.copyfile(folder / CONFIG, partial / CONFIG)
    else:
        (partial / CONFIG).write_text(json.dumps(plan.config.content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plan.config.needs_effconvert:
        (partial / STUB_FILE).write_text(STUB.format(kind=plan.config.kind), encoding="utf-8")
    if plan.has_index:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8")) if (folder / INDEX).is_file() else {}
        index["metadata"] = {**index.get("metadata", {}), "total_size": plan.after.bytes}
        if "total_parameters" in index["metadata"]:
            index["metadata"]["total_parameters"] = plan.after.parameters
        index["weight_map"] = {target.name: shard for shard, targets in plan.shards.items() for target in targets}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in plan.output_files:
        if name not in (*plan.shards, RECIPE, CARD):
            to_disk(partial / name)


def _name_tokenizer(path: Path, name: str) -> None:
    """Add the class to a tokenizer's config that names none."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not content.get("tokenizer_class"):
        path.write_text(json.dumps({**content, "tokenizer_class": name}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
