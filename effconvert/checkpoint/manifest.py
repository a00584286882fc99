"""The manifest beside the weights: which files effconvert wrote, from what, and how."""

import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "effconvert.json"
RECIPE, CARD = "effconvert.yaml", "README.md"  # written anew beside every conversion
DRAFT = ".effconvert-draft"  # suffix of files that are being written


def foreign_files(folder: Path) -> list[str]:
    """Return the files in `folder` that effconvert did not write, by its manifest: other names or sizes, links, and changes since.

    The manifest is written last, so a newer file was changed by somebody.
    """
    ours, written = {f"{MANIFEST}{DRAFT}": None}, 0
    if manifest := read_manifest(folder):
        ours |= {MANIFEST: None, **manifest["files"]}
        written = (folder / MANIFEST).stat().st_mtime_ns
    foreign = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        target = name.removesuffix(DRAFT) if ours.get(name.removesuffix(DRAFT), 0) is None else name
        if path.is_symlink():
            foreign.append(name)
        elif not path.is_dir():
            size = ours.get(target, -1)
            status = path.stat()
            if size is not None and (size != status.st_size or status.st_mtime_ns > written):
                foreign.append(name)
    return sorted(foreign)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`; empty if effconvert did not write the folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(manifest, dict) and isinstance(manifest.get("fingerprint"), str) and isinstance(manifest.get("files"), dict)
    return manifest if sound else {}


def save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step: it is never seen half-written."""
    draft = folder / f"{MANIFEST}{DRAFT}"
    try:
        draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        to_disk(draft)
        draft.replace(folder / MANIFEST)
    finally:
        draft.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on disk."""
    if path.is_file() or os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
