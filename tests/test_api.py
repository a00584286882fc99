"""The Python door: the commands as functions."""

import dataclasses
import importlib
import inspect
import json
import pydoc
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import effconvert
from effconvert.convert.plan import Plan
from effconvert.convert.run import Outcome
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.results import Benchmark, Evaluation, Subject, read
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.eval.verification import Verification
from effconvert.options import RunOptions
from effconvert.surgery.attention.expand_kv import ExpandKv
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mqa import Mqa
from tests.models import save, tiny

EASY = {"tokens": 60, "context": 20}
QUICK_EVAL = {**EASY, "generation": False, "passkey": ()}
QUICK_BENCH = {"rounds": 1, "warmup": 0, "batch": (1,), "context": (8,), "new_tokens": 1}
RECORDS = {"effconvert.json", "README.md"}


def program(python, environment, text):
    """Run Python of its own."""
    done = subprocess.run([python, "-c", text], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Names


def test_importing_it_imports_nothing_slow(python, environment):
    slow = {"torch", "transformers", "lm_eval", "matplotlib", "huggingface_hub", "pydantic", "numpy", "click"}
    program(python, environment, f"import effconvert, sys\nassert effconvert.__version__\nassert not {slow} & set(sys.modules), {slow} & set(sys.modules)")


BEFORE = ["", "import effconvert.convert", "import effconvert.convert.run", "from effconvert.convert.plan import Plan", "from effconvert import convert"]
BEFORE += ["effconvert.convert", "effconvert.load", "from effconvert.api import convert", "import effconvert.api as api"]


def test_convert_is_called_whatever_was_imported_before(model, python, environment):
    text = f"""
import sys
from types import ModuleType

for number, before in enumerate({BEFORE}):
    for name in [name for name in sys.modules if name.partition(".")[0] == "effconvert"]:
        del sys.modules[name]
    import effconvert

    exec(before)
    assert isinstance(effconvert.convert, ModuleType), before  # the very first time too
    assert str(effconvert.convert("model", {{"mqa": {{"pool": "mean"}}}}, output=f"out{{number}}", verify=False).output) == f"out{{number}}"
    from effconvert import convert
    from effconvert.convert import plan

    assert convert is effconvert.convert, before
    assert isinstance(effconvert.convert.run, ModuleType) and callable(effconvert.convert.run.convert)
    effconvert.convert("model", {{"mqa": {{"pool": "mean"}}}}, output=f"again{{number}}", verify=False)
"""
    program(python, environment, text)
    assert all(Path(f"again{number}/config.json").is_file() for number in range(len(BEFORE)))


def test_the_package_is_still_a_package():
    assert isinstance(effconvert.convert, ModuleType)
    assert callable(effconvert.convert)
    assert isinstance(effconvert.convert.run, ModuleType)
    assert effconvert.convert.plan.Plan is Plan
    assert importlib.import_module("effconvert.convert") is effconvert.convert
    assert all(callable(getattr(effconvert, name)) for name in ("convert", "evaluate", "bench", "load"))


def test_every_name_that_is_promised_is_there_and_no_other():
    names = {}
    exec("from effconvert import *", names)
    assert {"convert", "evaluate", "bench", "load", "__version__"} <= set(names)
    for name in ("nothing", "Convert", "api_", "torch"):
        with pytest.raises(AttributeError, match=f"module 'effconvert' has no attribute '{name}'"):
            getattr(effconvert, name)
    with pytest.raises(ImportError):
        exec("from effconvert import nothing")


def test_the_signatures_have_every_option_and_help_names_every_function():
    for function, kind, own in ((effconvert.convert, RunOptions, 3), (effconvert.evaluate, EvalOptions, 2), (effconvert.bench, BenchOptions, 2)):
        parameters = inspect.signature(function).parameters
        assert [*parameters][own:] == [*kind.model_fields]
        assert all(parameters[name].default == field.default for name, field in kind.model_fields.items())
    page = pydoc.render_doc(effconvert, renderer=pydoc.plaintext)
    assert all(re.search(rf"\b{name}\b", page) for name in ("convert", "evaluate", "bench", "load"))
    assert "evaluate(\n" in page or "evaluate(models" in page
    assert {"convert", "evaluate", "bench", "load"} <= {*dir(effconvert)}


# convert


STEPS = {
    "object": [Gqa(groups=2, pool="first")],
    "mapping": [{"gqa": {"groups": 2, "pool": "first"}}],
    "bare": ["mqa"],
    "all three": [Gqa(groups=2, pool="mean"), "mqa", {"expand-kv": {"groups": 2}}],
    "null": [{"mqa": {"pool": "mean"}}],
    "with underscores": [Gqa(groups=2, pool="mean"), {"expand-kv": {"groups": 4}}],
}


@pytest.mark.parametrize("steps", STEPS)
def test_steps_are_objects_mappings_or_bare_names(steps, model, contents, command):
    Path("text.txt").write_text("There and back again, many times; where we go, nobody knows. " * 8)
    text = {"calibrate": "text.txt", "calibration_tokens": 256}
    done = effconvert.convert("model", *STEPS[steps], output="out", verify=False, **text)
    Path("r.yaml").write_text(
        yaml.safe_dump(
            {
                "model": "model",
                "output": "other",
                "verify": False,
                **text,
                "steps": [step if isinstance(step, str | dict) else step.recipe for step in STEPS[steps]],
            }
        )
    )
    assert command("run", "r.yaml").exit_code == 0
    assert contents(Path("out")) == contents(Path("other"))
    assert (done.output, done.report, done.already_there) == (Path("out"), None, False)


def test_what_comes_back_is_what_the_command_writes(model, command, contents):
    assert command("gqa", "--groups", 2, "--pool", "mean", "model", "-o", "typed", "--tokens", 60, "--context", 20).exit_code == 0
    done = effconvert.convert("model", {"gqa": {"groups": 2, "pool": "mean"}}, output="called", **EASY)
    assert contents(Path("typed")) == contents(Path("called"))
    assert isinstance(done, Outcome)
    assert isinstance(done.report, Verification)
    assert json.loads(json.dumps(dataclasses.asdict(done.report))) == json.loads(Path("typed/effconvert.json").read_text())["report"]
    assert done.plan.after.kv_bytes * 2 == done.plan.before.kv_bytes


def test_a_dry_run_plans_and_writes_nothing(model, contents, tmp_path):
    before = contents(tmp_path)
    done = effconvert.convert("model", {"mqa": {"pool": "mean"}}, dry_run=True)
    assert done.output == Path("model-mqa")
    assert done.plan.config.kv_heads == 1
    assert contents(tmp_path) == before


def test_a_model_may_be_a_path_as_python_has_them(model, contents):
    effconvert.convert(model, {"mqa": {"pool": "mean"}}, output="out", verify=False)
    effconvert.convert(str(model), {"mqa": {"pool": "mean"}}, output="other", verify=False)
    assert contents(Path("out")) == contents(Path("other"))


def test_paths_go_through_the_other_functions_too(model):
    assert effconvert.load(model).subject.name == "model"
    assert effconvert.evaluate(model, **QUICK_EVAL).subjects[0].name == "model"
    with pytest.raises(OptionError, match="gone"):
        effconvert.load(Path("gone/by/far"))
    with pytest.raises(OptionError, match="gone"):
        effconvert.convert(Path("gone/by/far"), "mqa")


WRONG_STEPS = [
    5,
    None,
    [],
    {},
    {"mqa": {}, "gqa": {"groups": 2}},
    Mqa,
    ("mqa", {}),
    {"mqa": False},
    {"mqa": {"pool": "sum"}},
    {"mqa": {1: 2}},
    "gqa",
    "",
    "MQA",
    b"mqa",
]


@pytest.mark.parametrize("wrong", WRONG_STEPS, ids=repr)
def test_what_is_no_step_is_refused_by_its_number(wrong, model, contents, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(OptionError, match=r"^step 2"):
        effconvert.convert("model", {"gqa": {"groups": 2, "pool": "mean"}}, wrong, output="out")
    assert contents(tmp_path) == before


def test_no_steps_are_refused_as_in_a_recipe(model):
    with pytest.raises(OptionError):
        effconvert.convert("model", output="out", verify=False)
    assert not Path("out").exists()


def test_wrong_options_are_refused_in_the_words_of_the_command_line(model):
    with pytest.raises(OptionError, match=r"^there is no option --outputs; did you mean --output"):
        effconvert.convert("model", {"mqa": {"pool": "mean"}}, outputs="x")
    with pytest.raises(OptionError, match=r"^--tokens is 'few', and it should be a whole number$"):
        effconvert.convert("model", "mqa", tokens="few")
    with pytest.raises(OptionError, match=r"^there is no option --self"):
        effconvert.convert("model", "mqa", **{"self": 1})
    with pytest.raises(OptionError, match=r"^there is no option --task; did you mean --tasks"):
        effconvert.evaluate("model", task=["piqa"])
    with pytest.raises(OptionError, match=r"^there is no option --batches; did you mean --batch"):
        effconvert.bench("model", batches=[1])


def test_errors_are_of_two_kinds_and_one_root(model, contents, tmp_path):
    before = contents(tmp_path)
    for mistake in (OptionError, ModelError):
        assert issubclass(mistake, EffconvertError)
    with pytest.raises(OptionError, match="does not divide this model's 4 KV heads"):
        effconvert.convert("model", Gqa(groups=3, pool="mean"))
    with pytest.raises(ModelError, match="nothing to repeat"):
        effconvert.convert("model", ExpandKv())
    with pytest.raises(OptionError, match="gone"):
        effconvert.convert("./gone", "mqa")
    assert contents(tmp_path) == before


def test_who_watches_is_told(model):
    told = []

    class Watching:
        def plan(self, model, plan, output, verify_bytes):
            told.append(("plan", model, str(output)))

        def step(self, what):
            told.append(("step", what))

        def bar(self, what, total, unit):
            from contextlib import nullcontext

            told.append(("bar", what))
            return nullcontext(lambda moved: None)

    effconvert.convert("model", {"mqa": {"pool": "mean"}}, output="out", progress=Watching(), **EASY)
    assert ("plan", "model", "out") in told
    assert ("bar", "writing out") in told
    told.clear()
    effconvert.evaluate("model", progress=Watching(), **QUICK_EVAL)
    assert any(what == "bar" for what, _ in told)


# evaluate and bench


@pytest.fixture
def converted(model):
    effconvert.convert("model", {"mqa": {"pool": "mean"}}, output="mqa", verify=False)
    return ["model", "mqa"]


def test_evaluation_is_what_the_command_writes(converted, command):
    found = effconvert.evaluate(converted, **QUICK_EVAL, output="by-python.json")
    assert read(Path("by-python.json")) == found
    assert isinstance(found, Evaluation)
    assert dataclasses.is_dataclass(found)
    arguments = ["--tokens", 60, "--context", 20, "--no-generation", "--passkey", ","]
    result = command("eval", *converted, *arguments, "-o", "e.json")
    assert result.exit_code == 0, result.output
    written = read(Path("e.json"))
    assert dataclasses.replace(written, date=found.date) == found
    assert [subject.name for subject in found.subjects] == converted
    assert effconvert.evaluate("model", **QUICK_EVAL).subjects == found.subjects[:1]  # one alone needs no list


def test_a_benchmark_is_what_the_command_writes_but_for_its_seconds(converted, command, monkeypatch):
    monkeypatch.setattr("effconvert.eval.speed.bench.bandwidth", lambda device: 1e10)  # which takes seconds to measure
    found = effconvert.bench(converted, **QUICK_BENCH, output="by-python.json")
    assert read(Path("by-python.json")).subjects == found.subjects
    assert isinstance(found, Benchmark)
    result = command("bench", *converted, "--rounds", 1, "--warmup", 0, "--batch", 1, "--context", 8, "--new-tokens", 1, "-o", "b.json")
    assert result.exit_code == 0, result.output
    written = read(Path("b.json"))
    assert (written.subjects, written.settings, written.versions, written.notes) == (
        found.subjects,
        json.loads(json.dumps(found.settings)),
        found.versions,
        found.notes,
    )
    assert [(cell.subject, cell.batch, cell.context, cell.cache_bytes) for cell in written.cells] == [
        (cell.subject, cell.batch, cell.context, cell.cache_bytes) for cell in found.cells
    ]


@pytest.mark.parametrize("function", ["evaluate", "bench"])
def test_no_models_are_refused(function):
    with pytest.raises(OptionError):
        getattr(effconvert, function)([])


# load


def test_a_model_is_loaded_with_its_tokenizer_ready_to_be_run(model):
    loaded = effconvert.load("model")
    network, tokenizer = loaded
    assert (network, tokenizer) == (loaded.model, loaded.tokenizer)
    assert dataclasses.is_dataclass(loaded)
    assert isinstance(loaded.subject, Subject)
    assert type(network).__name__ == "LlamaForCausalLM"
    assert not network.training
    assert network.dtype == torch.bfloat16
    ids = tokenizer("words", return_tensors="pt").input_ids
    assert network(ids.to(network.device)).logits.shape == (1, 5, 258)
    assert effconvert.load("model", dtype="float32").model.dtype == torch.float32
    assert effconvert.load("model", device="cpu").model.device == torch.device("cpu")


def test_a_model_without_a_tokenizer_is_loaded_without_one(tmp_path):
    save(tiny("qwen2"), tmp_path / "bare")
    network, tokenizer = effconvert.load("bare")
    assert tokenizer is None
    assert network.dtype == torch.float32


def test_what_cannot_be_loaded_is_refused(model, llama):
    with pytest.raises(OptionError, match=r"^--dtype is 'int8', and it should be 'auto', 'float32', 'bfloat16' or 'float16'$"):
        effconvert.load("model", dtype="int8")
    with pytest.raises(OptionError, match=r"^--device abacus cannot be used here"):
        effconvert.load("model", device="abacus")
    with pytest.raises(OptionError, match=r"^--device meta holds no numbers"):
        effconvert.load("model", device="meta")
    with pytest.raises(OptionError, match="gone"):
        effconvert.load("gone/by/far")
    shutil.copytree(llama, "short")
    Path("short/model-00002-of-00005.safetensors").unlink()
    with pytest.raises(ModelError):
        effconvert.load("short")


def test_a_tensor_that_is_missing_is_not_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save(tiny("llama"), tmp_path / "holed")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        effconvert.load("holed")
