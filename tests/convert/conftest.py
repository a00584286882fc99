"""How a refusal must look."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result


def one_line(result: Result) -> str:
    """Return the error that a command ended with, after holding that it is one line and no traceback."""
    assert isinstance(result.exception, SystemExit), f"not refused but {result.exception!r}"
    assert "Traceback" not in result.output
    told = [line for line in result.stderr.splitlines() if line and not line.startswith(("Usage: ", "Try '"))]
    assert len(told) == 1, told
    assert told[0].startswith("Error: ")
    return told[0]


@pytest.fixture
def refused(command: Callable[..., Result], contents: Callable[[Path], dict[str, str]], tmp_path: Path) -> Callable[..., str]:
    """Hold that a command is refused with an exit code and one line, and that no file anywhere was made, changed or lost by it."""

    def check(code: int, *args: object) -> str:
        before = contents(tmp_path)
        result = command(*args)
        told = one_line(result)
        assert result.exit_code == code, told
        assert contents(tmp_path) == before
        assert not list(tmp_path.rglob("*.partial"))
        return told

    return check


@pytest.fixture
def refused_late(command: Callable[..., Result]) -> Callable[..., str]:
    """Hold that a command gives up with one line after it has begun to write, and that nothing stands at `out`."""

    def check(code: int, *args: object) -> str:
        result = command(*args)
        told = one_line(result)
        assert result.exit_code == code, told
        assert not Path("out").exists()
        return told

    return check
