"""`effconvert eval` as a whole: a model beside itself and beside one that moved, what identifies a model, the command line, the results file."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.digest import digest
from effconvert.commands.eval import show
from effconvert.errors import ModelError, OptionError
from effconvert.eval import results
from effconvert.eval.quality import running
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.evaluate import evaluate
from effconvert.eval.speed import passes
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.hub.push_options import PushOptions
from tests.eval.evaluating import byte_tokenizer, choices, measure, moved, prose, put, row, tiny_llama
from tests.models import tiny

EASY = ("--text", "prose.txt", "--tokens", "120", "--context", "30", "--no-generation")


@pytest.fixture(scope="session")
def long(llama, tmp_path_factory):
    """A model that reads 600 tokens: passkeys fit into them."""
    return put(tmp_path_factory.mktemp("long") / "long", tiny_llama(258, max_position_embeddings=600), AutoTokenizer.from_pretrained(llama))


@pytest.fixture(autouse=True)
def text():
    """A short text."""
    return prose()


def identity(folder):
    return digest(open_checkpoint(folder))


# A model beside itself, and beside another.


def test_a_model_beside_itself_differs_in_nothing(long, tmp_path):
    tasks = choices(tmp_path / "tasks")
    evaluation = measure(long, long, cache=False, generation=True, passkey=(512,), tasks="pick", include_path=tasks)
    found = {(held.task, held.metric) for held in evaluation.rows}
    assert {task for task, _ in found} == {"text", "generation", "passkey", "pick"}
    for held in evaluation.rows:
        assert held.values[1] is not None
        if held.metric in ("kl", "same_top_token"):
            assert (held.values[1].value, held.values[1].error) == ({"kl": 0, "same_top_token": 1}[held.metric], 0)
        else:
            assert (held.values[1].difference, held.values[1].difference_error, held.values[1].p) == (0, 0, 1), held
    assert evaluation.continuations[0] == evaluation.continuations[1] != ""


@pytest.mark.parametrize("only", ["lm_head", "layers.2.mlp.down_proj"])
def test_one_matrix_that_moved_a_little_is_seen(llama, tmp_path, only):
    other = moved(llama, tmp_path / "other", by=0.02, only=only)
    evaluation = measure(llama, other)
    assert row(evaluation, "text", "kl").values[1].value > 0
    assert row(evaluation, "text", "perplexity").values[1].difference != 0
    assert evaluation.subjects[0].digest != evaluation.subjects[1].digest


def test_three_models_are_each_beside_the_first(llama, tmp_path):
    near, far = moved(llama, tmp_path / "near", by=0.05), moved(llama, tmp_path / "far", by=0.5)
    evaluation = measure(llama, near, far)
    alone = [measure(llama, near, cache=False), measure(llama, far, cache=False)]
    for held in evaluation.rows:
        for index in (1, 2):
            assert held.values[index] == row(alone[index - 1], held.task, held.metric).values[1]
    assert row(evaluation, "text", "kl").values[2].value > row(evaluation, "text", "kl").values[1].value


def test_passkeys_that_a_model_cannot_read_are_left_out_and_that_is_said(llama, long):
    """The default lengths, 256 and 1024, on models that read 600 and 64 tokens."""
    evaluation = with_options(long, generation=False)
    assert [held.metric for held in evaluation.rows if held.task == "passkey"] == ["256_tokens"]
    assert evaluation.settings["passkey"] == [256]
    evaluation = with_options(long, llama, generation=False)
    assert not [held for held in evaluation.rows if held.task == "passkey"]
    for length in ("256", "1024"):
        assert [note for note in evaluation.notes if f"--passkey {length}" in note and "left out" in note]


def with_options(*models, **given):
    """Evaluate with no option given but these: one that is given is held to."""
    return evaluate([str(model) for model in models], EvalOptions(text=Path("prose.txt"), tokens=120, **given))


def test_a_context_that_nobody_asked_for_is_what_the_models_can_read(llama):
    evaluation = with_options(llama, generation=False)
    assert evaluation.settings["context"] == 64
    assert [note for note in evaluation.notes if "--context 512" in note and "64 instead" in note]


def test_a_model_of_few_positions_writes_no_more_than_it_has_positions(llama, tmp_path):
    folder = put(tmp_path / "gpt2", tiny("gpt2", vocab_size=258), AutoTokenizer.from_pretrained(llama))
    measure(folder, generation=True, context=64)


def test_a_model_in_ruins_is_measured_all_the_same(llama, tmp_path):
    ruins = moved(llama, tmp_path / "ruins", by=3.0)
    evaluation = measure(llama, ruins, generation=True)
    results.save(evaluation, tmp_path / "eval.json")  # refuses what is no number
    assert results.read(tmp_path / "eval.json") == evaluation
    show(evaluation)


def test_a_model_that_is_wholly_certain_of_the_wrong_is_measured_all_the_same(llama, tmp_path):
    ruins = moved(llama, tmp_path / "ruins", by=30.0, only="lm_head")
    evaluation = measure(llama, ruins)
    results.save(evaluation, tmp_path / "eval.json")
    show(evaluation)


def test_a_model_that_computes_nan_is_caught(llama, tmp_path):
    broken = moved(llama, tmp_path / "broken", by=float("nan"), only="layers.1.mlp")
    with pytest.raises(ModelError, match="NaN"):
        measure(llama, broken)


# What identifies a model.


def test_a_name_a_readme_and_a_manifest_do_not_change_what_a_model_is(model, tmp_path):
    before = identity(model)
    (model / "README.md").write_text("# A model")
    (model / "effconvert.json").write_text("{}")
    model.rename(tmp_path / "renamed")
    assert identity(tmp_path / "renamed") == before
    assert identity(Path(shutil.copytree(tmp_path / "renamed", tmp_path / "copy"))) == before


@pytest.mark.parametrize("name", ["first.safetensors", "last.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_byte_of_weights_tokenizer_or_config_changes_what_a_model_is(model, name):
    files = sorted(model.glob("*.safetensors"))
    file = files[0 if name.startswith("first") else -1] if name.endswith(".safetensors") else model / name
    before, content = identity(model), bytearray(file.read_bytes())
    if name.endswith(".json"):
        content += b"\n"
    else:
        content[-1] ^= 1
    file.write_bytes(content)
    assert identity(model) != before


def test_a_byte_of_a_module_of_sentence_transformers_changes_what_a_model_is(model):
    """Results, reports and `push` would take a folder with another last layer for the one that was measured."""
    plain = identity(model)
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    assert identity(model) == plain  # nothing names it
    (model / "modules.json").write_text(json.dumps([{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}]))
    before = identity(model)
    assert before != plain
    (model / "2_Dense" / "model.safetensors").write_bytes(b"Weights")
    assert identity(model) != before


def test_an_adapter_beside_the_weights_is_no_part_of_what_is_measured_and_that_is_said(model):
    (model / "adapter_config.json").write_text("{}")
    assert measure(model).notes[0] == "model: adapter_config.json lies beside its weights, and they are measured without that adapter"


def test_another_file_of_the_same_size_and_time_is_another_model(model):
    file = min(model.glob("*.safetensors"))
    before, status, content = identity(model), file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    (model / "draft").write_bytes(content)
    os.utime(model / "draft", ns=(status.st_atime_ns, status.st_mtime_ns))
    (model / "draft").replace(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert identity(model) != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_memory_of_hashes_costs_time_and_nothing_else(model, content, tmp_path):
    before = identity(model)
    [kept] = (tmp_path / "cache").glob("digests.json")
    kept.write_text(content)
    assert identity(model) == before


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(llama, tmp_path, monkeypatch):
    expected = measure(llama, cache=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFCONVERT_CACHE", str(tmp_path / "file" / "cache"))
    assert measure(llama).rows == expected.rows


# The command line.


def refused(command, code, told, *arguments):
    """A command that fails says one line, has no traceback, prints no results, and writes nothing beside its cache."""
    before = sorted(path for path in Path.cwd().rglob("*") if "cache" not in path.parts)
    result = command("eval", *arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, result.stderr
    assert re.search(told, lines[0]), lines[0]
    assert result.stdout == ""
    assert sorted(path for path in Path.cwd().rglob("*") if "cache" not in path.parts) == before


BENCH = ("--batch", "1", "--context", "12", "--new-tokens", "2", "--rounds", "1", "--warmup", "0")


@pytest.mark.parametrize("arguments", [("inspect",), ("eval", *EASY), ("bench", *BENCH)], ids=lambda arguments: arguments[0])
def test_what_is_only_read_is_not_sorted_into_what_would_be_copied(command, model, monkeypatch, arguments):
    """A trainer's folder, with links: which files a conversion would take along is nothing to those that copy none."""

    def asked(*_):
        raise AssertionError("somebody asked which files belong to the model")

    monkeypatch.setattr("effconvert.convert.plan.other_files", asked)
    monkeypatch.setattr(passes, "BUFFER", 2**20)
    (model / "checkpoint-500").mkdir()
    (model / "latest").symlink_to(model / "checkpoint-500")
    (model / "log.txt").symlink_to("/dev/null")
    done = command(arguments[0], model, *arguments[1:])
    assert done.exit_code == 0, done.output
    with pytest.raises(AssertionError, match="somebody asked"):
        raise command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out").exception


@pytest.fixture
def idle(monkeypatch):
    """Fail where anything is computed."""

    def computed(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(running, "load_measured", computed)


def test_no_model_is_refused(command):
    refused(command, 2, "MODEL")


@pytest.mark.parametrize(
    ("code", "told", "arguments"),
    [
        (2, r"there is no folder .*nowhere/model", ["nowhere/model"]),
        (2, r"--context 65 is more than the 64 tokens that tiny reads; give at most 64", ["MODEL", *EASY, "--context", "65"]),
        (2, r"--max-length 65 is more than the 64 tokens", ["MODEL", *EASY, "--tasks", "pick", "--max-length", "65"]),
        (2, r"--device qpu cannot be used here; give one of cpu", ["MODEL", *EASY, "--device", "qpu"]),
        (2, r"--device meta holds no numbers", ["MODEL", *EASY, "--device", "meta"]),
        (2, r"--output . is a folder", ["MODEL", "-o", "."]),
        (2, r"--output file/eval.json cannot be written", ["MODEL", "-o", "file/eval.json"]),
        (2, r"--text none cannot be read", ["MODEL", "--text", "none"]),
        (2, r"--text empty is empty", ["MODEL", "--text", "empty"]),
        (2, r"short has 1 tokens, .* give a longer --text", ["MODEL", "--text", "short"]),
        (2, r"--limit and --samples both choose", ["MODEL", "--tasks", "pick", "--limit", "2", "--samples", '{"pick": [0]}']),
        (2, r"--limit 2.5 should be a whole number", ["MODEL", "--tasks", "pick", "--limit", "2.5"]),
        (2, r"--limit", ["MODEL", "--tasks", "pick", "--limit", "0"]),
        (2, r"--limit", ["MODEL", "--tasks", "pick", "--limit", "nan"]),
        (2, r"--limit", ["MODEL", "--tasks", "pick", "--limit", "inf"]),
        (2, r"--tokens is 'many', and it should be a whole number", ["MODEL", "--tokens", "many"]),
        (2, r"--passkey", ["MODEL", "--passkey", "64,long"]),
        (2, r"--passkey 512 is more than the 64 tokens", ["MODEL", *EASY, "--passkey", "512"]),
        (2, r"--batch-size", ["MODEL", "--batch-size", "0"]),
        (2, r"--dtype", ["MODEL", "--dtype", "int8"]),
        (2, r"--samples is neither JSON", ["MODEL", "--tasks", "pick", "--samples", "{pick: 1}"]),
        (2, r"--samples is neither JSON", ["MODEL", "--tasks", "pick", "--samples", "nowhere.json"]),
        (2, r"--samples", ["MODEL", "--tasks", "pick", "--samples", '{"pick": 3}']),
        (2, r"--pairs is for encoders", ["MODEL", *EASY, "--pairs", "pairs.csv"]),
        (2, r"--include-path nowhere is no folder", ["MODEL", *EASY, "--tasks", "pick", "--include-path", "nowhere"]),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_before_anything_is_computed(command, llama, idle, code, told, arguments):
    Path("file").write_text("")
    Path("empty").write_text("")
    Path("short").write_text("a")
    refused(command, code, told, *(llama if argument == "MODEL" else argument for argument in arguments))


def test_a_model_without_a_tokenizer_is_refused(command, model, idle):
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(command, 1, "model has no tokenizer, which", model, *EASY)


def test_a_model_without_a_head_is_refused(command, llama, tmp_path, idle):
    from transformers import AutoModel

    folder = put(tmp_path / "body", AutoModel.from_pretrained(llama), AutoTokenizer.from_pretrained(llama))
    refused(command, 1, "has no language-model head", folder, *EASY)


def test_a_model_with_a_tokenizer_of_another_is_refused(command, tmp_path, idle):
    folder = put(tmp_path / "small", tiny_llama(100), byte_tokenizer())
    refused(command, 1, "do not belong together", folder, *EASY)


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_computed(command, llama, idle, monkeypatch):
    Path("locked").mkdir()
    real = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked" and real(path, mode))  # root may write everywhere
    refused(command, 2, "--output locked/deep/eval.json cannot be written: .*locked is not a writable folder", llama, "-o", "locked/deep/eval.json")


def test_a_damaged_model_says_so_in_a_line(command, model):
    max(model.glob("*.safetensors")).write_bytes(b"no tensors")
    refused(command, 1, "model-0000", model, *EASY)


def test_help_imports_neither_torch_nor_lm_eval(python, environment):
    program = (
        "import contextlib, sys\nfrom effconvert.__main__ import main\nwith contextlib.suppress(SystemExit):\n    main()\n"
        "print('|', *{'torch', 'transformers', 'lm_eval', 'scipy', 'datasets', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([python, "-c", program, "eval", "--help"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rpartition("|")[2].split() == ["pydantic"]
    assert "--apply-chat-template" in done.stdout


# Results, in a file and for people.


def test_a_results_file_reads_as_it_was_written_and_tells_nothing_of_this_machines_owner(command, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_of_somebody")
    monkeypatch.setenv("SOMETHING", "a value of the environment")
    tasks = choices(tmp_path / "tasks")
    (tmp_path / "text of mine.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    other = moved(llama, tmp_path / "other")
    arguments = [
        llama,
        other,
        *EASY[2:],
        "--tasks",
        "pick",
        "--include-path",
        tasks,
        "--text",
        tmp_path / "text of mine.txt",
        "-o",
        tmp_path / "deep" / "eval.json",
    ]
    result = command("eval", *arguments)
    assert result.exit_code == 0, result.output
    read, content = results.read(tmp_path / "deep" / "eval.json"), (tmp_path / "deep" / "eval.json").read_text()
    assert isinstance(read, results.Evaluation)
    assert json.loads(content) == json.loads(json.dumps(asdict(read)))
    again = measure(llama, other, tasks="pick", include_path=tasks, text=tmp_path / "text of mine.txt")
    assert (read.rows, read.subjects, read.continuations) == (again.rows, again.subjects, again.continuations)
    assert read.settings["text"] == "text of mine.txt"
    assert read.versions["torch"] == version("torch")
    for private in (str(tmp_path), str(llama.parent), str(Path.home()) + "/", os.uname().nodename, "hf_a_secret", "a value of the environment"):
        assert private not in content
    assert not re.findall(r'"/[^"]*"', content), "an absolute path"
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["eval.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kind": "evaluation"}', '{"kind": "other"}', '{"kind": []}', "[" * 100_000, b"\xff"])
def test_a_file_that_is_no_results_is_refused(tmp_path, content):
    (tmp_path / "eval.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OptionError, match="is not a file that effconvert eval or bench wrote"):
        results.read(tmp_path / "eval.json")


def test_a_results_file_is_never_half_written(llama, tmp_path, monkeypatch):
    evaluation = measure(llama)
    results.save(evaluation, tmp_path / "eval.json")
    before = (tmp_path / "eval.json").read_bytes()
    os.link(tmp_path / "eval.json", tmp_path / "kept")
    results.save(replace(evaluation, notes=("another",)), tmp_path / "eval.json")
    assert (tmp_path / "kept").read_bytes() == before  # the file was replaced, and not written into
    before = (tmp_path / "eval.json").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OptionError, match="No space left on device"):
        results.save(evaluation, tmp_path / "eval.json")
    assert (tmp_path / "eval.json").read_bytes() == before
    assert not list(tmp_path.glob(".*.draft"))


def test_what_is_shown_is_one_table_with_every_number_that_is_needed(command, llama, tmp_path):
    other, tasks = moved(llama, tmp_path / "other"), choices(tmp_path / "tasks")
    result = command("eval", llama, other, *EASY[:-1], "--tasks", "pick", "--include-path", tasks)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    table = lines[: next(at for at, line in enumerate(lines) if line.startswith("text:"))]
    assert all(len(line) <= 110 for line in table)
    assert table[0].split()[:4] == ["n", "tiny", "other", "difference"]
    metrics = ["perplexity", "bits_per_byte", "kl", "same_top_token", "distinct_2", "repeated_4", "loops", "acc", "acc_norm"]
    assert len(table) == 1 + len(metrics)  # no line is broken
    assert [next(metric for metric in sorted(metrics, key=len, reverse=True) if metric in line) for line in table[1:]] == metrics
    assert re.search(r"perplexity +\d+ +[\d.]+ ±[\d.]+ +[\d.]+ ±[\d.]+ +\+[\d.]+ ±[\d.]+ +(worse|better|n\.s\.)", result.stdout)
    assert "n.s.: not significant (p >= 0.05)" in result.stdout
    assert ("kept: what is left of the original's lead over guessing" in result.stdout) == ("kept" in table[0])
    assert "after " in result.stdout
    assert "tiny writes: " in result.stdout
    assert "other writes: " in result.stdout
    assert result.stderr == ""


def test_models_of_one_name_are_told_apart_and_a_link_keeps_its_own(command, llama, tmp_path):
    for folder in ("a/tiny", "b/tiny"):
        shutil.copytree(llama, tmp_path / folder)
    told = command("eval", "a/tiny", "b/tiny", *EASY).stdout
    assert told.splitlines()[0].split()[:4] == ["n", "1", "tiny", "2"]
    Path("best").symlink_to("b/tiny")
    assert command("eval", "a/tiny", "./best/", *EASY).stdout.splitlines()[0].split() == ["n", "tiny", "best", "difference"]


def test_names_and_texts_with_brackets_are_shown_as_they_are(command, llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "model[bold]"))
    Path("text[red].txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    result = command("eval", folder, folder, *EASY[2:], "--text", "text[red].txt")
    assert result.exit_code == 0, result.output
    assert "model[bold]" in result.stdout
    assert "text: text[red].txt" in result.stdout


def test_what_is_said_of_the_text_is_what_was_read(command, llama):
    Path("short").write_text("The quick brown fox jumps over the lazy dog, once. And again")
    result = command("eval", llama, "--text", "short", "--context", "20", "--no-generation")
    assert result.exit_code == 0, result.output
    assert "text: short, 60 tokens in windows of 20" in result.stdout


def test_models_compute_where_and_in_what_was_asked_for(llama, monkeypatch):
    asked, load = [], running.load_measured
    monkeypatch.setattr(running, "load_measured", lambda opened, dtype, device: asked.append((dtype, device)) or load(opened, dtype, device))
    measure(llama, dtype="float32", device="cpu")
    assert asked == [("float32", "cpu")]


@pytest.mark.parametrize(("output", "said"), [("{model}/config.json", "is in the folder of the model"), ("mine.json", "holds no results of effconvert")])
def test_results_replace_nothing_of_anybodys(command, llama, tmp_path, output, said):
    folder = shutil.copytree(llama, tmp_path / "victim")
    Path("mine.json").write_text("{}")
    place = Path(output.format(model=folder))
    before = place.read_bytes()
    for name in ("eval", "bench"):
        result = command(name, folder, "-o", place)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    assert place.read_bytes() == before


def test_the_processor_has_one_name(llama):
    assert measure(llama, device="cpu:0").settings["device"] == "cpu"


def test_memory_that_is_full_is_an_error_of_one_line(command, llama, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("effconvert.eval.quality.language.text", full)
    result = command("eval", llama, *EASY)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no memory left for reading the text; give a smaller --context")
    assert len(result.stderr.splitlines()) == 1


def test_a_single_value_is_a_list_of_one():
    assert EvalOptions(passkey=64).passkey == (64,)
    assert BenchOptions(batch=2, context="8,16").context == (8, 16)


def test_the_home_folder_is_found_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EvalOptions(output="~/e.json", text=Path("~/t.txt")).output == tmp_path / "e.json"
    assert PushOptions(results="a.json,~/b.json").results == (Path("a.json"), tmp_path / "b.json")
