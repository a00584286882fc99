"""Locate a model: a folder, a model on the Hub, or a GGUF file. The result is always a folder of safetensors."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from effconvert.checkpoint.belonging import ADAPTER, KNOWN, own_patterns
from effconvert.checkpoint.config import CONFIG
from effconvert.checkpoint.manifest import CARD, MANIFEST
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.tensors import INDEX, PICKLES, SINGLE, check_plain
from effconvert.checkpoint.unsupported import instead
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.options import shown
from effconvert.paths import expand
from effconvert.quiet import quiet_hub

HUB_ID = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?$")
FIRST = [CONFIG, INDEX, CARD, MANIFEST, ADAPTER, *KNOWN]  # fetched first; these files name the others
NEVER = [f"*{ending}" for ending in PICKLES]


def locate(model: str, revision: str | None = None, step: Callable[[str], None] = lambda _: None, to_convert: bool = False) -> Path:
    """Return a folder that holds `model`, downloading or unpacking it first where needed.

    A model on the Hub that cannot be converted, and is to be, is refused before its weights are fetched.

    Raises:
        OptionError: there is no such model.
        ModelError: it exists and cannot be used: gated, without safetensors, a damaged GGUF file.
    """
    path = expand(model)
    try:
        path.exists()
    except OSError as error:
        raise OptionError(f"{shown(model)} is no name of a model ({error.strerror}); give a folder, a Hub id or a .gguf file") from None
    if revision is not None and (path.exists() or path.suffix == ".gguf" or not HUB_ID.match(model)):
        raise OptionError(f"--revision is for models on the Hub, and {model} is a path; leave it out")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise OptionError(f"there is no file {path}; give a .gguf file, a folder or a Hub id")
        step(f"unpacking {path.name}")
        from effconvert.checkpoint.unpacking import unpack_gguf  # imports torch and transformers

        return unpack_gguf(path, cache() / "gguf")
    if path.exists() or not HUB_ID.match(model):
        return path  # opening it raises the right error
    step(f"fetching {model}")
    return fetch(model, revision, to_convert)


def fetch(model: str, revision: str | None, to_convert: bool = False) -> Path:
    """Download `model` from the Hub, with the user's token if logged in, and return its snapshot in huggingface_hub's cache."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return _snapshot(model, revision, to_convert)
    except GatedRepoError:
        raise ModelError(f"{model} is gated: ask for access on its page on the Hub, then run `hf auth login`") from None
    except RevisionNotFoundError:
        raise OptionError(f"{model} has no revision {revision!r} on the Hub; look at its branches and tags there") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise OptionError(f"there is no folder {model!r} here and no such model on the Hub; if it is private, run `hf auth login` first") from None
    except LocalEntryNotFoundError:
        raise OptionError(f"there is no folder {model!r} here, and the Hub cannot be reached to look for it there; check the path, or the network") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{INDEX} of {model} is no index of shards ({error}); tell its author") from None
    except (HfHubHTTPError, OSError) as error:
        raise EffconvertError(f"fetching {model} broke off ({type(error).__name__}: {error}); the same command resumes it") from None


def _snapshot(model: str, revision: str | None, to_convert: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    with quiet_hub(bars=sys.stderr.isatty()):
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=FIRST, ignore_patterns=NEVER))
        # Only the weights that the index names: some repositories have a second copy in one file.
        names = json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).is_file() else {}
        shards = list(names.values()) or [SINGLE]
        if to_convert and (folder / CONFIG).is_file():
            read_config(folder)
            for name in names:
                check_plain(folder, name)
        fetched: set[str] = set()
        while more := {*shards, *own_patterns(folder)} - fetched:  # code may import more code, which shows when it is here
            fetched |= more
            folder = Path(snapshot_download(model, revision=folder.name, allow_patterns=sorted(more), ignore_patterns=NEVER))
        if not any((folder / shard).is_file() for shard in shards):
            files = HfApi().list_repo_files(model, revision=folder.name)
            pickles = [file for file in files if file.endswith(PICKLES)]
            if not (folder / CONFIG).is_file() and (what := instead(files)):
                raise ModelError(f"{model} has no config.json on the Hub, and holds {what}")
            rest = f", only pickle ({pickles[0]}), which can run code when opened" if pickles else ""
            raise ModelError(f"{model} has no safetensors on the Hub{rest}; take a revision that has them")
        return folder


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """Yield `folder`; if an adapter lies in it, a folder of links to everything else: with peft installed, transformers would put it on the weights."""
    if not (folder / ADAPTER).exists():
        yield folder
        return
    with TemporaryDirectory(prefix="effconvert-") as scratch:
        for path in folder.iterdir():
            if path.name != ADAPTER:
                (Path(scratch) / path.name).symlink_to(path.resolve())
        yield Path(scratch)


def commit(folder: Path) -> str | None:
    """Return the commit of a Hub snapshot, which names its folder in huggingface_hub's cache; None for other folders."""
    snapshots = folder.absolute().parent
    return folder.name if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--") else None


def cache() -> Path:
    """Return effconvert's cache folder, whose files can be made again: $EFFCONVERT_CACHE, or ~/.cache/effconvert."""
    return expand(os.environ.get("EFFCONVERT_CACHE") or "~/.cache/effconvert")
