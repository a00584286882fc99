"""Results of `eval` and `bench` as plain data: returned in Python, written to results files, and read by reports and cards.

The first model is always the original; numbers of the others are compared with it.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import TypeAdapter, ValidationError

from effconvert.errors import OptionError
from effconvert.paths import expand, real

LIBRARIES = ("effconvert", "torch", "transformers", "tokenizers", "lm_eval", "triton")


@dataclass(frozen=True)
class Subject:
    """A model that is measured."""

    name: str  # folder name or Hub id
    digest: str  # SHA-256 over weights, config and tokenizer
    commit: str | None  # on the Hub
    kind: str  # model_type
    architecture: str  # class of transformers
    dtype: str  # of the weights
    parameters: int
    bytes: int  # on disk
    vocabulary: int
    longest: int | None  # context in tokens


@dataclass(frozen=True)
class ShapedSubject(Subject):
    """A model whose layout effconvert knows, and so its shape."""

    kv_bytes: int  # of the KV cache, per token
    layers: int
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    windows: tuple[int | None, ...]  # each layer's sliding window in tokens
    mixers: tuple[str, ...] = ()  # the mixer of each layer, "" for softmax attention; no entries where all layers have that
    state_bytes: int = 0  # of mixers' states for a sequence of any length
    growth_bytes: int = 0  # the part of kv_bytes that is mixers' states; an average
    cached: tuple[int, ...] = ()  # bytes of keys and values of a token in each layer; no entries in results of earlier versions


@dataclass(frozen=True)
class Value:
    """The score of one model. `error` is a standard error; the difference comes from the same documents (a paired comparison)."""

    value: float
    error: float | None
    difference: float | None = None  # to the first model
    difference_error: float | None = None
    p: float | None = None  # probability of a difference at least this large between equal models
    recovery: float | None = None  # (score - chance) / (original - chance), where chance is known and the original is above it

    @property
    def significant(self) -> bool | None:
        """Whether the difference is more than chance at the 5 % level; None where that is unknown."""
        return None if self.p is None else self.p < 0.05


@dataclass(frozen=True)
class Row:
    """One metric of one task, for every model in order; None where it does not apply or could not be measured."""

    task: str
    metric: str
    better: Literal["higher", "lower"] | None
    chance: float | None  # the score of guessing
    documents: int  # number of documents
    version: str  # of the task
    values: tuple[Value | None, ...]


@dataclass(frozen=True)
class Evaluation:
    """How good each model is."""

    subjects: tuple[ShapedSubject | Subject, ...]
    rows: tuple[Row, ...]
    continuations: tuple[str, ...]  # of the same prompt, one for each model; empty for encoders
    prompt: str
    notes: tuple[str, ...]  # doubtful results, and those that could not be compared
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: str
    date: str
    kind: Literal["evaluation"] = "evaluation"


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of all rounds, with the fastest and the slowest."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """One model at one batch size and context. If it could not run, `failure` says why and the numbers are None."""

    subject: int  # index of the model
    batch: int
    context: int  # tokens in each prompt
    prefill: Timing | None  # of the whole prompts
    first: Timing | None  # time to first token
    decode: Timing | None  # of one step, which gives each sequence of the batch a token
    predicted: float | None  # seconds of one step if it only read weights and cache from memory
    weight_bytes: int | None  # read in a step
    cache_bytes: int | None  # of the cache object at `context`, measured
    peak_bytes: int | None  # its weights, and the peak of a pass above the memory in use before it
    ratios: dict[str, float]  # to the first model in the same run: prefill, first, decode, cache, peak
    failure: str = ""

    @property
    def prefill_rate(self) -> float | None:
        """Tokens read a second."""
        return self.batch * self.context / self.prefill.median if self.prefill else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens written a second, over the batch."""
        return self.batch / self.decode.median if self.decode else None


@dataclass(frozen=True)
class Benchmark:
    """How fast each model is."""

    subjects: tuple[ShapedSubject | Subject, ...]
    cells: tuple[Cell, ...]
    bandwidth: float  # measured bandwidth of this device's memory, bytes a second
    notes: tuple[str, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: str
    date: str
    kind: Literal["benchmark"] = "benchmark"


READERS: dict[str, TypeAdapter[Any]] = {"evaluation": TypeAdapter(Evaluation), "benchmark": TypeAdapter(Benchmark)}


def save(results: Evaluation | Benchmark, path: Path) -> None:
    """Write `results` as JSON, atomically."""
    path = expand(path)
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror}); give another --output") from None
    finally:
        draft.unlink(missing_ok=True)


def check_output(path: Path | None, models: Sequence[str] = ()) -> None:
    """Refuse, before minutes of work, a file that cannot be written, or that effconvert did not write.

    Raises:
        OptionError: it is a folder, is in a read-only folder or in the folder of one of `models`, or has other content than results.
    """
    if path is None:
        return
    if folder := next((model for model in models if real(model) in real(path).parents), None):
        raise OptionError(f"--output {path} is in the folder of the model {folder}; give another")
    place = next((folder for folder in real(path).parents if folder.exists()), Path("/"))
    if expand(path).is_dir():
        raise OptionError(f"--output {path} is a folder; give a file")
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OptionError(f"--output {path} cannot be written: {place} is not a writable folder; give another")
    if expand(path).exists():
        try:
            read(expand(path))
        except OptionError:
            raise OptionError(f"--output {path} exists and holds no results of effconvert; give another, or remove it") from None


def read(path: Path) -> Evaluation | Benchmark:
    """Read what `save` wrote.

    Raises:
        OptionError: the file does not exist, or is no results file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results: Evaluation | Benchmark = READERS[content["kind"]].validate_python(content)
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); give a file that effconvert eval or bench wrote with --output") from None
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        raise OptionError(f"{path} is not a file that effconvert eval or bench wrote with --output; give one") from None
    return results


def now() -> str:
    """Return the time, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries that the numbers depend on."""
    result = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            result[name] = _version(name)
        except ModuleNotFoundError:
            continue
    return result


@cache  # it parses all of the package's metadata, which takes longer than many a tensor
def _version(package: str) -> str:
    return version(package)


def machine(device: str) -> str:
    """Describe `device` of this machine in a few words, without a host name."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return f"{processor()}, {cores} core{'s' * (cores > 1)}, {memory}, {threads} thread{'s' * (threads > 1)}"


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
