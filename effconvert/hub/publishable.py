"""Take the paths of this machine out of what others will read: a folder's name says what it is, and the rest is nobody's business."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# From a root, a home or a drive to a last name; not what follows a word, a colon, a slash or a bracket, as in and/or, https:// and </b>.
PATH = re.compile(r"(?<![\w.:/\\~<])(?:~\w*|[A-Za-z]:)?(?:[/\\][^\s/\\:'\"()<>|,;`]+)*[/\\]([^\s/\\:'\"()<>|,;`]+)[/\\]?")
WRITTEN = "continuation"  # what a model wrote is no path, whatever it looks like


def nameless(text: str) -> str:
    """Cut every absolute path in a sentence to its last name."""
    return PATH.sub(lambda found: found[1], text)


def without_paths(record: Any) -> Any:
    """Cut every text in a record of JSON or YAML that is a path, and is no Hub id, to its last name."""
    if isinstance(record, dict):
        return {key: held if key == WRITTEN else without_paths(held) for key, held in record.items()}
    if isinstance(record, list):
        return [without_paths(held) for held in record]
    if isinstance(record, str) and _is_path(record):
        return last_name(record)
    return record


def last_name(path: str) -> str:
    """Return what a path of any system ends with."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _is_path(text: str) -> bool:
    rooted = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return "\n" not in text and (rooted or text.startswith(("~", "./", "../", ".\\", "..\\")))
