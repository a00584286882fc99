"""The output folder: checks before it is written, the lock, and the rename at the end.

Everything is written to `OUT.partial` first, with a manifest of its files. One rename makes it `OUT`. An old output is kept in `OUT.replaced` until
then. Only files that a manifest lists with their size are removed. Files that somebody added, or trained further, stay.
"""

import contextlib
import errno
import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from effconvert.checkpoint.manifest import DRAFT, MANIFEST, foreign_files, read_manifest, save_manifest, to_disk
from effconvert.convert import drafts
from effconvert.convert.plan import TOKENIZER, Plan
from effconvert.errors import EffconvertError, OptionError
from effconvert.heal.distill import Distill
from effconvert.version import __version__

SCRATCH = f"logits{DRAFT}"  # in `OUT.partial` while two models are compared
MARK = "effconvert-training.json"  # in `OUT.training`: which conversion it belongs to


def partial_folder(output: Path) -> Path:
    """Return where `output` is built."""
    return output.with_name(output.name + ".partial")


def replaced_folder(output: Path) -> Path:
    """Return the folder that holds an old output until the new one is in place."""
    return output.with_name(output.name + ".replaced")


def lock_file(output: Path) -> Path:
    """Return the empty file that is locked while `output` is written."""
    return output.with_name(f".{output.name}.lock")


def check(plan: Plan, output: Path, overwrite: bool, scratch: int) -> None:
    """Refuse an output folder that cannot be used, before anything is written. Verification needs `scratch` bytes beside it, for logits.

    Raises:
        OptionError: it exists, cannot be written, has too little room, or would touch the source.
    """
    try:
        if output.parts[:1] and output.parts[0].startswith("~"):
            raise OptionError(f"--output {output} is in the home folder of somebody who has none here; give another")
        if output.name in ("", ".."):
            raise OptionError(f"--output '{output}' is not the name of a new folder; give one")
        trains = isinstance(plan.surgeries[-1], Distill) if plan.surgeries else False
        for folder in {plan.checkpoint.folder, plan.teacher.folder, *plan.others}:
            _check_source(folder, output, trains)
        check_free(output, overwrite)
        _check_room(plan, output, scratch)
    except OSError as error:
        raise OptionError(f"{error.filename or output} cannot be used ({error.strerror or error}); give another --output") from None


def check_free(output: Path, overwrite: bool) -> None:
    """Refuse a folder with files that effconvert did not write."""
    if output.is_symlink():
        raise OptionError(f"{output} is a link; give --output the folder that it stands for")
    if output.exists() and not output.is_dir():
        raise OptionError(f"{output} exists and is a file; give another --output")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise OptionError(f"{output} exists; give another --output, or --overwrite to replace what effconvert wrote")
        if foreign := foreign_files(output):
            what = f"files that effconvert did not write, or that were changed since ({foreign[0]})"
            raise OptionError(f"{output} holds {what}, so it is not replaced; give another --output")
    lock = lock_file(output)
    if lock.is_symlink() or (lock.exists() and lock.stat().st_size):
        raise OptionError(f"{lock} is in the way and effconvert did not write it; move it, or give another --output")
    for folder in (partial_folder(output), replaced_folder(output)):
        if folder.is_symlink() or (folder.exists() and foreign_files(folder)):
            raise OptionError(f"{folder} is in the way and effconvert did not write all of it; move it, or give another --output")


def _check_source(source: Path, output: Path, trains: bool) -> None:
    source = source.resolve()
    for folder in (output, partial_folder(output), replaced_folder(output), *([training_folder(output)] if trains else [])):
        target = folder.resolve()
        if source == target or source in target.parents or target in source.parents or (folder.exists() and folder.samefile(source)):
            raise OptionError(f"{folder}, which is needed for the output, and the model {source} lie one inside the other; give another --output")


def _check_room(plan: Plan, output: Path, scratch: int) -> None:
    place = next(folder for folder in output.resolve().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OptionError(f"{output} cannot be made: {place} is not a folder that you may write to; give another --output")
    present = sum(file.stat().st_size for file in partial_folder(output).rglob("*") if file.is_file())
    free, need = shutil.disk_usage(place).free + present, plan.disk + max(plan.draft_bytes, scratch)
    if free < need:
        fewer = f", or fewer --tokens: {scratch / 1e9:.2f} GB are for logits" if plan.disk + plan.draft_bytes <= free else ""
        raise OptionError(f"{output} needs {need / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free; make room, or give an --output on another disk{fewer}")


@contextlib.contextmanager
def workplace(plan: Plan, output: Path) -> Iterator[Path]:
    """Make `OUT.partial` with a manifest of its future files, and lock `output` meanwhile.

    Raises:
        OptionError: another effconvert is writing there.
        EffconvertError: the disk is full or cannot be written; finished shards stay for the next try.
    """
    partial, lock = partial_folder(output), lock_file(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                _prepare(plan, partial)
                yield partial
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise OptionError(f"another effconvert is writing {output}; wait for it, or give another --output") from None
    except OSError as error:
        advice = f"the finished shards are in {partial}, and the same command resumes there"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EffconvertError(f"no room left for {output} ({error.strerror}); make some: {advice}") from None
        raise EffconvertError(f"{error.filename or output}: {error.strerror or error}; {advice}") from None


def _prepare(plan: Plan, partial: Path) -> None:
    manifest = read_manifest(partial)
    (partial / SCRATCH).unlink(missing_ok=True)
    shards = manifest.get("shards") if manifest.get("fingerprint") == plan.fingerprint else None
    if not isinstance(shards, dict):
        shards = {}
        empty(partial, MANIFEST)  # of another model or recipe, and useless; `check_free` checked that effconvert wrote it
    noted = {key: manifest[key] for key in ("layer_errors",) if shards and key in manifest}
    save_manifest(partial, {**identity(plan), **noted, "files": dict.fromkeys([*plan.output_files, SCRATCH, *drafts.names(plan)]), "shards": shards})


def matching_manifest(plan: Plan, output: Path, verify: bool) -> dict[str, Any]:
    """Return the manifest of `output` if it is what `plan` would write, else an empty one. With `verify` it must be verified too."""
    manifest = read_manifest(output)
    sound = manifest.get("fingerprint") == plan.fingerprint and set(manifest["files"]) == set(plan.output_files)
    sound = sound and all((output / name).is_file() for name in plan.output_files) and not foreign_files(output)
    copies = [name for name in plan.files if name not in plan.edits and (name != TOKENIZER or not plan.tokenizer)]
    sound = sound and all(filecmp.cmp(plan.source(name), output / name, shallow=False) for name in copies)
    sound = sound and all((output / name).read_text(encoding="utf-8") == text for name, text in plan.edits.items())
    return manifest if sound and (manifest.get("verified") or not verify) else {}


def write_texts(partial: Path, texts: dict[str, str]) -> None:
    """Write the files that people read, such as the model card."""
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
        to_disk(partial / name)


def forget_shards(partial: Path) -> None:
    """Mark all shards as unsound, so that the next try writes them again."""
    save_manifest(partial, {**read_manifest(partial), "shards": {}})


def publish(plan: Plan, partial: Path, output: Path, overwrite: bool, record: dict[str, Any]) -> list[Path]:
    """Complete the manifest with `record`, rename `partial` to `output`, replacing an old output, and return what could not be removed after that.

    Raises:
        OptionError: somebody put files there meanwhile.
    """
    check_free(output, overwrite)
    final = {**identity(plan), **record, "files": {name: (partial / name).stat().st_size for name in plan.output_files}}
    save_manifest(partial, {**final, "shards": read_manifest(partial)["shards"]})  # for the next try, if this one is killed
    to_disk(partial)
    if output.exists():
        remove(replaced_folder(output), MANIFEST)
        output.rename(replaced_folder(output))
    partial.rename(output)
    to_disk(output.parent)
    return _finish(output, final)


def complete(output: Path, manifest: dict[str, Any]) -> list[Path]:
    """Finish the `publish` of a run that was killed: the output is in its place, and the final manifest is missing. Return what could not be removed.

    Raises:
        OptionError: another effconvert is writing there.
    """
    lock = lock_file(output)
    try:
        with FileLock(lock, timeout=0):
            kept = _finish(output, {key: value for key, value in manifest.items() if key != "shards"})
            lock.unlink(missing_ok=True)
            return kept
    except Timeout:
        raise OptionError(f"another effconvert is writing {output}; wait for it, or give another --output") from None


def _finish(output: Path, manifest: dict[str, Any]) -> list[Path]:
    """Remove what is of no more use beside an output, and then write its final manifest: without that, `complete` does so again.

    Returns:
        What could not be removed, or has files of somebody else.
    """
    kept, old = list[Path](), replaced_folder(output)
    leftovers = {old: MANIFEST, **({training_folder(output): MARK} if trained_for(output) == manifest["fingerprint"] else {})}
    for folder, mark in leftovers.items():
        try:
            if folder == old and foreign_files(old):
                kept.append(old)
            else:
                remove(folder, mark)
        except OSError:
            kept.append(folder)
    save_manifest(output, manifest)
    return kept


def trained_for(output: Path) -> str | None:
    """Return the fingerprint of the conversion whose checkpoints are beside `output`: empty if a kill left it half-written, None if there is none."""
    try:
        return str(json.loads((training_folder(output) / MARK).read_text(encoding="utf-8"))["fingerprint"])
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        return ""


def remove(folder: Path, mark: str) -> None:
    """Remove a folder of ours, if it is there, and last the file by which it is known for that: a kill on the way leaves one that still is."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(folder))
    if folder.exists():
        empty(folder, mark)
        shutil.rmtree(folder)


def empty(folder: Path, mark: str) -> None:
    """Remove all that is in a folder but the file `mark`."""
    for path in folder.iterdir():
        if path.name != mark:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def identity(plan: Plan) -> dict[str, Any]:
    """Return the entries that every manifest has: version, fingerprint, recipe."""
    return {"effconvert": __version__, "fingerprint": plan.fingerprint, "recipe": plan.recipe}


def training_folder(output: Path) -> Path:
    """Return where a distillation keeps its checkpoints."""
    return output.with_name(output.name + ".training")
