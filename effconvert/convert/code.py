"""What tells one version of a technique's code from another: during development, effconvert's own version does not."""

import hashlib
from functools import cache
from inspect import getfile
from pathlib import Path

from effconvert.checkpoint.digest import file_hash
from effconvert.surgery._surgery import Step

PACKAGES = ("surgery", "heal")  # whose files use each other


def code_of(step: Step) -> str:
    """Return hashes of the file that a step is in, and of all techniques and ways of healing; nothing where that is no file."""
    try:
        return f"{file_hash(Path(getfile(type(step))))} {_own_code()}"
    except (TypeError, OSError):
        return ""


@cache
def _own_code() -> str:
    files = sorted(file for package in PACKAGES for file in (Path(__file__).parents[1] / package).rglob("*.py"))
    return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()
