"""Locate a model: a folder, a model on the Hub, or a GGUF file. The result is always a folder of safetensors."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
        return unpack_gguf(path)
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


def unpack_gguf(path: Path) -> Path:
    """Return a folder with the model of a GGUF file in bfloat16, cached for the next time.

    The numbers are the dequantised ones; the loss of quantisation remains. Needs the whole model in memory, in float32.
    """
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache() / "gguf" / f"{path.stem}-{key}"
    if (folder / CONFIG).is_file():
        return folder

    import torch
    import transformers

    from effconvert.quiet import quiet_transformers

    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())  # a progress bar only on a terminal
    with quiet_transformers(), TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
        draft = Path(scratch) / "model"
        try:
            with hidden, without_adapter(path.parent) as place:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    place, gguf_file=path.name, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            repair_digits(tokenizer, path)
        except Exception as error:  # a damaged file raises anything: struct.error, a bare Exception, ...
            raise ModelError(f"{path} cannot be unpacked by transformers {transformers.__version__}: {error}") from error
        model.to(torch.bfloat16).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        try:
            draft.rename(folder)
        except OSError as error:
            if not (folder / CONFIG).is_file():  # else another process unpacked it meanwhile, and that stays
                raise EffconvertError(f"{path} was unpacked, and {folder} is in the way ({error.strerror}); remove that, and repeat the command") from None
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


def repair_digits(tokenizer: Any, path: Path) -> None:
    """Restore the digit-by-digit split of SmolLM's tokenizer: transformers' GGUF converter drops it, llama.cpp keeps it."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def commit(folder: Path) -> str | None:
    """Return the commit of a Hub snapshot, which names its folder in huggingface_hub's cache; None for other folders."""
    snapshots = folder.absolute().parent
    return folder.name if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--") else None


def cache() -> Path:
    """Return effconvert's cache folder, whose files can be made again: $EFFCONVERT_CACHE, or ~/.cache/effconvert."""
    return expand(os.environ.get("EFFCONVERT_CACHE") or "~/.cache/effconvert")
