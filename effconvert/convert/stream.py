"""Write a planned conversion, a tensor at a time, so that a kill at any moment loses one shard at most.

Everything goes to `OUT.partial` first: finished shards are flushed to disk, renamed and recorded in a manifest, and the same command
finds them again. `OUT` appears by one rename, when it is whole. Memory is two layers, whatever the model's size.
"""

import contextlib
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

from filelock import FileLock, Timeout
from torch import Tensor

import effconvert
from effconvert.convert.checkpoint import INDEX
from effconvert.convert.plan import Plan, Target
from effconvert.convert.shards import as_bytes, copy_run, header
from effconvert.errors import EffconvertError, OptionError

MANIFEST = "effconvert.json"
Advance = Callable[[int], None]  # told how many bytes were written


def check_output(plan: Plan, output: Path, overwrite: bool, scratch: int) -> None:
    """Refuse, before anything is written, a place where the result (and `scratch` bytes while it is measured) could not stand.

    Raises:
        OptionError: it exists, cannot be written, has too little room, or would touch the source.
    """
    try:
        _check_place(plan, output, overwrite, scratch)
    except OSError as error:
        raise OptionError(f"{error.filename or output} cannot be used ({error.strerror}); give another --output") from None


def _check_place(plan: Plan, output: Path, overwrite: bool, scratch: int) -> None:
    source, target = plan.checkpoint.folder.resolve(), output.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise OptionError(f"the output {output} and the model {plan.checkpoint.folder} lie one inside the other; give another --output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise OptionError(f"{output} exists; give another --output, or --overwrite to replace what effconvert wrote")
        if foreign := foreign_files(output):
            raise OptionError(f"{output} holds what effconvert did not write ({foreign[0]}), so it stays; give another --output")
    old = replaced_folder(output)
    if old.exists() and foreign_files(old):
        raise OptionError(f"{old} is in the way and effconvert did not write it; move it, or give another --output")
    partial = partial_folder(output)
    if partial.exists() and any(partial.iterdir()) and not (partial / MANIFEST).is_file() and not (partial / "lock").is_file():
        raise OptionError(f"{partial} is in the way and effconvert did not write it; move it, or give another --output")
    place = next(folder for folder in (target, *target.parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OptionError(f"{output} cannot be made: {place} is not a folder that you may write to; give another --output")
    present = sum(file.stat().st_size for file in partial.glob("*.safetensors")) if partial.exists() else 0
    free = shutil.disk_usage(place).free + present
    if free < plan.disk + scratch:
        raise OptionError(
            f"{output} needs {(plan.disk + scratch) / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free; make room, or give an --output on another disk"
        )


def foreign_files(folder: Path) -> list[str]:
    """Return what lies in `folder` beside what effconvert recorded having written there."""
    manifest = read_manifest(folder)
    ours = {MANIFEST, *manifest.get("files", [])} if manifest else set()
    return sorted(name for path in folder.rglob("*") if not path.is_dir() and (name := path.relative_to(folder).as_posix()) not in ours)


def partial_folder(output: Path) -> Path:
    """Return where `output` is built."""
    return output.with_name(output.name + ".partial")


def replaced_folder(output: Path) -> Path:
    """Return where an output that is being replaced waits until the new one stands."""
    return output.with_name(output.name + ".replaced")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what effconvert recorded in `folder`, empty if it did not write it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and "fingerprint" in manifest else {}


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """Make and lock `OUT.partial`.

    Raises:
        OptionError: another effconvert is writing there.
        EffconvertError: the disk is full or cannot be written; what is finished stays for the next try.
    """
    partial = partial_folder(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(partial / "lock", timeout=0):
            yield partial
    except Timeout:
        raise OptionError(f"another effconvert is writing {output}; wait for it, or give another --output") from None
    except OSError as error:
        again = f"the finished shards wait in {partial}, and the same command goes on from there"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EffconvertError(f"no room left for {output} ({error.strerror}); make some: {again}") from None
        raise EffconvertError(f"{error.filename or output}: {error.strerror}; {again}") from None


def write(plan: Plan, partial: Path, advance: Advance) -> int:
    """Write what is missing of `plan` to `partial`, and return how many shards were there already."""
    manifest = read_manifest(partial)
    if manifest.get("fingerprint") != plan.fingerprint:
        for path in partial.iterdir():  # of another model or recipe: nothing of it can be used
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        manifest = {"effconvert": effconvert.__version__, "fingerprint": plan.fingerprint, "recipe": plan.recipe, "shards": {}}
        save_manifest(partial, manifest)
    done: dict[str, list[int]] = manifest["shards"]
    kept = 0
    with _Layers(plan) as layers:
        for name, targets in plan.shards.items():
            path = partial / name
            if path.is_file() and done.get(name) == _stamp(path):
                kept += 1
                layers.forget(targets)
                advance(sum(target.bytes for target in targets))
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_shard(path, targets, layers, advance)
            done[name] = _stamp(path)
            save_manifest(partial, manifest)
    _write_others(plan, partial)
    return kept


def publish(plan: Plan, partial: Path, output: Path, record: dict[str, Any]) -> None:
    """Complete the manifest with `record` and move `partial` to where it belongs, replacing what was there."""
    (partial / "lock").unlink(missing_ok=True)
    files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file() and path.name != MANIFEST)
    about = {"effconvert": effconvert.__version__, "fingerprint": plan.fingerprint, "recipe": plan.recipe}
    final = {**about, **record, "files": files}
    save_manifest(partial, {**final, "shards": read_manifest(partial)["shards"]})  # still to be found by a next try, if this one is killed
    old = replaced_folder(output)
    if output.exists():
        if old.exists():
            shutil.rmtree(old)
        output.rename(old)
    partial.rename(output)
    save_manifest(output, final)
    if old.exists():
        shutil.rmtree(old)


def save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step: it is never seen half-written."""
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / MANIFEST)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


class _Layers:
    """The converted tensors of the layer at work, and of the next one, which is computed while this one and what lies between is copied."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        needed = (target.layer for shard in plan.shards.values() for target in shard)
        self.left = Counter(index for index in needed if index is not None)  # layer -> its tensors still to be written
        self.ready: dict[int, dict[str, Tensor]] = {}
        self.ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self.order = list(self.left)
        self.worker = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.shutdown(cancel_futures=True)

    def take(self, target: Target) -> Tensor:
        """Return the converted tensor."""
        index = target.layer
        assert index is not None
        if index not in self.ready:
            self._begin(index)
            self.ready[index] = self.ahead.pop(index).result()
            if following := [other for other in self.order[self.order.index(index) + 1 :] if self.left[other]]:
                self._begin(following[0])
        tensor = self.ready[index].pop(target.name)
        self.forget([target])
        return tensor

    def forget(self, targets: list[Target]) -> None:
        """Count `targets` as written."""
        for target in targets:
            if target.layer is not None:
                self.left[target.layer] -= 1
                if not self.left[target.layer]:
                    self.ready.pop(target.layer, None)

    def _begin(self, index: int) -> None:
        if index not in self.ahead and index not in self.ready:
            self.ahead[index] = self.worker.submit(self._compute, index)

    def _compute(self, index: int) -> dict[str, Tensor]:
        family = self.plan.config.family
        computed = self.plan.operate(index, "cpu").tensors(family)
        return {f"{self.plan.checkpoint.prefix}{family.layers}.{index}.{name}": tensor for name, _, tensor in computed if tensor is not None}


def _write_shard(path: Path, targets: list[Target], layers: _Layers, advance: Advance) -> None:
    draft = path.with_name(path.name + ".draft")
    source = targets[0].origin.file  # a shard is written from the one it replaces, but for what layers compute
    try:
        with draft.open("wb") as file, source.open("rb", buffering=0) as original:
            file.write(header({target.name: (target.dtype, target.shape) for target in targets}))
            for target in _runs(targets, file, original, advance):
                file.write(as_bytes(layers.take(target), target.dtype, target.name))
                advance(target.bytes)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _runs(targets: list[Target], file: BinaryIO, original: BinaryIO, advance: Advance) -> Iterator[Target]:
    """Copy untouched neighbours together; yield, between the runs, what has to be computed."""
    start = stop = 0
    for target in [*targets, None]:
        if target is not None and target.layer is None and target.origin.start == stop:
            stop = target.origin.stop
            continue
        if stop > start:
            copy_run(original, file, start, stop, advance)
        start = stop = 0
        if target is not None and target.layer is None:
            start, stop = target.origin.start, target.origin.stop
        elif target is not None:
            yield target


def _write_others(plan: Plan, partial: Path) -> None:
    folder = plan.checkpoint.folder
    for name in plan.files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, partial / name)
    if plan.config.raw == plan.checkpoint.config.raw:
        shutil.copyfile(folder / "config.json", partial / "config.json")
    else:
        (partial / "config.json").write_text(json.dumps(plan.config.raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": plan.after.bytes}
        if "total_parameters" in index["metadata"]:
            index["metadata"]["total_parameters"] = plan.after.parameters
        index["weight_map"] = {target.name: shard for shard, targets in plan.shards.items() for target in targets}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
