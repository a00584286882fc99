"""The folder of a teacher's predictions that `distill --cache-teacher` names: what it belongs to, who may use it, and how it is filled."""

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from effconvert.checkpoint.digest import digest
from effconvert.checkpoint.manifest import DRAFT, to_disk
from effconvert.convert.output import partial_folder, replaced_folder, training_folder
from effconvert.convert.plan import Plan
from effconvert.errors import EffconvertError, OptionError
from effconvert.heal._windows import Items, Windows
from effconvert.heal.distill import Distill
from effconvert.modeling import loading
from effconvert.modeling.precision import type_of
from effconvert.paths import real
from effconvert.progress import Progress
from effconvert.quantities import size

if TYPE_CHECKING:  # these import transformers, which most conversions need not wait for
    from effconvert.heal._kept import Kept
    from effconvert.heal._teacher_cache import TeacherCache

KEY = "effconvert-predictions.json"  # in the folder: what its predictions are of
FORMAT = 1  # another one cannot be read
ORDER = 0  # seed of the windows' order
OTHER = {  # entries of the key that people do not read -> what differs
    "format": "they were written by another version of effconvert",
    "teacher": "they are another teacher's",
    "tokenizer": "they are of another tokenizer",
    "text": "they are of another text",
    "vocabulary": "they are of another number of tokens",
}


def options_of(plan: Plan) -> Distill:
    """Return the options of the last step of a plan, which is a distillation."""
    options = plan.surgeries[-1]
    assert isinstance(options, Distill)
    return options


def kept_of(plan: Plan) -> "Kept":
    """Return what is kept of each prediction."""
    from effconvert.heal._kept import KINDS

    options = options_of(plan)
    return KINDS[options.cache_kind](options.cache_size, min(plan.config.vocabulary, plan.teacher.config.vocabulary))


def key_of(plan: Plan, windows: Windows) -> dict[str, Any]:
    """Return what predictions are of: two folders with the same key are interchangeable."""
    options, tokenizer = options_of(plan), loading.load_tokenizer(plan.checkpoint.folder)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "format": FORMAT,
        "teacher": digest(plan.teacher),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "text": _sha256(windows),
        "vocabulary": kept_of(plan).vocabulary,
        "window": options.window,
        "temperature": options.temperature,
        "cache-kind": options.cache_kind,
        "cache-size": options.cache_size,
    }


def check_cache(plan: Plan, output: Path, windows: Windows) -> None:
    """Refuse a folder of something else, or without room, before anything is written.

    Raises:
        OptionError: the reason.
    """
    folder = _folder(plan)
    places = [output, partial_folder(output), replaced_folder(output), training_folder(output), plan.checkpoint.folder, plan.teacher.folder]
    for place in map(real, places):
        if real(folder) == place or place in real(folder).parents or real(folder) in place.parents:
            raise OptionError(f"--cache-teacher {folder} and {place}, which belongs to a model, are the same or one inside the other; give another folder")
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--cache-teacher {folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()):
        _check_key(folder, key_of(plan, windows))
        return
    parent = next(place for place in real(folder).parents if place.exists())
    need, free = most_bytes(plan, windows), shutil.disk_usage(parent).free
    if need > free:
        raise OptionError(
            f"--cache-teacher {folder} needs up to {size(need)} and {parent} has {size(free)} free; give a folder on another disk, or less --cache-size"
        )


def most_bytes(plan: Plan, windows: Windows) -> int:
    """Return about how many bytes predictions take on disk at most: whole shards, and of held-out windows the last hidden states, ids, and the head."""
    from effconvert.heal._teacher_cache import per_shard

    options, kept = options_of(plan), kept_of(plan)
    needed, size = options.steps * options.windows, per_shard(options.window)
    trained, measured = min(len(windows.train), -(-needed // size) * size) * options.window, len(windows.held_out) * options.window
    return trained * (kept.bytes_per_token + 4) + measured * (4 * plan.teacher.config.hidden + 4) + 4 * plan.teacher.config.hidden * kept.vocabulary


def filled(plan: Plan, windows: Windows, progress: Progress) -> "TeacherCache":
    """Return the predictions that a run needs; those that are missing are computed first.

    Raises:
        OptionError: the folder is of something else, or damaged.
        EffconvertError: the disk is full.
    """
    from effconvert.heal._teacher_cache import TeacherCache

    options, folder = options_of(plan), _folder(plan)
    order = torch.randperm(len(windows.train), generator=torch.Generator().manual_seed(ORDER))
    train = Items(len(order), lambda at: windows.train[int(order[at])])
    cache = TeacherCache(folder, kept_of(plan), options.temperature, train, min(len(train), options.steps * options.windows), windows.held_out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress):
            _begin(folder, key_of(plan, windows))
            if missing := cache.missing:
                teacher = loading.load(plan.teacher.folder, plan.teacher.config, type_of(plan.teacher))
                with progress.bar("keeping the original's predictions", sum(missing.values()), "tokens") as advance:
                    cache.fill(teacher, advance)
                del teacher
                gc.collect()
            progress.step(f"checking {folder}")
            cache.check()
    except OSError as error:
        raise EffconvertError(f"{folder} cannot be written ({error.strerror or error}); what is finished is kept, and the same command goes on there") from None
    return cache


def record(cache: "TeacherCache") -> dict[str, Any]:
    """Return what the manifest says of the cache."""
    tokens = cache.needed * len(cache.train[0]["input_ids"])
    return {"kind": type(cache.kept).__name__.lower(), "size": cache.kept.size, "windows": cache.needed, "bytes_per_token": round(cache.disk / tokens, 1)}


def _folder(plan: Plan) -> Path:
    folder = options_of(plan).cache_teacher
    assert folder is not None
    return folder


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Lock the folder. Who comes second waits, and finds the files of the first: another run, or another process of this one."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.step(f"waiting for another effconvert that writes {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _begin(folder: Path, key: dict[str, Any]) -> None:
    """Write the key of a new folder, or check that of an old one; what a kill left half-written is removed."""
    ours = {".lock", KEY, KEY + DRAFT}
    if not (folder / KEY).exists() and {path.name for path in folder.iterdir()} <= ours:
        draft = folder / (KEY + DRAFT)
        draft.write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
        to_disk(draft)
        draft.replace(folder / KEY)
    _check_key(folder, key)
    for draft in folder.glob(f"*{DRAFT}"):
        draft.unlink()


def _check_key(folder: Path, key: dict[str, Any]) -> None:
    stored: Any = None
    with suppress(OSError, ValueError):
        stored = json.loads((folder / KEY).read_text(encoding="utf-8"))
    if not isinstance(stored, dict):
        if {path.name for path in folder.iterdir()} <= {".lock", KEY + DRAFT}:
            return  # a run was killed before it wrote the key
        raise OptionError(f"--cache-teacher {folder} holds files that effconvert did not write, or has lost its {KEY}; give another folder, or remove it")
    different = [name for name in key if stored.get(name) != key[name]]
    if different:
        changes = [OTHER.get(name) or f"--{name} was {stored.get(name)} for them and is {key[name]} now" for name in different]
        raise OptionError(f"--cache-teacher {folder} has other predictions: {', '.join(changes)}; give another folder, or remove this one")


def _sha256(windows: Windows) -> str:
    """Return the hash of windows: their tokens, and which of them are predicted."""
    digest = hashlib.sha256()
    for part in (windows.train, windows.held_out):
        for item in part:
            for name, tensor in sorted(item.items()):
                digest.update(f"{name} {[*tensor.shape]}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
