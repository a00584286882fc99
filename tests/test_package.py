"""What the package says that it needs, and what it uses."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
OPTIONAL = {Requirement(line).name for extra in ("report", "kernels") for line in PROJECT["optional-dependencies"][extra]}
WITHOUT = """
import sys

class Hidden:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import importlib.util
importlib.util.find_spec = lambda name, real=importlib.util.find_spec: None if name == "matplotlib" else real(name)
from effconvert.__main__ import main
main()
"""


def imported():
    """The distributions that files of the package import."""
    known, found = packages_distributions(), set()
    for path in (ROOT / "effconvert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "effconvert"}:
                found |= {re.sub(r"[-_.]+", "-", distribution).lower() for distribution in known[name]}
    return found


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    assert imported() == {*DECLARED, *OPTIONAL}


def pins(file):
    """Name -> version, of the lines of a constraints file that pin one."""
    lines = [Requirement(line.partition("#")[0]) for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line.partition("#")[0].strip()]
    return {re.sub(r"[-_.]+", "-", line.name).lower(): str(line.specifier).removeprefix("==") for line in lines}


def test_the_oldest_set_is_that_of_the_lower_bounds():
    optional = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines if not line.startswith("effconvert")]
    for line in [*DECLARED.values(), *optional]:
        (lowest,) = [bound.version for bound in line.specifier if bound.operator == ">="]
        pinned = pins("constraints-oldest.txt")[line.name.lower()]
        assert re.fullmatch(rf"{re.escape(lowest)}(\.0|\.\d{{8}})*", pinned) or line.name == "torch", (line.name, lowest, pinned)


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt", "constraints-newest.txt"])
def test_the_tested_sets_are_within_the_bounds_and_name_no_addresses(file):
    for name, version in pins(file).items():
        assert name not in DECLARED or version in DECLARED[name].specifier, (name, version)
    assert "://" not in (ROOT / file).read_text(encoding="utf-8")


def without_matplotlib(python, environment, *arguments):
    return subprocess.run([python, "-W", "ignore", "-c", WITHOUT, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_a_report_without_matplotlib_is_refused_with_what_installs_it(model, python, environment):
    done = without_matplotlib(python, environment, "report", "model")
    assert done.returncode == 1
    assert "pip install '.[report]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["model"]


@pytest.mark.slow
def test_a_recipe_with_a_report_is_refused_before_anything_is_written_and_one_without_needs_none(model, python, environment):
    text = "model: model\noutput: out\nsteps: [{gqa: {groups: 2, pool: mean}}]\nverify: false\n"
    Path("recipe.yaml").write_text(text + "report: true\n")
    done = without_matplotlib(python, environment, "run", "recipe.yaml")
    assert (done.returncode, "'.[report]'" in done.stderr) == (1, True)
    assert not Path("out").exists()
    Path("recipe.yaml").write_text(text)
    done = without_matplotlib(python, environment, "run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert Path("out/config.json").is_file()
