"""What identifies a model: a hash over its weights, config and tokenizer, whatever its folder is called."""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import CONFIG
from effconvert.checkpoint.sources import cache

# Files beside the weights that change what a model computes, by how their names begin or end.
BEGIN = ("added_tokens", "chat_template", "generation_config", "merges", "sentencepiece", "special_tokens_map", "spiece", "tokenizer", "vocab")
END = (".jinja", ".model", ".tiktoken")
PIECES, PIECE = 16, 1 << 16  # of a file that is sampled: how many, and bytes of each


def matters(name: str) -> bool:
    """Whether the file `name` of a model changes what it computes."""
    return name.startswith(BEGIN) or name.endswith((*END, ".safetensors")) or name == CONFIG


def digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of `checkpoint`'s files.

    A file's own hash is remembered by its place, size and time, so that a large model is read through once.
    """
    folder = checkpoint.folder
    weights = {tensor.file for tensor in checkpoint.stored}
    beside = {path for path in folder.iterdir() if path.is_file() and not path.name.endswith(".safetensors") and matters(path.name)}
    known = _remembered()
    hashes = {path.relative_to(folder).as_posix(): _file_hash(path, known) for path in sorted(weights | beside | {folder / CONFIG})}
    _remember(known)
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def sample(path: Path) -> str:
    """Return a SHA-256 of some of a file's bytes, from all over it: files of the same name, size and time may still be of other models."""
    status = path.stat()
    return _sample(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(1024)
def _sample(path: Path, size: int, *_: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(PIECES):
            file.seek(max(0, size - PIECE) * number // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_hash(path: Path, known: dict[str, str]) -> str:
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    if key not in known:
        known[key] = file_hash(path)
    return known[key]


def _place() -> Path:
    return cache() / "digests.json"


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(_place().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: dict[str, str]) -> None:
    try:
        _place().parent.mkdir(parents=True, exist_ok=True)
        draft = _place().with_name(f"digests.{os.getpid()}.draft")
        draft.write_text(json.dumps(known), encoding="utf-8")
        draft.replace(_place())
    except OSError:
        return  # a cache that cannot be written costs time, and nothing else
