"""A cache of measurements: repeating one costs nothing, and an interrupted run loses at most one."""

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
class Result:
    """The result of one measurement of one model."""

    samples: tuple[Samples, ...]
    texts: tuple[str, ...] = field(default=())  # what the model wrote
    notes: tuple[str, ...] = field(default=())


READER = TypeAdapter(Result)


class Store:
    """Results by cache key: the model's hash, the measurement with its settings, and the versions of the libraries."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def get(self, key: Mapping[str, Any]) -> Result | None:
        """Return an earlier result, if there is one."""
        if not self.enabled:
            return None
        try:
            return READER.validate_json(self._file(key).read_bytes())
        except (OSError, ValidationError):
            return None

    def put(self, key: Mapping[str, Any], result: Result) -> None:
        """Store a result atomically. If the disk cannot be written, nothing is stored and nothing fails."""
        file = self._file(key)
        draft = file.with_name(f"{file.name}.{os.getpid()}.draft")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({**asdict(result), "key": dict(key)}, default=str), encoding="utf-8")
            draft.replace(file)
        except OSError:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    def _file(self, key: Mapping[str, Any]) -> Path:
        text = json.dumps([dict(key), versions()], sort_keys=True, default=str)
        return cache() / "eval" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
