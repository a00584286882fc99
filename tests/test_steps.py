"""Steps as a user types them."""

import pytest

from effconvert.steps import arguments


@pytest.mark.parametrize(
    ("name", "options", "typed"),
    [
        ("share-ffn", {"layers": "0,1", "width": None, "gains": True, "drop-decoder": False}, ["--layers", "0,1"]),
        ("share-ffn", {"gains": False, "drop-decoder": True}, ["--no-gains", "--drop-decoder"]),
        ("longnet", {"segments": [64, 256], "dilations": [1, 2]}, ["--segments", "64,256", "--dilations", "1,2"]),
        ("distill", {"minutes": 2.0, "tasks": [], "passkey": []}, ["--minutes", "2.0"]),
        ("of-another-version", {"size": 3, "off": False, "on": True}, ["--size", "3", "--on"]),
    ],
)
def test_options_are_written_as_the_command_line_takes_them(name, options, typed):
    assert arguments(name, options) == typed
