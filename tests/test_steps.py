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


def test_titles_leave_out_what_has_its_default():
    options = {"train-tokens": 2048, "window": 64, "packing": "joined", "objective": "kl", "ce": 0.0, "hidden": 0.5, "tasks": [], "minutes": None}
    assert arguments("distill", options, defaults=False) == ["--train-tokens", "2048", "--window", "64", "--hidden", "0.5"]
    assert arguments("of-another-version", {"size": 3}, defaults=False) == ["--size", "3"]
