"""The inputs of a report: a model's manifest, and results files. Users may have edited any of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from effconvert.checkpoint.manifest import MANIFEST
from effconvert.errors import ModelError, OptionError
from effconvert.eval.results import Benchmark, Evaluation, ShapedSubject, read
from effconvert.eval.training import Training
from effconvert.eval.verification import Verification

DIGITS = 18  # most digits of a whole number; more would overflow a float or an axis


@dataclass(frozen=True)
class Source:
    """The source of a converted model."""

    model: str  # folder name or Hub id
    revision: str | None = None
    commit: str | None = None
    made_by: "Conversion | None" = None  # the conversion that wrote the source, if effconvert did


@dataclass(frozen=True)
class Conversion:
    """An earlier conversion."""

    recipe: tuple[dict[str, dict[str, Any]], ...] = ()
    source: Source | None = None


@dataclass(frozen=True)
class Manifest:
    """The manifest of a converted model."""

    effconvert: str  # version
    recipe: tuple[dict[str, dict[str, Any]], ...]
    source: Source
    verified: bool
    report: Verification | None
    files: dict[str, int]  # name -> bytes
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries that converted and verified it
    distillation: Training | None = None


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of `folder`; None where effconvert did not write the folder.

    Raises:
        ModelError: the manifest is damaged, or the conversion never finished.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check_plain(content)
        manifest = TypeAdapter(Manifest).validate_python(content)
        qualities = [side.quality for side in (manifest.report.before, manifest.report.after)] if manifest.report else []
        perplexities = [quality.perplexity for quality in qualities if quality]  # overflows for a damaged loss
    except (OSError, ValueError, RecursionError, OverflowError, ValidationError):
        raise ModelError(f"{path} is damaged, or from a conversion that never finished; convert the model again, or remove that file") from None
    if manifest.verified != (manifest.report is not None) or len(perplexities) == 1:
        raise ModelError(f"{path} contradicts itself about whether the model was verified; convert the model again, or remove that file")
    return manifest


def read_results(path: Path) -> Evaluation | Benchmark:
    """Read a results file, and check that it is consistent.

    Raises:
        OptionError: the file does not exist, is no results file, or is damaged.
    """
    results = read(path)
    try:
        _check_plain(asdict(results))
    except ValueError:
        raise OptionError(f"{path} has an impossible number, or text that is not Unicode; measure again") from None
    models = len(results.subjects)
    if isinstance(results, Benchmark) and len(set(results.settings.get("kernels") or ())) > 1:
        raise OptionError(f"{path} has each model by several --kernels, and a report compares models; measure again by one of them")
    if len({subject.digest for subject in results.subjects}) < models:
        raise OptionError(f"{path} measures the same model twice, so it cannot compare; measure again, the original and the converted model")
    consistent = models > 0 and all(subject.parameters > 0 for subject in results.subjects)
    shaped = [subject for subject in results.subjects if isinstance(subject, ShapedSubject)]
    consistent &= all(len(subject.windows) == subject.layers > 0 for subject in shaped)
    consistent &= all(min(subject.heads, subject.kv_heads) > 0 or subject.heads == subject.kv_heads == 0 for subject in shaped)
    if isinstance(results, Evaluation):
        consistent &= all(len(row.values) == models for row in results.rows)
    else:
        timings = [timing for cell in results.cells for timing in (cell.prefill, cell.first, cell.decode) if timing]
        consistent &= all(0 <= cell.subject < models and min(cell.batch, cell.context) > 0 for cell in results.cells)
        consistent &= all(0 < timing.low <= timing.median <= timing.high for timing in timings)
    if not consistent:
        raise OptionError(f"{path} contradicts itself (its models and their results do not match); measure again")
    return results


def names(files: Sequence[Path]) -> list[str]:
    """Return unique names of files, without their folders, which reports must not show."""
    unique: list[str] = []
    for path in files:
        same = sum(name.partition(" (")[0] == path.name for name in unique)
        unique.append(f"{path.name} ({same + 1})" if same else path.name)
    return unique


def _check_plain(content: Any) -> None:
    """Raise ValueError for NaN, infinity, lone surrogates, and whole numbers with too many digits."""

    def whole(digits: str) -> int:
        if len(digits) > DIGITS:
            raise ValueError(digits)
        return int(digits)

    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    text.encode()
    json.loads(text, parse_int=whole)
