"""The documents say what the code says."""

import re
from pathlib import Path

from effconvert import commands, steps
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.families import FAMILIES
from effconvert.errors import ModelError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def applies(name, kind):
    family = FAMILIES[kind]
    raw = {"model_type": kind, family.heads_key: 4, family.hidden_key: 64, family.layers_key: 2}
    config = Config(raw | ({family.kv_heads_key: 2} if family.kv_heads_key else {}), family)
    try:
        steps.load(name).allowed_options(config)
    except ModelError:
        return False
    return True


def test_the_table_of_commands_has_every_command_and_no_technique_that_is_not_there():
    told = re.findall(r"^\| `effconvert ([a-z-]+)", README, re.MULTILINE)
    assert len(set(told)) == len(told)
    assert (
        {*steps.healing_methods(), *commands.catalogue()} <= {*told} <= {*steps.catalogue(), *commands.catalogue()}
    )  # techniques: `effconvert --help` has all


def test_the_table_of_families_is_that_of_the_rows():
    rows = re.findall(r"^\| ([a-z0-9_, -]+) \| ([^|]+) \| (yes|no) \|$", README, re.MULTILINE)
    told = {kind: (not pooled.startswith("no"), expanded == "yes") for kinds, pooled, expanded in rows for kind in kinds.split(", ")}
    assert told == {kind: (applies("gqa", kind), applies("expand-kv", kind)) for kind in FAMILIES}


def test_the_tree_names_what_is_there():
    tree = README[README.index("```text\neffconvert/") :]
    told = set(re.findall(r"^  ([a-z_]+(?:\.py|/))", tree, re.MULTILINE))
    files = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "effconvert").iterdir() if path.name != "__pycache__"}
    assert told == files - {"__init__.py"}


def test_every_link_and_every_decision_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
