"""What was measured, kept: measuring again what has not changed costs nothing, and a run that is cut off loses one measurement at most."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from effconvert.checkpoint.sources import cache
from effconvert.eval.quality.paired import Samples
from effconvert.eval.results import versions


@dataclass(frozen=True)
class Measured:
    """What one measurement found on one model."""

    samples: tuple[Samples, ...]
    texts: tuple[str, ...] = field(default=())  # what it wrote
    notes: tuple[str, ...] = field(default=())


READER = TypeAdapter(Measured)


class Store:
    """Measurements by what they depend on: the model's hash, what was measured and how, and the versions of the libraries that computed it."""

    def __init__(self, used: bool) -> None:
        self.used = used

    def get(self, key: Mapping[str, Any]) -> Measured | None:
        """Return what was measured before, if it was."""
        if not self.used:
            return None
        try:
            return READER.validate_json(self._place(key).read_bytes())
        except (OSError, ValidationError):
            return None

    def put(self, key: Mapping[str, Any], measured: Measured) -> None:
        """Keep a measurement, in one step. A disk that cannot be written costs time later, and nothing now."""
        place = self._place(key)
        draft = place.with_name(f"{place.name}.{os.getpid()}.draft")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({**asdict(measured), "key": dict(key)}, default=str), encoding="utf-8")
            draft.replace(place)
        except OSError:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def _place(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps([dict(key), versions()], sort_keys=True, default=str)
        return cache() / "eval" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
