"""One measurement of one model: what its outcome depends on, and how it is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from effconvert.eval.quality.store import Measured
from effconvert.progress import Advance, Unit


@dataclass(frozen=True)
class Measurement:
    """Something to be measured on a model."""

    key: Mapping[str, Any]  # everything that the outcome depends on
    what: str  # for people
    total: int
    unit: Unit
    run: Callable[[Advance], Measured]
    wanted: bool = False  # run even if the outcome is known: another model is compared with what it leaves
