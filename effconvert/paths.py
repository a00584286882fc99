"""Paths as people type them."""

import os
from pathlib import Path


def expand(path: str | Path) -> Path:
    """Return `path` with the home folder for `~`; unchanged where there is no such user, so that opening it fails with the right error."""
    return Path(os.path.expanduser(path))


def seen_from(folder: Path, path: str) -> str:
    """Return what a file in `folder` calls `path`, which is relative to the current folder; other paths, and what is no path here, stay as they are."""
    if os.path.isabs(path) or path.startswith("~") or not os.path.exists(path):
        return path
    parent, name = os.path.split(os.path.normpath(path))  # the last name may be a link, and keeps its name
    place = os.path.join(os.path.realpath(parent), name) if name not in ("", ".", "..") else os.path.realpath(path)
    return os.path.relpath(place, os.path.realpath(folder))


def found_from(folder: Path, path: str) -> str:
    """Return the place of a `path` in a file in `folder`: as seen from there, or from the current folder if nothing is there."""
    place = os.path.join(folder, expand(path))
    if not os.path.exists(place):
        return path
    if os.path.isabs(expand(path)):
        return path
    short = os.path.relpath(place)
    other = short.startswith("~") or os.path.realpath(short) != os.path.realpath(place)  # a home, or .. behind a link
    return place if other else short


def real(path: str | Path) -> Path:
    """Return the absolute path without links; a loop of links is left as it is."""
    return Path(os.path.realpath(expand(path)))
