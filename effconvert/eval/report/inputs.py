"""What a report is made from: what effconvert recorded in a folder, and results files. All of it is text that somebody may have changed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from effconvert.checkpoint.manifest import MANIFEST
from effconvert.errors import ModelError, OptionError
from effconvert.eval.results import Benchmark, Evaluation, read
from effconvert.eval.verification import Verification

DIGITS = 18  # of a whole number that counts something; more overflow a float or an axis


@dataclass(frozen=True)
class Source:
    """What a model was converted from."""

    model: str  # folder name or Hub id
    revision: str | None = None
    commit: str | None = None
    made_by: "Conversion | None" = None  # where effconvert had made that too


@dataclass(frozen=True)
class Conversion:
    """An earlier conversion."""

    recipe: tuple[dict[str, dict[str, Any]], ...] = ()
    source: Source | None = None


@dataclass(frozen=True)
class Manifest:
    """What effconvert recorded in a folder that it wrote."""

    effconvert: str  # version
    recipe: tuple[dict[str, dict[str, Any]], ...]
    source: Source
    verified: bool
    report: Verification | None
    files: dict[str, int]  # name -> bytes
    versions: dict[str, str] = field(default_factory=dict)  # of what converted and verified it


def read_manifest(folder: Path) -> Manifest | None:
    """Read what effconvert recorded in `folder`; None where it did not write it.

    Raises:
        ModelError: the record is damaged, or that of a conversion that never finished.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        _check_plain(held)
        manifest = TypeAdapter(Manifest).validate_python(held)
        qualities = [side.quality for side in (manifest.report.before, manifest.report.after)] if manifest.report else []
        perplexities = [quality.perplexity for quality in qualities if quality]  # overflows where a loss is no loss
    except (OSError, ValueError, RecursionError, OverflowError, ValidationError):
        raise ModelError(f"{path} is damaged, or was left by a conversion that never finished; convert the model again, or remove that file") from None
    if manifest.verified != (manifest.report is not None) or len(perplexities) == 1:
        raise ModelError(f"{path} contradicts itself about whether the model was verified; convert the model again, or remove that file")
    return manifest


def read_results(path: Path) -> Evaluation | Benchmark:
    """Read a results file, and hold it against itself.

    Raises:
        OptionError: it is not there, is no results file, or is damaged.
    """
    results = read(path)
    try:
        _check_plain(asdict(results))
    except ValueError:
        raise OptionError(f"{path} holds a number that nobody measured, or text that is not Unicode; measure again") from None
    models = len(results.subjects)
    if len({subject.digest for subject in results.subjects}) < models:
        raise OptionError(f"{path} measures the same model twice, which tells nothing of a conversion; measure again, the original and what became of it")
    sound = models > 0
    sound &= all(len(subject.windows) == subject.layers > 0 and subject.parameters > 0 for subject in results.subjects)
    sound &= all(min(subject.heads, subject.kv_heads) > 0 or subject.heads == subject.kv_heads == 0 for subject in results.subjects)
    if isinstance(results, Evaluation):
        sound &= all(len(row.values) == models for row in results.rows)
    else:
        timings = [timing for cell in results.cells for timing in (cell.prefill, cell.first, cell.decode) if timing]
        sound &= all(0 <= cell.subject < models and min(cell.batch, cell.context) > 0 for cell in results.cells)
        sound &= all(0 < timing.low <= timing.median <= timing.high for timing in timings)
    if not sound:
        raise OptionError(f"{path} contradicts itself (its models, and what was measured of each); measure again")
    return results


def names(files: Sequence[Path]) -> list[str]:
    """Name files without their folders, which are nobody's business, and so that no two are alike."""
    named: list[str] = []
    for path in files:
        same = sum(name.partition(" (")[0] == path.name for name in named)
        named.append(f"{path.name} ({same + 1})" if same else path.name)
    return named


def _check_plain(held: Any) -> None:
    """Raise ValueError for NaN, infinity, half a character, and whole numbers that count nothing."""

    def whole(digits: str) -> int:
        if len(digits) > DIGITS:
            raise ValueError(digits)
        return int(digits)

    text = json.dumps(held, allow_nan=False, ensure_ascii=False)
    text.encode()
    json.loads(text, parse_int=whole)
