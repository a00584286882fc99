"""The command: what it writes, what it refuses, and that nothing is half-written."""

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from effconvert.eval.results import Value, save
from tests.report.examples import benchmark, evaluation

FORMS = (".html", ".json", ".md")


def refused(result, code, *parts):
    assert result.exit_code == code, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_the_command_writes_and_says_where(command, converted, results):
    result = command("report", converted, *results)
    assert result.exit_code == 0, result.output
    assert "tiny-gqa-2-report.html" in result.stdout
    assert "distrust: eval.json: invented data for tests" in result.stdout
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == sorted(
        ["bench.json", "eval.json", *(f"tiny-gqa-2-report{form}" for form in FORMS)]
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_there_stays_unless_told(command, converted, form):
    Path(f"out{form}").write_text("mine")
    refused(command("report", converted, "-o", "out.html"), 2, f"out{form} exists", "--overwrite")
    assert Path(f"out{form}").read_text() == "mine"
    assert [path.name for path in Path().iterdir() if path.name.startswith(("out", ".out"))] == [f"out{form}"]
    assert command("report", converted, "-o", "out.html", "--overwrite").exit_code == 0
    assert Path(f"out{form}").read_text() != "mine"


def test_results_are_never_replaced_by_their_report(command, converted, results):
    before = results[0].read_bytes()
    refused(command("report", converted, results[0], "-o", "eval.html", "--overwrite"), 2, "eval.json is one of the results files")
    assert results[0].read_bytes() == before


def test_a_report_does_not_become_part_of_the_model(command, model):
    refused(command("report", model, "-o", "model/out.html"), 2, "inside the model's folder")


def test_a_disk_that_cannot_be_written_leaves_nothing(command, converted):
    Path("file").write_text("")
    refused(command("report", converted, "-o", "file/out.html"), 2, "cannot be written")
    Path("place").mkdir()
    Path("place/.out.md.draft").mkdir()  # in the way of the last of the three
    refused(command("report", converted, "-o", "place/out.html"), 2, "cannot be written")
    assert [path.name for path in Path("place").iterdir()] == [".out.md.draft"]


def test_results_of_other_models_are_refused(command, converted, subjects):
    save(evaluation(subjects[0]), Path("other.json"))
    refused(command("report", converted, "other.json"), 2, "other.json is about other models (tiny)")
    assert not list(Path().glob("*.html"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read"),
        ("{", "is not a file that effconvert eval or bench wrote"),
        ("[]", "is not a file that effconvert eval or bench wrote"),
        ('{"kind": "evaluation"}', "is not a file that effconvert eval or bench wrote"),
    ],
)
def test_what_is_no_results_file_is_refused(command, converted, content, part):
    if content is not None:
        Path("bad.json").write_text(content)
    refused(command("report", converted, "bad.json"), 2, "bad.json", part)


def test_a_file_that_is_given_twice_is_refused(command, converted, results):
    same = Path("..") / Path.cwd().name / results[0].name
    refused(command("report", converted, *results, same), 2, f"{same} is given twice")


def test_results_that_contradict_themselves_are_refused(command, converted, subjects):
    good, fast = evaluation(*subjects), benchmark(*subjects)
    row, cell = good.rows[0], fast.cells[0]
    bad = {
        "a value too few": replace(good, rows=(replace(row, values=row.values[:1]),)),
        "NaN": replace(good, rows=(replace(row, values=(Value(1.0, None), Value(float("nan"), None))),)),
        "half a character": replace(good, machine="\ud800"),
        "an endless number": replace(good, rows=(replace(row, documents=10**400),)),
        "the same model twice": replace(good, subjects=(subjects[1], subjects[1])),
        "no such model": replace(fast, cells=(replace(cell, subject=7),)),
        "no time at all": replace(fast, cells=(replace(cell, decode=replace(cell.decode, low=0.0, median=0.0)),)),
        "windows of other layers": replace(good, subjects=(replace(subjects[0], windows=()), subjects[1])),
    }
    for what, results in bad.items():
        Path("bad.json").write_text(json.dumps(asdict(results)))
        result = command("report", converted, "bad.json")
        assert result.exit_code == 2, f"{what}: {result.output}"
        assert "bad.json" in result.stderr, what
        assert "measure again" in result.stderr, what
    assert not list(Path().glob("*.html"))


def test_a_damaged_manifest_is_refused(command, converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "damaged"))
    path = folder / "effconvert.json"
    whole = json.loads(path.read_text())
    deep = json.loads(path.read_text())
    deep["report"]["before"]["quality"]["loss"] = 1e9
    for content in ("", "{", "[]", "{}", "[" * 100_000, json.dumps({**whole, "verified": False}), json.dumps({**whole, "recipe": 3}), json.dumps(deep)):
        path.write_text(content)
        refused(command("report", folder), 1, "effconvert.json")
    path.write_bytes(b"\xff\xfe")
    refused(command("report", folder), 1, "effconvert.json")
    path.unlink()
    assert command("report", folder).exit_code == 0


def test_a_mistake_in_the_command_is_one_line(command, converted):
    refused(command("report", "nowhere"), 2, "there is no folder nowhere")
    refused(command("report", converted, "-o", "out.pdf"), 2, "--output", "report.html")
    Path("empty").mkdir()
    refused(command("report", "empty"), 2, "config.json")


def test_help_waits_for_nothing_heavy(python, environment):
    program = "import contextlib, sys\nfrom effconvert.__main__ import main\nwith contextlib.suppress(SystemExit):\n    main()\nprint('|', *sys.modules)"
    done = subprocess.run([python, "-c", program, "report", "--help"], env=environment, capture_output=True, text=True, timeout=60)
    assert "RESULTS" in done.stdout
    loaded = set(done.stdout.rpartition("|")[2].split())
    assert "effconvert.report.options" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "jinja2", "lm_eval", "huggingface_hub", "numpy"}


def test_its_recipe_and_command_make_the_same_bytes_again(command, model, contents, monkeypatch):
    Path("text.txt").write_text("There and back again, many times; where we go, nobody knows. " * 9)
    how = {"model": "model", "output": "runs/small", "calibrate": "text.txt", "calibration-tokens": 256, "steps": [{"gqa": {"groups": 2}}, "refit"]}
    Path("recipe.yaml").write_text(yaml.safe_dump(how))
    assert command("run", "recipe.yaml").exit_code == 0
    assert command("report", "runs/small", "-o", "page.html").exit_code == 0
    page = Path("page.md").read_text()
    written = yaml.safe_load(re.search(r"How to reproduce\n\n((?: {4}.*\n)+)", page)[1])
    assert (written["calibrate"], written["calibration-tokens"], written["model"]) == ("text.txt", 256, "model")
    monkeypatch.chdir("runs")
    assert command(*shlex.split(re.search(r"^ {4}effconvert (run .*)$", page, re.MULTILINE)[1], comments=True)).exit_code == 0
    first, again = ({name: digest for name, digest in contents(Path(folder)).items() if "safetensors" in name} for folder in ("small", "small-again"))
    assert first == again
    Path("small/effconvert.yaml").write_text("steps: 2020-13-45")
    assert command("report", "small", "-o", "other.html").exit_code == 0
    assert "effconvert run recipe.yaml -o small  # the recipe above" in Path("other.md").read_text()
