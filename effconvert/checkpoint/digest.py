"""The digest of a model: a hash of its weights, config and tokenizer, whatever the name of its folder."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from effconvert.checkpoint.belonging import IN_MODULE, is_readable, modules
from effconvert.checkpoint.config import CONFIG
from effconvert.checkpoint.shards import StoredTensor
from effconvert.checkpoint.sources import cache

# Beginnings and endings of names of files, beside the weights, that change what a model computes.
BEGIN = ("added_tokens", "chat_template", "generation_config", "merges", "sentencepiece", "special_tokens_map", "spiece", "tokenizer", "vocab")
END = (".jinja", ".model", ".tiktoken")
PIECES, PIECE = 16, 1 << 16  # of a sampled file: their number, and bytes of each


def matters(name: str) -> bool:
    """Whether the file `name` of a model changes what it computes."""
    return name.startswith(BEGIN) or name.endswith((*END, ".safetensors")) or name == CONFIG


class Opened(Protocol):
    """A model in a folder, of a known family or an unknown one."""

    @property
    def folder(self) -> Path:
        """The folder."""

    @property
    def stored(self) -> Iterable[StoredTensor]:
        """Every tensor on disk."""


def digest(checkpoint: Opened) -> str:
    """Return the SHA-256 of `checkpoint`'s files, those of sentence-transformers' modules included.

    A file's hash is cached by its path, size and time, so a large model is read only once.
    """
    folder = checkpoint.folder
    weights = {tensor.file for tensor in checkpoint.stored}
    others = {path for path in folder.iterdir() if path.is_file() and not path.name.endswith(".safetensors") and matters(path.name)}
    others |= {path for place in modules(folder) if place for pattern in IN_MODULE for path in (folder / place).glob(pattern) if is_readable(path)}
    hashes_by_file = _load_hashes()
    hashes = {path.relative_to(folder).as_posix(): _file_hash(path, hashes_by_file) for path in sorted(weights | others | {folder / CONFIG})}
    _save_hashes(hashes_by_file)
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def sample(path: Path) -> str:
    """Return the SHA-256 of samples from all over a file. Files of different models may have the same name, size and time."""
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
    """Return the SHA-256 of a file's bytes, without the cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_hash(path: Path, hashes_by_file: dict[str, str]) -> str:
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    if key not in hashes_by_file:
        hashes_by_file[key] = file_hash(path)
    return hashes_by_file[key]


def _cache_file() -> Path:
    return cache() / "digests.json"


def _load_hashes() -> dict[str, str]:
    try:
        hashes_by_file = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return hashes_by_file if isinstance(hashes_by_file, dict) else {}


def _save_hashes(hashes_by_file: dict[str, str]) -> None:
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        draft = _cache_file().with_name(f"digests.{os.getpid()}.draft")
        draft.write_text(json.dumps(hashes_by_file), encoding="utf-8")
        draft.replace(_cache_file())
    except OSError:
        return  # without the cache it only takes longer
