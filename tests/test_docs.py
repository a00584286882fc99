"""The documents say what the code says."""

import re
import runpy
from pathlib import Path

from effconvert import commands, steps
from effconvert.checkpoint.config import Config
from effconvert.errors import ModelError
from effconvert.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")]
FOLDERS = ("", "effconvert", "effconvert/eval/quality", "tests", "tests/surgery/examples", "docs")  # from which documents name files
NAME = r"[\w.-]+(?:/[\w.-]+)*"
OF_MODELS = "0023-what-belongs-to-a-model-is-a-list.md"  # names files of models
INVENTED = ("/name.py", "test_my_technique.py")


def text(page):
    return page.read_text(encoding="utf-8")


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
    told = re.findall(r"^\| `effconvert ([a-z-]+)", text(DOCS / "commands.md"), re.MULTILINE)
    assert len(set(told)) == len(told)
    assert (
        {*steps.healing_methods(), *commands.catalogue()} <= {*told} <= {*steps.catalogue(), *commands.catalogue()}
    )  # techniques: `effconvert --help` has all


def test_the_table_of_families_is_that_of_the_rows():
    rows = re.findall(r"^\| ([a-z0-9_, -]+) \| ([^|]+) \| (yes|no) \|$", text(DOCS / "families.md"), re.MULTILINE)
    told = {kind: (not pooled.startswith("no"), expanded == "yes") for kinds, pooled, expanded in rows for kind in kinds.split(", ")}
    assert told == {kind: (applies("gqa", kind), applies("expand-kv", kind)) for kind in FAMILIES}


def test_the_tree_names_what_is_there():
    page = text(DOCS / "architecture.md")
    tree = page[page.index("```text\neffconvert/") :]
    told = set(re.findall(r"^  ([a-z_]+(?:\.py|/))", tree, re.MULTILINE))
    files = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "effconvert").iterdir() if path.name != "__pycache__"}
    assert told == files - {"__init__.py"}


def test_every_link_and_every_decision_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", text(page)):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    numbers = sorted(int(path.name[:4]) for path in (DOCS / "decisions").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_file_that_a_document_names_is_in_the_tree():
    missing = []
    for page in PAGES:
        quoted = re.findall(rf"`({NAME}/?)`", text(page)) if page.name != OF_MODELS else []
        plain = re.findall(rf"\b((?:benchmarks|docs|effconvert|examples|tests)/{NAME}\.(?:csv|json|md|py|svg|txt|yaml))\b", text(page))
        named = {name for name in quoted if name.endswith((".py", ".md", "/"))} | set(plain)
        real = {name for name in named if not name.endswith(INVENTED)}
        missing += [f"{page.name}: {name}" for name in real if not any((ROOT / folder / name).exists() for folder in FOLDERS)]
    assert "\n".join(sorted(missing)) == ""


def test_the_readme_is_short():
    lines = text(ROOT / "README.md").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) >= 120] == []


def test_the_picture_is_what_its_script_draws_from_the_results():
    drawn = runpy.run_path(str(ROOT / "benchmarks" / "plot_cache.py"))["picture"]()
    assert text(DOCS / "cache.svg") == drawn
    assert len(drawn) < 60_000


def test_the_page_of_designs_is_what_its_script_writes_from_the_results():
    assert text(DOCS / "designs.md") == runpy.run_path(str(ROOT / "benchmarks" / "plot_designs.py"))["page"]()
