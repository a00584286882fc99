"""Remove the paths of this machine from published texts: only the last name of each path stays."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

# From a root, a home or a drive to a last name; not after a word, a colon, a slash or a bracket, as in and/or, https:// and </b>.
PATH = re.compile(r"(?<![\w.:/\\~<])(?:~\w*|[A-Za-z]:)?(?:[/\\][^\s/\\:'\"()<>|,;`]+)*[/\\]([^\s/\\:'\"()<>|,;`]+)[/\\]?")
CONTINUATION = "continuation"  # a model's text is never a path, even if it looks like one


def cut_paths(text: str) -> str:
    """Cut every absolute path in a sentence to its last name."""
    return PATH.sub(lambda match: match[1], text)


def without_paths(record: Any) -> Any:
    """Cut every text in a JSON or YAML record that is a path, and no Hub id, to its last name."""
    if isinstance(record, dict):
        return {key: value if key == CONTINUATION else without_paths(value) for key, value in record.items()}
    if isinstance(record, list):
        return [without_paths(value) for value in record]
    if isinstance(record, str) and _is_path(record):
        return last_name(record)
    return record


def last_name(path: str) -> str:
    """Return the last name of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _is_path(text: str) -> bool:
    rooted = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return "\n" not in text and (rooted or text.startswith(("~", "./", "../", ".\\", "..\\")))
