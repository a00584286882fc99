"""Paths as people type them."""

import os
from pathlib import Path


def expand(path: str | Path) -> Path:
    """Return `path` with the home folder for `~`, and as it is where there is no such user: what follows says that it is not there."""
    return Path(os.path.expanduser(path))


def real(path: str | Path) -> Path:
    """Return the absolute path without links; a loop of links is left as it is."""
    return Path(os.path.realpath(expand(path)))
