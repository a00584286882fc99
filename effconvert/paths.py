"""Paths as people type them."""

import os
from pathlib import Path


def expand(path: str | Path) -> Path:
    """Return `path` with the home folder for `~`; unchanged where there is no such user, so that opening it fails with the right error."""
    return Path(os.path.expanduser(path))


def real(path: str | Path) -> Path:
    """Return the absolute path without links; a loop of links is left as it is."""
    return Path(os.path.realpath(expand(path)))
