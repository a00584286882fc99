"""Recipes: conversions written down and carried out again, one after the other, cut off and resumed, and wrong in every way that was thought of."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import effconvert
from effconvert.checkpoint import sources
from effconvert.convert.run import convert
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.options import RunOptions
from effconvert.recipe import Recipe, _Loader, _located, as_keys, read, schema
from effconvert.replay import replay
from effconvert.steps import catalogue
from effconvert.steps import load as technique
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mqa import Mqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from tests.convert.conftest import one_line
from tests.convert.test_sources import gguf  # noqa: F401 (a fixture)
from tests.models import save, tiny
from tests.surgery.test_layerwise import FILE, Third

EASY = {"tokens": 60, "context": 20}
RECORDS = {"effconvert.json", "README.md"}  # which say what was measured, and from what
ORIGIN = RECORDS | {"effconvert.yaml"}  # which says from what
HALVE, TWO, ONE = {"gqa": {"groups": 2, "pool": "mean"}}, {"gqa": {"groups": 2, "pool": "first"}}, {"mqa": {"pool": "mean"}}
QUICK_EVAL = {**EASY, "generation": False, "passkey": []}
QUICK_BENCH = {"rounds": 1, "warmup": 0, "batch": [1], "context": [8], "new-tokens": 1}


def recipe(model="model", output="out", steps=(HALVE,), **more):
    """A recipe as plain data, not verified unless `more` says so."""
    return {"model": str(model), "output": str(output), "steps": list(steps), "verify": False, **more}


def write(*recipes, path="recipe.yaml"):
    """Write a file of recipes: data, or text as it is."""
    texts = [one if isinstance(one, str) else yaml.safe_dump(one, sort_keys=False, allow_unicode=True) for one in recipes]
    Path(path).write_text("---\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def run(command):
    """Carry out recipes that must succeed, and return what was printed."""

    def carry_out(*recipes, more=()):
        result = command("run", write(*recipes), *more)
        assert result.exit_code == 0, result.output or repr(result.exception)
        return result.stdout

    return carry_out


@pytest.fixture
def done(command):
    """Run a command that must succeed, without verification."""

    def succeed(*args):
        result = command(args[0], "--no-verify", *args[1:])
        assert result.exit_code == 0, result.output or repr(result.exception)

    return succeed


def standing(contents, place):
    """All files with their bytes and all folders, but for the cache, which holds hashes that were looked at."""
    files = {name: held for name, held in contents(place).items() if not name.startswith("cache/")}
    return files, sorted(path for path in place.rglob("*") if path.relative_to(place).parts[0] != "cache")


@pytest.fixture
def refused(command, contents, tmp_path):
    """Hold that recipes are refused in one line as the asker's mistake, with no file or folder made, changed or lost, and return the line."""

    def check(*recipes, more=(), code=2):
        path = write(*recipes)
        before = standing(contents, tmp_path)
        result = command("run", path, *more)
        told = one_line(result)
        assert result.exit_code == code, told
        assert standing(contents, tmp_path) == before
        return told

    return check


@pytest.fixture(autouse=True)
def memory_of_known_speed(monkeypatch):
    """Spare the seconds that it takes to measure."""
    monkeypatch.setattr("effconvert.eval.speed.bench.bandwidth", lambda device: 1e10)


@pytest.fixture
def same(contents):
    """Hold that two folders hold the same files with the same bytes, but for those left out."""

    def compare(left, right, but=RECORDS):
        one, other = contents(Path(left)), contents(Path(right))
        assert one.keys() == other.keys()
        assert one
        assert {name for name in one if one[name] != other[name]} <= but

    return compare


def again(folder, output="again"):
    """Carry out the recipe beside the weights of `folder`, without the minutes of verification that the command line would add."""
    replay(read(Path(folder, "effconvert.yaml"), output=output, verify=False))


def here():
    """What lies here, but for the cache and the recipe."""
    return {path.name for path in Path().iterdir()} - {"cache", "recipe.yaml"}


def stamp(folder):
    """When each file of a folder was written, and which it is on disk."""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(folder).iterdir()}


# A conversion run again


def test_the_recipe_beside_the_weights_makes_the_same_bytes_again(model, command, same, contents):
    assert command("gqa", "--groups", 2, "--pool", "first", model, "-o", "out", "--tokens", 60, "--context", 20).exit_code == 0
    held = yaml.safe_load(Path("out/effconvert.yaml").read_text())
    assert held == {"model": str(model), "steps": [{"gqa": {"groups": 2, "pool": "first", "grouping": "adjacent"}}]}
    before = contents(Path("out"))
    assert command("run", "out/effconvert.yaml", "-o", "again").exit_code == 0
    assert contents(Path("out")) == before
    same("out", "again")
    first, second = (json.loads(Path(folder, "effconvert.json").read_text()) for folder in ("out", "again"))
    assert {key for key in first if first[key] != second[key]} == {"report", "files", "sha256"}  # measured on other text: 4096 tokens
    assert {name for name in first["files"] if first["files"][name] != second["files"][name]} <= {"README.md"}
    write({**held, **EASY, "output": "equal"})
    assert command("run", "recipe.yaml").exit_code == 0
    same("out", "equal", but=set())  # not even what was measured differs


HOSTILE = [
    "no",
    "1e3",
    "null",
    "2001-01-01",
    "0x1f",
    "1_0",
    "=",
    "<<",
    "a: b",
    "[x]",
    "{a",
    "- x",
    "#c",
    "'q'",
    '"q"',
    "*a",
    "&a",
    "!!x",
    "%x",
    "@x",
    "`x`",
    "?",
    "|",
    ">",
]
HOSTILE += ["a  b c", "日本語 é 🤖", "tab\there", "line\nbreak", "word " * 30 + " two  blanks", " ends with a blank ", "C:\\x", "a\u2028b", "\ufeffx"]


@pytest.mark.parametrize("name", [*HOSTILE, "./~x"], ids=repr)
def test_a_model_is_found_again_whatever_its_name(name, llama, done, same):
    shutil.copytree(llama, name)
    done("gqa", "--groups", 2, "--pool", "mean", "-o", "out", "--", name)
    again("out")
    same("out", "again")


def test_a_gguf_file_is_converted_again_to_the_same_bytes(gguf, done, same):  # noqa: F811
    Path("a folder").mkdir()
    shutil.copy(gguf, "a folder/é.gguf")
    done("gqa", "--groups", 2, "--pool", "mean", "a folder/é.gguf", "-o", "out")
    assert yaml.safe_load(Path("out/effconvert.yaml").read_text())["model"] == "../a folder/é.gguf"
    again("out")
    same("out", "again")


@pytest.mark.parametrize("commit", ["a" * 40, "1" * 40, "0e" + "1" * 38, "1e" + "2" * 38])
def test_a_model_of_the_hub_is_run_again_at_its_very_commit(commit, llama, done, same, monkeypatch):
    snapshot = Path("hub/models--lab--tiny/snapshots", commit)
    shutil.copytree(llama, snapshot)
    asked = []
    monkeypatch.setattr(sources, "fetch", lambda model, revision, to_convert: asked.append((model, revision)) or snapshot)
    done("gqa", "--groups", 2, "--pool", "mean", "lab/tiny", "--revision", "v1", "-o", "out")
    again("out")
    assert set(asked[:1]) == {("lab/tiny", "v1")}
    assert set(asked[1:]) == {("lab/tiny", commit)}
    same("out", "again", but=RECORDS)


def test_another_folder_of_that_name_is_no_snapshot():
    assert sources.commit(Path("hub/models--lab--tiny/snapshots/abc")) == "abc"
    assert sources.commit(Path("training/snapshots/step100")) is None


def test_a_snapshot_that_was_given_as_a_folder_is_run_again(llama, done, same):
    snapshot = Path("hub/models--lab--tiny/snapshots", "a" * 40)
    shutil.copytree(llama, snapshot)
    done("gqa", "--groups", 2, "--pool", "mean", snapshot, "-o", "out")
    again("out")
    same("out", "again")


def test_the_recipe_beside_the_weights_works_from_any_folder(model, done, same, monkeypatch, tmp_path):
    Path("text.txt").write_text("one two three four five six " * 60)
    Path("latest").symlink_to("model")
    calibrated = ["--calibrate", "text.txt", "--calibration-tokens", "128", "--calibration-window", "16"]
    done("gqa", "--groups", 2, "--pool", "mean", "model", "-o", "deep/gqa")
    done("refit", "deep/gqa", "--teacher", "latest", *calibrated, "-o", "deep/refit")
    held = yaml.safe_load(Path("deep/refit/effconvert.yaml").read_text())
    assert (held["model"], held["calibrate"], held["steps"][0]["refit"]["teacher"]) == ("../gqa", "../../text.txt", "../../latest")
    Path("deep/refit/elsewhere").mkdir()
    for folder, name in (("deep/refit", "effconvert.yaml"), ("deep/refit/elsewhere", "../effconvert.yaml"), ("deep", f"{tmp_path}/deep/refit/effconvert.yaml")):
        monkeypatch.chdir(tmp_path / folder)
        replay(read(Path(name), output=tmp_path / "deep/again", verify=False, overwrite=True))
        monkeypatch.chdir(tmp_path)
        same_weights = {file.name for file in Path("deep/again").glob("*.safetensors")}
        assert same_weights
        assert all(Path("deep/again", file).read_bytes() == Path("deep/refit", file).read_bytes() for file in same_weights)
        assert yaml.safe_load(Path("deep/again/effconvert.yaml").read_text()) == held


def test_what_a_recipe_reads_is_looked_up_beside_it_then_here(llama, model):
    Path("recipes").mkdir()
    for content, expected in ((recipe(), "model"), (recipe(model="gone"), "gone")):
        write(content, path="recipes/r.yaml")
        assert read(Path("recipes/r.yaml"))[0].model == expected
    shutil.copytree(llama, "recipes/model")
    assert read(Path(write(recipe(), path="recipes/r.yaml")))[0].model == "recipes/model"
    assert read(Path("recipes/r.yaml"), model="model")[0].model == "model"
    shutil.copytree(llama, "recipes/a")
    write(recipe(output="a"), recipe(model="a", output="b"), path="recipes/r.yaml")
    assert [one.model for one in read(Path("recipes/r.yaml"))] == ["recipes/model", "a"]  # what the first writes


def test_a_converted_model_keeps_its_own_last_steps_alone(model, run, done, same):
    run(recipe(steps=[HALVE, {"expand-kv": {}}]))
    done("mqa", "--pool", "mean", "out", "-o", "next")
    assert yaml.safe_load(Path("next/effconvert.yaml").read_text()) == {"model": "../out", "steps": [{"mqa": {"pool": "mean"}}]}
    assert yaml.safe_load(Path("out/effconvert.yaml").read_text())["steps"] == [
        {"gqa": {"groups": 2, "pool": "mean", "grouping": "adjacent"}},
        {"expand-kv": {"groups": None}},
    ]
    assert [("# null is an option" in Path(folder, "effconvert.yaml").read_text()) for folder in ("out", "next")] == [True, False]
    assert "\nHere null is an option that was not set; teacher: null heals towards the model that is converted.\n" in Path("out/README.md").read_text()
    for folder in ("out", "next"):
        again(folder, f"{folder}-again")
        same(folder, f"{folder}-again")


def test_a_recipe_without_output_is_named_after_the_model_and_its_steps(model, run):
    held = recipe(steps=[HALVE, ONE])
    del held["output"]
    run(held)
    assert here() == {"model", "model-gqa-2-mqa"}


# A chain is the commands one after the other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "phi3", "olmo2"])
def test_two_steps_are_the_two_commands_bit_for_bit(kind, dtype, run, done, same):
    save(tiny(kind).to(dtype), "model", max_shard_size="20KB")
    run(recipe(steps=[HALVE, ONE]))
    done("gqa", "--groups", 2, "--pool", "mean", "model", "-o", "one")
    done("mqa", "--pool", "mean", "one", "-o", "two")
    same("out", "two", but=ORIGIN)
    done("mqa", "--pool", "mean", "model", "-o", "at-once")
    assert keys("out") != keys("at-once")  # what is rounded in between can be seen at all


@pytest.mark.parametrize(
    "steps", [(Mqa(pool="mean"), Third()), (Third(), Mqa(pool="mean")), (Third(layers="1"), Mqa(pool="mean"), Third())], ids=["mqa third", "third mqa", "three"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_steps_that_change_the_family_are_the_commands_too(kind, dtype, steps, same):
    save(tiny(kind).to(dtype), "model")
    convert("model", steps, RunOptions(output="out", verify=False))
    folder = "model"
    for number, step in enumerate(steps):
        convert(folder, (step,), RunOptions(output=f"stage-{number}", verify=False))
        folder = f"stage-{number}"
    same("out", folder, but=ORIGIN)


def keys(folder):
    return {
        name: tensor.float().tolist()
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if ".k" in name or "qkv" in name
    }


def test_steps_are_done_in_their_order(model, run):
    mean, first = {"gqa": {"groups": 2, "pool": "mean"}}, {"mqa": {"pool": "first"}}
    run(recipe(output="one", steps=[mean, first]))
    run(recipe(output="other", steps=[{"gqa": {"groups": 2, "pool": "first"}}, {"mqa": {"pool": "mean"}}]))
    assert keys("one").keys() == keys("other").keys()
    assert keys("one") != keys("other")


def test_stages_are_kept_as_the_commands_would_write_them(model, run, done, same):
    steps = [HALVE, {"mqa": {"pool": "first"}}, {"expand-kv": {"groups": 2}}]
    told = run(recipe(steps=steps, **{"keep-stages": True}))
    assert here() == {"model", "out-1-gqa", "out-2-mqa", "out"}
    assert told.index("out-1-gqa") < told.index("out-2-mqa")
    done("gqa", "--groups", 2, "--pool", "mean", "model", "-o", "one")
    done("mqa", "--pool", "first", "one", "-o", "two")
    done("expand-kv", "--groups", 2, "two", "-o", "three")
    for stage, made in (("out-1-gqa", "one"), ("out-2-mqa", "two"), ("out", "three")):
        same(stage, made, but=ORIGIN)
    held = yaml.safe_load(Path("out-2-mqa/effconvert.yaml").read_text())
    assert held["model"] == "../model"
    assert [name for step in held["steps"] for name in step] == ["gqa", "mqa"]


def test_stages_are_dropped_unless_they_are_asked_for(model, run, same):
    run(recipe(steps=[HALVE, ONE]))
    assert here() == {"model", "out"}
    run(recipe(output="kept", steps=[HALVE, ONE], **{"keep-stages": True}))
    same("out", "kept")


# Several recipes in one file


CHAIN = [recipe(output="a", steps=[HALVE]), recipe(model="a", output="b", steps=[ONE]), recipe(model="./b", output="c", steps=[{"expand-kv": {"groups": 2}}])]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_recipes_are_carried_out_in_an_order_that_works(order, model, run, done, same, contents, tmp_path):
    before = contents(tmp_path)
    told = run(*(CHAIN[index] for index in order), more=["--dry-run"])
    Path("recipe.yaml").unlink()
    assert contents(tmp_path) == before
    assert here() == {"model"}
    assert [told.count(f" -> {folder}\n") for folder in "abc"] == [1, 1, 1]
    assert "becomes 3 layers, 4 query and 1 KV heads" in told
    assert "note  a is not written yet: it will be model after gqa, so this plan starts there, and `before` is model\n" in told
    assert "note  ./b is not written yet: it will be model after gqa -> mqa, so this plan starts there, and `before` is model\n" in told

    run(*(CHAIN[index] for index in order))
    done("gqa", "--groups", 2, "--pool", "mean", "model", "-o", "one")
    done("mqa", "--pool", "mean", "one", "-o", "two")
    done("expand-kv", "--groups", 2, "two", "-o", "three")
    for ours, theirs in (("a", "one"), ("b", "two"), ("c", "three")):
        same(ours, theirs, but=ORIGIN)
    assert here() == {"model", "a", "b", "c", "one", "two", "three"}


def test_a_recipe_may_begin_from_a_stage_of_another(model, run, done, same):
    run(recipe(model="a-1-gqa", output="b", steps=[ONE]), recipe(output="a", steps=[HALVE, ONE], **{"keep-stages": True}))
    same("b", "a", but=ORIGIN)


def test_a_plan_is_shown_for_the_model_that_its_recipe_names(llama, model, run):
    shutil.copytree(llama, "other")
    told = run(recipe(), recipe(model="other", output="b"), more=["--dry-run"])
    assert ": model -> out" in told
    assert ": other -> b" in told


WRONG_LAST = {
    "groups of the model in between": ({"steps": [{"gqa": {"groups": 4, "pool": "mean"}}]}, "more than this model's 2 KV heads"),
    "no technique": ({"steps": ["gqb"]}, "there is no technique 'gqb'"),
    "needed option": ({"steps": ["gqa"]}, ": groups is needed"),
    "revision of a folder": ({"revision": "main"}, "revision is for models on the Hub"),
    "output inside the model": ({"output": "out/b"}, "one inside the other"),
    "output of the draft": ({"output": "out.partial"}, "out.partial"),
    "text to verify on": ({"verify": True, "text": "gone.txt"}, "gone.txt"),
    "text to evaluate on": ({"evaluate": {**QUICK_EVAL, "text": "gone.txt"}}, "gone.txt"),
    "folder of tasks": ({"evaluate": {**QUICK_EVAL, "tasks": "piqa", "include-path": "gone"}}, "gone"),
    "device": ({"evaluate": {**QUICK_EVAL, "device": "abacus"}}, "abacus"),
    "device of bench": ({"bench": {**QUICK_BENCH, "device": "abacus"}}, "abacus"),
    "context of bench": ({"bench": {**QUICK_BENCH, "context": [4096]}}, "context 4096 is too long"),
    "results in a folder": ({"evaluate": {**QUICK_EVAL, "output": "tasks"}}, "tasks is a folder"),
    "results where the output goes": ({"evaluate": {**QUICK_EVAL, "output": "b"}}, "b"),
    "results in the output": ({"bench": {**QUICK_BENCH, "output": "b/bench.json"}}, "b/bench.json"),
    "several ways to decode": ({"bench": {**QUICK_BENCH, "kernels": "reference,auto"}}, "give one of kernels"),
    "both results in one file": ({"evaluate": {**QUICK_EVAL, "output": "x.json"}, "bench": {**QUICK_BENCH, "output": "x.json"}}, "x.json"),
}


@pytest.mark.parametrize("wrong", WRONG_LAST)
def test_what_is_wrong_in_the_last_recipe_is_found_before_the_first_writes(wrong, model, refused):
    Path("tasks").mkdir()
    changes, needed = WRONG_LAST[wrong]
    last = {**recipe(model="out", output="b", steps=[ONE]), **changes}
    assert needed in refused(recipe(), last, more=["--dry-run"])
    assert needed in refused(recipe(), last)


def test_a_task_that_is_not_there_is_found_before_the_first_writes(model, refused, monkeypatch):
    def load(options):  # in the place of lm-eval's list, which takes half a minute
        raise OptionError(f"there is no task {options.tasks[0]!r}")

    monkeypatch.setattr("effconvert.eval.quality.harness._load", load)
    assert "there is no task 'piqo'" in refused(recipe(), recipe(model="out", output="b", steps=[ONE], evaluate={"tasks": ["piqo"]}))


def test_a_recipe_is_planned_on_what_the_one_before_will_write_and_not_on_what_is_there(model, run, refused):
    run(recipe(steps=[HALVE]))
    told = refused(recipe(steps=[ONE], overwrite=True), recipe(model="out", output="b", steps=[{"gqa": {"groups": 2, "pool": "mean"}}]))
    assert "groups 2 is more than this model's 1 KV heads" in told


def test_recipes_that_wait_for_each_other_are_refused(model, refused):
    for count in (1, 2, 3):
        folders = [f"f{index}" for index in range(count)]
        circle = [recipe(model=before, output=after) for before, after in zip(folders, [*folders[1:], folders[0]], strict=True)]
        for order in itertools.permutations(circle):
            told = refused(*order)
            assert "wait for each other's output" in told
            assert told.count("<-") == count
        assert "wait for each other's output" in refused(recipe(), *circle, recipe(model=folders[0], output="end"))


@pytest.mark.parametrize("other", ["out", "./out", "x/../out", "{here}/out"])
def test_two_recipes_with_the_same_output_are_refused(other, model, refused, tmp_path):
    assert "two recipes write" in refused(recipe(), recipe(output=other.format(here=tmp_path), steps=[ONE]))


def test_an_output_that_is_another_recipes_stage_is_refused(model, refused):
    assert "two recipes write out-1-gqa" in refused(recipe(steps=[HALVE, ONE], **{"keep-stages": True}), recipe(output="out-1-gqa"))


def test_what_the_command_line_replaces_could_be_meant_for_any_of_several(model, refused):
    for more in (["--model", "m"], ["-o", "x"], ["--overwrite"]):
        assert "has 2 recipes" in refused(recipe(), recipe(output="b"), more=more)


def test_the_command_line_replaces_what_the_recipe_says(model, llama, run, command, same):
    run(recipe(model="gone", output="elsewhere"), more=["--model", "model", "-o", "out"])
    assert here() == {"model", "out"}
    result = command("run", write(recipe(steps=[ONE])))
    assert result.exit_code == 2
    run(recipe(steps=[ONE]), more=["--overwrite"])
    assert json.loads(Path("out/config.json").read_text())["num_key_value_heads"] == 1


# Cut off, and gone on with


def test_a_run_that_fails_after_the_conversion_goes_on_from_there(model, run, command, monkeypatch):
    held = recipe(steps=[HALVE, ONE], evaluate=QUICK_EVAL, **{"keep-stages": True})

    def fail(*_):
        raise EffconvertError("the network failed")

    with monkeypatch.context() as broken:
        broken.setattr("effconvert.replay.evaluate", fail)
        result = command("run", write(held))
        assert (result.exit_code, one_line(result)) == (1, "Error: the network failed")
    assert here() == {"model", "out", "out-1-gqa"}
    before = stamp("out"), stamp("out-1-gqa")
    run(held)
    assert (stamp("out"), stamp("out-1-gqa")) == before
    assert here() == {"model", "out", "out-1-gqa", "out-eval.json"}


def test_a_run_that_fails_between_two_recipes_goes_on_with_the_second(model, run, command, monkeypatch):
    first, second = recipe(), recipe(model="out", output="b", steps=[ONE], evaluate=QUICK_EVAL)
    real = convert

    def fail(source, *args, **options):
        if source == "out" and not args[1].dry_run:
            raise EffconvertError("the disk is full")
        return real(source, *args, **options)

    with monkeypatch.context() as broken:
        broken.setattr("effconvert.replay.convert", fail)
        assert command("run", write(first, second)).exit_code == 1
    before = stamp("out")
    run(first, second)
    assert stamp("out") == before
    assert Path("b/config.json").is_file()


CHANGES = {
    "options": lambda held: held["steps"][0]["gqa"].update(pool="first"),
    "steps": lambda held: held["steps"].append(ONE),
    "verification": lambda held: held.update(verify=True, **EASY),
    "weights": lambda _: rewritten("model/model-00001-of-00005.safetensors"),
    "config": lambda _: edited("model/config.json", rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}),
    "tokenizer": lambda _: edited("model/tokenizer_config.json", model_max_length=7),
    "generation config": lambda _: edited("model/generation_config.json", eos_token_id=7),
    "licence": lambda _: Path("model/LICENSE").write_text("words"),
    "output, edited": lambda _: edited("out/generation_config.json", eos_token_id=7),
    "output, added to": lambda _: Path("out/mine.txt").write_text("words"),
    "output, a file short": lambda _: Path("out/tokenizer.json").unlink(),
}


def rewritten(path):
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(data)


def edited(path, **changes):
    held = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**held, **changes}))


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_recipe_or_model_made_is_not_taken_for_this_ones(change, model, run, refused):
    held = recipe(steps=[{"gqa": {"groups": 2, "pool": "mean"}}])
    run(held)
    before = stamp("out")
    run(held)
    assert stamp("out") == before
    CHANGES[change](held)
    assert "out exists" in refused(held)


def test_speeds_are_measured_again_only_for_other_models_or_options(model, run, monkeypatch):
    from effconvert.eval.speed.bench import bench as real

    measured = []
    monkeypatch.setattr("effconvert.replay.bench", lambda *args: measured.append(args) or real(*args))
    held = recipe(steps=[HALVE, ONE], bench=QUICK_BENCH)
    run(held)
    found = Path("out-bench.json").read_bytes()
    told = run(held)
    assert len(measured) == 1
    assert Path("out-bench.json").read_bytes() == found
    assert "decode" in told
    run({**held, "bench": {**QUICK_BENCH, "batch": [2]}})
    assert len(measured) == 2
    run({**held, "bench": {**QUICK_BENCH, "batch": [2]}, "steps": [TWO, ONE], "overwrite": True})
    assert len(measured) == 3


def test_speeds_at_one_context_are_not_those_at_the_contexts_of_no_choice(model, run):
    run(recipe(bench=QUICK_BENCH))
    run(recipe(bench={key: value for key, value in QUICK_BENCH.items() if key != "context"}))
    cells = json.loads(Path("out-bench.json").read_text())["cells"]
    assert {cell["context"] for cell in cells} != {8}


# Measured and reported


def test_a_recipe_measures_and_reports_and_does_so_once(model, run, same):
    held = recipe(evaluate=QUICK_EVAL, bench=QUICK_BENCH, report=True, verify=True, **EASY)
    told = run(held)
    written = {"out-eval.json", "out-bench.json", "out-report.html"}
    assert here() == {"model", "out", "out-report.json", "out-report.md", *written}
    assert all(f"written to {name}" in told for name in written)
    assert re.search(r"^verification +original .*^evaluation$.*^text +perplexity .*^speed$", told, re.MULTILINE | re.DOTALL)
    evaluation, benchmark = (json.loads(Path(f"out-{what}.json").read_text()) for what in ("eval", "bench"))
    assert [subject["name"] for subject in evaluation["subjects"]] == ["model", "out"] == [subject["name"] for subject in benchmark["subjects"]]
    assert "perplexity" in {row["metric"] for row in evaluation["rows"]}
    before, bench = stamp("out"), Path("out-bench.json").read_bytes()
    run(held)
    again = json.loads(Path("out-eval.json").read_text())
    assert again["rows"] == evaluation["rows"]
    assert (stamp("out"), Path("out-bench.json").read_bytes()) == (before, bench)


def test_stages_are_measured_beside_the_original(model, run):
    run(recipe(steps=[HALVE, ONE], evaluate={**QUICK_EVAL, "output": "results/e.json"}, **{"keep-stages": True}))
    assert [subject["name"] for subject in json.loads(Path("results/e.json").read_text())["subjects"]] == ["model", "out-1-gqa", "out"]
    assert here() == {"model", "out", "out-1-gqa", "results"}


# The same mistake, the same sentence


MISTAKES = {  # options on the command line, and as a step
    "unknown option": (["gqa", "--groups", "2", "--pool", "mean", "--pol", "mean"], {"gqa": {"groups": 2, "pol": "mean"}}),
    "option of another": (["mqa", "--groups", "2"], {"mqa": {"groups": 2}}),
    "wrong type": (["gqa", "--groups", "many"], {"gqa": {"groups": "many"}}),
    "wrong choice": (["gqa", "--groups", "2", "--pool", "sum"], {"gqa": {"groups": 2, "pool": "sum"}}),
    "out of bounds": (["gqa", "--groups", "0", "--pool", "mean"], {"gqa": {"groups": "0"}}),
    "missing": (["gqa"], {"gqa": {}}),
    "no divisor": (["gqa", "--groups", "3", "--pool", "mean"], {"gqa": {"groups": 3, "pool": "mean"}}),
    "too many": (["gqa", "--groups", "8", "--pool", "mean"], {"gqa": {"groups": 8, "pool": "mean"}}),
    "nothing to do": (["expand-kv"], {"expand-kv": {}}),
    "option of healing": (["gqa", "--groups", "2", "--train-tokens", "1000"], {"gqa": {"groups": 2, "train-tokens": 1000}}),
    "layers": (["gqa", "--groups", "2", "--pool", "mean", "--layers", "0-1"], {"gqa": {"groups": 2, "layers": "0-1"}}),
    "technique": (["gqq"], {"gqq": {}}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_same_mistake_gives_the_same_sentence_at_every_door(mistake, model, command, refused):
    words, step = MISTAKES[mistake]
    code = 1 if mistake == "nothing to do" else 2
    with pytest.raises((OptionError, ModelError)) as caught:
        effconvert.convert("model", step, output="out", verify=False)
    sentence = str(caught.value).split(": ", 1)[-1] if str(caught.value).startswith("step 1") else str(caught.value)
    assert refused(recipe(steps=[step]), code=code).endswith(as_keys(sentence))
    typed = command(words[0], "model", "-o", "out", "--no-verify", *words[1:])
    assert typed.exit_code == code
    said = typed.stderr.strip().splitlines()[-1].replace("there is no command", "there is no technique")
    assert as_keys(said) == f"Error: {as_keys(sentence)}"
    assert caught.value.exit_code == code


def test_a_recipe_is_spelt_in_keys_and_a_command_in_options():
    sentence = "--groups 3 is too many; use --no-verify, or --calibration-tokens 5, and --help shows all; or: effconvert refit MODEL --teacher ORIGINAL"
    expected = "groups 3 is too many; use verify: false, or calibration-tokens 5, and --help shows all; or: effconvert refit MODEL --teacher ORIGINAL"
    assert as_keys(sentence) == expected


def test_options_of_the_conversion_are_refused_in_the_same_words(model, command, refused):
    for key, value in (("tokens", "1"), ("context", "few"), ("text", "gone.txt")):
        with pytest.raises(OptionError) as caught:
            effconvert.convert("model", "mqa", **{key: value})
        assert refused({**recipe(steps=[ONE]), "verify": True, key: value}).endswith(as_keys(str(caught.value)))
        assert one_line(command("mqa", "--pool", "mean", "model", f"--{key}", value)) == f"Error: {caught.value}"


def test_an_error_names_the_file_the_recipe_and_the_step(model, refused):
    assert refused(recipe(steps=[HALVE, {"mqa": {"pool": "sum"}}])).startswith("Error: recipe.yaml, step 2 (mqa): pool is 'sum'")
    assert refused(recipe(), recipe(output="b", steps=["mqb"])).startswith("Error: recipe.yaml, recipe 2, step 1: there is no technique")
    assert refused(recipe(), recipe(output="b", evaluate={"token": 5})).startswith("Error: recipe.yaml, recipe 2, evaluate: there is no option token;")
    assert refused(recipe(), recipe(output="b", modle="x")).startswith("Error: recipe.yaml, recipe 2: there is no option modle; did you mean model?")


def test_what_has_another_place_than_a_key_of_the_recipe_is_told_that(refused):
    assert refused(recipe(refit=True)).endswith("refit is a step; write it into `steps`, like `steps: [..., refit]`")
    assert refused({**recipe(), "dry-run": True}).endswith("it is an option of the command: effconvert run RECIPE --dry-run")
    assert refused(recipe(steps=[{"gqa": {"groups": 2, "refit": True}}])).endswith(
        "refit is a step of its own; write it behind this one, like `steps: [gqa: {...}, refit]`"
    )
    assert refused(recipe(steps=[{"gqa": {"groups": 2, "calibrate": "x.txt"}}])).endswith(
        "calibrate is for all steps; give it beside `steps`, not in one of them"
    )
    assert refused({**recipe(), "no-verify": True}).endswith("there is no option no-verify here; write `verify: false` in a recipe, and verify=False in Python")


def test_what_is_empty_is_said_to_be(refused):
    assert refused(recipe(steps=[])).endswith("steps is empty, and something is needed there: Steps in order, each with its options")
    assert "model is empty, and something is needed there" in refused(recipe(model=""))


def test_layers_can_be_a_list():
    assert PruneLayers(layers=[1, "2-3"]) == PruneLayers(layers="1,2-3")
    with pytest.raises(OptionError, match="layers 3-1 runs backwards"):
        PruneLayers(layers=[0, "3-1"])
    with pytest.raises(OptionError, match="should be numbers and ranges"):
        PruneLayers(layers=[0, {}])


def test_an_error_about_a_model_names_the_recipe_among_several(model, refused):
    told = refused(recipe(), recipe(output="b", steps=[{"gqa": {"groups": 3, "pool": "mean"}}]))
    assert "does not divide this model's 4 KV heads" in told
    assert "recipe 2" in told or "b:" in told


def test_a_recipe_that_is_not_there_is_named(command):
    Path("folder").mkdir()
    for path in ("gone.yaml", "folder"):
        assert path in one_line(command("run", path))


@pytest.mark.parametrize("missing", ["gone/model", "gone.gguf", "./gone"])
def test_a_missing_model_is_named(missing, refused):
    assert Path(missing).as_posix() in refused(recipe(model=missing))


# Whatever stands in the file


BASE = "model: model\noutput: out\nverify: false\n"
WHOLE = BASE + "steps: [{gqa: {groups: 2, pool: mean}}]\n"
LAUGHS = "[&a [x, x, x, x, x, x, x, x, x], " + ", ".join(f"&{after} [{', '.join([f'*{before}'] * 9)}]" for before, after in itertools.pairwise("abcdef")) + "]"
FUZZ = {
    "nothing": "",
    "comments": "# x\n---\n---\n",
    "a number": "5",
    "a word": "gqa",
    "a list": "- model: model",
    "brackets": "[" * 3000,
    "braces": "{a: " * 600,
    "a deep list": "[" * 150 + "]" * 150,
    "tabs": "model:\tmodel\n\tsteps: x",
    "a page": "<html>\n<body class='x'>404: not found</body>",
    "every byte": bytes(range(256)),
    "random bytes": b"\x9f\x00\xffmodel: \x01",
    "utf-16": WHOLE.encode("utf-16"),
    "a null at the end": WHOLE.encode() + b"\0",
    "an unknown key": WHOLE + "outputs: x\n",
    "an unknown key far from all": WHOLE + "zzz: x\n",
    "a key twice": WHOLE + "output: other\n",
    "a key twice, spelt in two ways": WHOLE + "keep-stages: true\nkeep_stages: false\n",
    "a step's key twice": BASE + "steps: [{gqa: {groups: 2, groups: 1}}]\n",
    "self": WHOLE + "self: 1\n",
    "self of a step": BASE + "steps: [{mqa: {self: 1}}]\n",
    "a key of two lines": WHOLE + '"a\\nb": 1\n',
    "a key of two lines in a step": BASE + 'steps: [{gqa: {groups: 2, "a\\nb": 2}}]\n',
    "a key with a line separator": WHOLE + '"a\\u2028b": 1\n',
    "a number as key": WHOLE + "1: 2\n",
    "null as key": WHOLE + "null: 2\n",
    "a list as key": WHOLE + "[1, 2]: 3\n",
    "a merge": WHOLE + "<<: {foo: 1}\n",
    "a merge of a number": WHOLE + "<<: 5\n",
    "half a character": WHOLE.replace("verify: false", 'text: "\\ud800"'),
    "half a character as output": WHOLE.replace("output: out", 'output: "\\ud800"'),
    "half a character as key": WHOLE + '"\\ud800": 1\n',
    "a null character as output": WHOLE.replace("output: out", 'output: "a\\0b"'),
    "a null character as model": WHOLE.replace("model: model", 'model: "a\\0b"'),
    "a null character as text": WHOLE.replace("verify: false", 'text: "a\\0b"'),
    "a home that nobody has, as model": WHOLE.replace("model: model", "model: ~no-such-user/x"),
    "a home that nobody has, as output": WHOLE.replace("output: out", "output: ~no-such-user/x"),
    "a home that nobody has, as text": WHOLE.replace("verify: false", "text: ~no-such-user/x"),
    "a model of two lines": WHOLE.replace("model: model", 'model: "a\\nb"'),
    "a model with a long name": WHOLE.replace("model: model", f"model: {'x' * 300}"),
    "an output with a long name": WHOLE.replace("output: out", f"output: {'x' * 300}"),
    "an empty model": WHOLE.replace("model: model", "model: ''"),
    "no model": WHOLE.replace("model: model", ""),
    "a list of models": WHOLE.replace("model: model", "model: [model]"),
    "null as model": WHOLE.replace("model: model", "model:"),
    "a number as output": WHOLE.replace("output: out", "output: 5"),
    "an empty output": WHOLE.replace("output: out", "output: ''"),
    "an empty output with stages": BASE.replace("output: out", "output: ''") + "keep-stages: true\nsteps: [{gqa: {groups: 2}}, mqa]\n",
    "a root as output with stages": BASE.replace("output: out", "output: /") + "keep-stages: true\nsteps: [{gqa: {groups: 2}}, mqa]\n",
    "this folder as output, measured": WHOLE.replace("output: out", "output: .") + "evaluate: true\n",
    "the model as output": WHOLE.replace("output: out", "output: model"),
    "an integer of 5000 digits": WHOLE + f"tokens: {'9' * 5000}\n",
    "tokens of 400 digits": WHOLE.replace("verify: false", f"tokens: {'9' * 400}"),
    "a context of 400 digits": WHOLE.replace("verify: false", f"context: {'9' * 400}"),
    "tokens of 20 digits": WHOLE.replace("verify: false", f"tokens: {'9' * 20}"),
    "groups of 400 digits": BASE + f"steps: [{{gqa: {{groups: {'9' * 400}}}}}]\n",
    "a month 99": WHOLE + "text: 2001-99-99\n",
    "a date": WHOLE + "text: 2001-01-01\n",
    "a word tagged a number": WHOLE + "tokens: !!int abc\n",
    "nothing tagged a number": WHOLE + 'tokens: !!int ""\n',
    "a word tagged a float": WHOLE + "tokens: !!float abc\n",
    "a word tagged a truth": WHOLE + "overwrite: !!bool maybe\n",
    "a word tagged a date": WHOLE + "text: !!timestamp abc\n",
    "a word tagged binary": WHOLE + "text: !!binary é\n",
    "python to be run": WHOLE + "text: !!python/object/apply:os.system ['touch hacked']\n",
    "a python name": WHOLE + "text: !!python/name:os.system\n",
    "a tag of nobody's": WHOLE + "text: !mine x\n",
    "a set": WHOLE + "text: !!set {a}\n",
    "an unknown alias": "model: *x",
    "a list that holds itself": "&a [*a]",
    "a recipe that holds itself": "&a {model: model, steps: *a}",
    "steps that hold themselves": BASE + "steps: &a [*a]\n",
    "a billion laughs": LAUGHS,
    "a billion laughs as a step": BASE + f"steps: [{LAUGHS}]\n",
    "a billion laughs as tokens": WHOLE + f"tokens: {LAUGHS}\n",
    "a billion laughs in an option": BASE + f"steps: [{{gqa: {{groups: {LAUGHS}}}}}]\n",
    "yaml 9.9": "%YAML 9.9\n---\nmodel: model",
    "no steps": BASE,
    "null as steps": BASE + "steps:\n",
    "a number as steps": BASE + "steps: 5\n",
    "empty steps": BASE + "steps: []\n",
    "an empty step": BASE + "steps: [{}]\n",
    "null as a step": BASE + "steps: [null]\n",
    "a step of two": BASE + "steps: [{gqa: {groups: 2}, mqa: {}}]\n",
    "a list as a step": BASE + "steps: [[mqa]]\n",
    "a number as a technique": BASE + "steps: [{1: 2}]\n",
    "a set of steps": BASE + "steps: !!set {mqa}\n",
    "pairs of steps": BASE + "steps: !!pairs [{mqa: {}}]\n",
    "bytes as steps": BASE + "steps: !!binary aGVsbG8=\n",
    "a path as a technique": BASE + "steps: [../surgery/mqa]\n",
    "the base class as a technique": BASE + "steps: [_surgery]\n",
    "false as options": BASE + "steps: [{mqa: false}]\n",
    "zero as options": BASE + "steps: [{mqa: 0}]\n",
    "a word as options": BASE + "steps: [{mqa: mean}]\n",
    "an empty word as options": BASE + "steps: [{mqa: ''}]\n",
    "a list as options": BASE + "steps: [{mqa: []}]\n",
    "yes as a number": BASE + "steps: [{gqa: {groups: yes}}]\n",
    "infinite groups": BASE + "steps: [{gqa: {groups: .inf}}]\n",
    "half a group": BASE + "steps: [{gqa: {groups: 1.5}}]\n",
    "a list as an option": BASE + "steps: [{mqa: {pool: [mean]}}]\n",
    "a word as evaluation": WHOLE + "evaluate: piqa\n",
    "a list as evaluation": WHOLE + "evaluate: [piqa]\n",
    "an infinite limit": WHOLE + "evaluate: {limit: .inf}\n",
    "a limit that is no number": WHOLE + "evaluate: {limit: .nan}\n",
    "samples that are none": WHOLE + "evaluate: {samples: {a: b}}\n",
    "a number as bench": WHOLE + "bench: 5\n",
    "no batch": WHOLE + "bench: {batch: []}\n",
    "maybe as report": WHOLE + "report: maybe\n",
    "dry run": WHOLE + "dry-run: true\n",
    "healing, which there is not": WHOLE + "heal: {}\n",
    "the second of two": WHOLE + "---\n5\n",
}


@pytest.mark.parametrize("what", FUZZ)
def test_a_file_that_is_no_recipe_is_refused_in_one_short_line(what, model, command, contents, tmp_path):
    data = FUZZ[what] if isinstance(FUZZ[what], bytes) else FUZZ[what].encode()
    Path("recipe.yaml").write_bytes(data)
    before = standing(contents, tmp_path)
    result = command("run", "recipe.yaml")
    told = one_line(result)
    assert result.exit_code == 2, told
    assert len(told) < 2000
    assert standing(contents, tmp_path) == before


def test_a_number_that_is_written_with_a_point_or_in_quotes_is_that_number(model):
    for spelt in ("2", "'2'", "2.0"):
        Path("recipe.yaml").write_text(BASE + f"steps: [{{gqa: {{groups: {spelt}, pool: mean}}}}]\n")
        assert read(Path("recipe.yaml"))[0].steps == (Gqa(groups=2, pool="mean"),)


@pytest.mark.parametrize(
    ("spelt", "told"),
    [
        ("010", "YAML reads 010 as 8, in base 8: write 8 or 10"),
        ("-0_20", "YAML reads -0_20 as -16, in base 8: write -16 or -20"),
        ("1:30", "YAML reads 1:30 as 90, in base 60: write 90, or '1:30'"),
    ],
)
def test_a_number_that_yaml_reads_in_another_base_is_refused_with_its_line(spelt, told, refused):
    assert refused(BASE + f"steps:\n  - prune-layers:\n      drop: {spelt}\n").endswith(
        f"recipe.yaml cannot be read as a recipe in line 6 ({told}); fix the file"
    )


def test_a_number_that_is_the_same_in_every_base_is_that_number():
    for spelt, number in (("02", 2), ("00", 0), ("0x10", 16), ("1_000", 1000), ("'010'", "010")):
        assert yaml.load(spelt, _Loader) == number


# The schema


KEYWORDS = {"$ref", "anyOf", "type", "const", "enum", "properties", "required", "additionalProperties", "items", "minItems", "minLength", "pattern"}
KEYWORDS |= {"minimum", "maximum", "exclusiveMinimum"}
WORDS = {"$schema", "$defs", "title", "description", "default", "format", "metavar", "short"}  # which ask for nothing
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}


def fits(held, asked, root):
    """Whether `held` is as a JSON schema says, of the part of draft 2020-12 that ours uses; any other keyword is an error."""
    assert set(asked) <= KEYWORDS | WORDS, set(asked) - KEYWORDS - WORDS
    if "$ref" in asked:
        assert asked["$ref"].startswith("#/$defs/")
        return fits(held, root["$defs"][asked["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in asked and not any(fits(held, one, root) for one in asked["anyOf"]):
        return False
    if "type" in asked and (not isinstance(held, TYPES[asked["type"]]) or (isinstance(held, bool) and asked["type"] != "boolean")):
        return False
    if ("const" in asked and held != asked["const"]) or ("enum" in asked and held not in asked["enum"]):
        return False
    if isinstance(held, dict):
        more = asked.get("additionalProperties", True)
        known = asked.get("properties", {})
        inside = all(fits(value, known[key], root) if key in known else more is True or (more and fits(value, more, root)) for key, value in held.items())
        return inside and set(asked.get("required", ())) <= set(held)
    if isinstance(held, list):
        return len(held) >= asked.get("minItems", 0) and all(fits(one, asked.get("items", {}), root) for one in held)
    if isinstance(held, int | float) and not isinstance(held, bool):
        return asked.get("minimum", held) <= held <= asked.get("maximum", held) and held > asked.get("exclusiveMinimum", held - 1)
    return not isinstance(held, str) or len(held) >= asked.get("minLength", 0)


def printed(command):
    result = command("schema")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_the_schema_has_every_option_of_every_class_spelt_with_dashes(command):
    from effconvert.eval.quality.eval_options import EvalOptions
    from effconvert.eval.speed.bench_options import BenchOptions
    from effconvert.recipe import Recipe

    made = printed(command)
    assert made == schema()
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    kinds = {"EvalOptions": EvalOptions, "BenchOptions": BenchOptions, **{name: technique(name) for name in catalogue()}}
    assert set(made["$defs"]) == set(kinds)
    for held, kind in [(made, Recipe), *((made["$defs"][name], kind) for name, kind in kinds.items())]:
        assert held["type"] == "object"
        assert held["additionalProperties"] is False
        assert set(held["properties"]) == {field.replace("_", "-") for field in kind.model_fields}
        assert set(held["required"]) == {name.replace("_", "-") for name, field in kind.model_fields.items() if field.is_required()}
        assert all(value.get("description") for value in held["properties"].values())


FITTING = {
    "least": {"model": "m", "steps": ["mqa"]},
    "bare and with options": recipe(steps=["mqa", "expand-kv", {"mqa": {"pool": "mean"}}, HALVE, TWO]),
    "all": recipe(evaluate=QUICK_EVAL, bench=QUICK_BENCH, report=True, overwrite=True, text="t.txt", revision="v1", **{"keep-stages": True}, **EASY),
    "evaluated as it comes": recipe(evaluate={}, bench={}),
    "tasks": recipe(evaluate={"tasks": ["piqa"], "samples": {"piqa": [0, 2]}, "batch-size": "auto", "num-fewshot": 5}),
    "true": recipe(evaluate=True, bench=True),
    "layers as yaml writes them": recipe(steps=[{"prune-layers": {"layers": [1, "2-3"]}}, {"streaming": {"window": 8, "layers": 0}}]),
    "nothing": {**recipe(steps=[{"mqa": {"pool": "mean"}}], evaluate=None, bench=None), "output": None},
}
MISFITS = {
    "misspelt": recipe(modle="x"),
    "with an underscore": recipe(keep_stages=True, nothing=1),
    "no model": {"steps": ["mqa"]},
    "no steps": {"model": "m"},
    "empty steps": recipe(steps=[]),
    "a technique that needs options": recipe(steps=["gqa"]),
    "no such technique": recipe(steps=["gqb"]),
    "misspelt option": recipe(steps=[{"gqa": {"group": 2}}]),
    "two in a step": recipe(steps=[{"mqa": {}, "expand-kv": {}}]),
    "wrong choice": recipe(steps=[{"mqa": {"pool": "sum"}}]),
    "wrong type": recipe(steps=[{"gqa": {"groups": "many"}}]),
    "too few": recipe(steps=[{"gqa": {"groups": 0, "pool": "mean"}}]),
    "misspelt in evaluate": recipe(evaluate={"taks": []}),
    "misspelt in bench": recipe(bench={"new-token": 1}),
}


@pytest.mark.parametrize("name", FITTING)
def test_a_recipe_that_is_read_fits_the_schema(name, command):
    assert read(Path(write(FITTING[name])))
    made = printed(command)
    assert fits(FITTING[name], made, made)


@pytest.mark.parametrize("name", MISFITS)
def test_a_recipe_that_is_refused_does_not_fit_the_schema(name, command):
    with pytest.raises(OptionError):
        read(Path(write(MISFITS[name])))
    made = printed(command)
    assert not fits(MISFITS[name], made, made)


def test_what_a_conversion_writes_beside_the_weights_fits_the_schema(model, run, command):
    run(recipe(steps=[HALVE, ONE, {"expand-kv": {}}]))
    made = printed(command)
    assert fits(yaml.safe_load(Path("out/effconvert.yaml").read_text()), made, made)


def test_a_new_technique_is_in_the_schema_and_in_recipes_by_its_file_alone(model, with_technique):
    run = with_technique("third", FILE)
    made = json.loads(run("schema").stdout)
    assert set(made["$defs"]["third"]["properties"]) == {"layers"}
    held = recipe(steps=["third", {"third": {"layers": "0,-1"}}])
    assert fits(held, made, made)
    assert not fits(recipe(steps=[{"third": {"layer": "0"}}]), made, made)
    done = run("run", write(held))
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(Path("out/effconvert.yaml").read_text())["steps"] == [{"third": {"layers": None}}, {"third": {"layers": "0,-1"}}]


def test_the_schema_needs_no_torch(python, environment):
    import subprocess

    program = "import sys\nfrom effconvert.recipe import schema\nassert schema()\nassert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", catalogue())
def test_in_another_folder_only_options_of_a_step_are_paths(name, tmp_path):
    """Not its methods of such names: `pairs`, `base`."""
    kind = technique(name)
    step = kind.model_construct(**dict.fromkeys(kind.model_fields))
    (tmp_path / "there" / "m").mkdir(parents=True)
    (located,) = _located([Recipe.model_construct(model="m", output="o", steps=(step,))], tmp_path / "there", {})
    assert Path(located.model).samefile(tmp_path / "there" / "m")
    assert vars(located.steps[0]).keys() == vars(step).keys()
