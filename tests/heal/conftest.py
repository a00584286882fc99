"""A text to calibrate on."""

from pathlib import Path

import pytest

from tests.heal.healing import prose


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())
