"""The structure that docs/architecture.md draws: who imports whom (lint-imports holds that too, by the contracts in pyproject.toml), no loop, no large room."""

from pathlib import Path

import grimp
import networkx
import pytest

import effconvert
from effconvert import discovery, heal, surgery

ROOT = Path(effconvert.__file__).parent
LOADED = {"effconvert.surgery._placed": surgery, "effconvert.steps": (surgery, heal)}  # what discovery.load imports by name, and where
LARGEST_ROOM, LONGEST_FILE = 0.15, 400  # of all lines; lines


@pytest.fixture(scope="module")
def graph():
    """Every import of a file by a file, type imports and those inside functions and by name among them; a package is its __init__.py."""
    found = grimp.build_graph("effconvert", cache_dir=None)
    made = networkx.DiGraph()
    for importer in found.modules:
        made.add_edges_from((importer, imported) for imported in found.find_modules_directly_imported_by(importer) if not importer.startswith(f"{imported}."))
    for importer, packages in LOADED.items():
        for package in packages if isinstance(packages, tuple) else (packages,):
            made.add_edges_from((importer, f"{package.__name__}.{module}") for _, module in discovery._files(package.__path__))
    return made


def test_no_file_imports_itself_in_a_loop(graph):
    assert [sorted(loop) for loop in networkx.strongly_connected_components(graph) if len(loop) > 1 and "effconvert" not in loop] == []


def test_no_two_rooms_import_each_other(graph):
    def room(module):
        parts = module.split(".")
        return parts[1] if (ROOT / parts[1]).is_dir() and len(parts) > 1 else ""

    pairs = {(room(importer), room(imported)) for importer, imported in graph.edges if "effconvert" not in (importer, imported)}
    assert {(one, other) for one, other in pairs if one < other and (other, one) in pairs and "" not in (one, other)} == set()


def test_what_is_loaded_by_name_is_in_the_picture():
    """If somebody else loads by name, the table above has to say so."""
    users = {file.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".") for file in ROOT.rglob("*.py") if "discovery.load(" in file.read_text()}
    assert users == LOADED.keys()


def test_no_room_is_large_and_no_file_is_long():
    lines = {file: len(file.read_text().splitlines()) for file in ROOT.rglob("*.py")}
    rooms = {folder: sum(count for file, count in lines.items() if file.parent == folder) for folder in {file.parent for file in lines}}
    total = sum(lines.values())
    assert {str(folder.relative_to(ROOT)): count / total for folder, count in rooms.items() if count > LARGEST_ROOM * total} == {}
    assert {str(file.relative_to(ROOT)): count for file, count in lines.items() if count > LONGEST_FILE} == {}
