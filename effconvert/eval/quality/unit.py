"""One measurement of one model: its cache key, and the function that runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from effconvert.eval.quality.store import Result
from effconvert.progress import Advance, Unit


@dataclass(frozen=True)
class Measurement:
    """A measurement of a model that has not run yet."""

    key: Mapping[str, Any]  # everything that the result depends on
    what: str  # the text of the progress bar
    total: int
    unit: Unit
    run: Callable[[Advance], Result]
    always: bool = False  # run even if the result is in the cache: other models are compared with its by-products
