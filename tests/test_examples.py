"""The examples run offline on the embedded model, as they stand."""

import json
import runpy
import socket
from pathlib import Path

import pytest

from effconvert.checkpoint.manifest import read_manifest

ROOT = Path(__file__).parents[1]
MORE = ("mixer.yaml", "prune.yaml")  # as recipe.yaml, with other techniques
EXAMPLES = [pytest.param(file, id=file.name, marks=[pytest.mark.slow] if file.name in MORE else []) for file in sorted((ROOT / "examples").glob("*.*"))]
WRITES = {"convert.py": "converted", "load_and_generate.py": "streaming", "mixer.yaml": "linear", "prune.yaml": "three-layers", "recipe.yaml": "fewer-heads"}
RECIPES = [
    pytest.param(file, id=file.name, marks=[] if file.name == "lolcats.yaml" else pytest.mark.slow) for file in sorted((ROOT / "recipes").glob("*.yaml"))
]


def offline(*_):
    raise OSError("an example asked for the network")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A folder with the embedded model where the repository has it, without a network."""
    (tmp_path / "effconvert").mkdir()
    (tmp_path / "effconvert" / "demo").symlink_to(ROOT / "effconvert" / "demo")
    monkeypatch.setattr(socket.socket, "connect", offline)
    return tmp_path


@pytest.mark.parametrize("file", EXAMPLES)
def test_an_example_is_short_says_what_it_shows_and_runs(file, command, root, capsys):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 25
    assert lines[0].startswith(('"""', "# "))
    if file.suffix == ".py":
        runpy.run_path(str(file), run_name="__main__")
        assert capsys.readouterr().out
    else:
        done = command("run", file)
        assert done.exit_code == 0, done.output
    assert read_manifest(root / WRITES[file.name])["verified"]
    if file.name == "recipe.yaml":
        assert json.loads((root / "fewer-heads-eval.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", RECIPES)
def test_a_recipe_has_a_plan_on_the_embedded_model(file, command, root):
    """They train for minutes, so here they are only planned."""
    done = command("run", file, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "training takes about" in " ".join(done.output.split())
