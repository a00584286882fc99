"""Calibration text that the model writes: what is written, where it is kept, and when it is refused."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert import calibration, selftext
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.modeling import loading
from effconvert.options import RunOptions
from tests.convert.test_calibrate import FATAL, LAYERS, MODEL, SOLVED, TOKENS, Looking, poison, refit, weights
from tests.convert.test_calibrate import _unharmed as _unharmed
from tests.heal.healing import letters, put
from tests.models import tiny

ASKER = 2
WINDOW = 32  # tokens: the samples of TOKENS tokens are 8


def look(model="model", calibrated="self", place="out", **more):
    """Convert by a technique that looks at what layers compute."""
    options = {"calibrate": calibrated, "calibration_tokens": TOKENS, "verify": False, **more}
    return convert(str(model), (Looking(),), RunOptions(output=place, **options))


def prepared(model="model", **options):
    given = {"calibrate": "self", "calibration_tokens": TOKENS, **options}
    return calibration.prepare(plan(open_checkpoint(Path(model)), (Looking(),)), RunOptions(**given))


def samples(model="model", count=3, length=WINDOW, **more):
    checkpoint = open_checkpoint(Path(model))
    return selftext.sample(checkpoint, loading.load_tokenizer(checkpoint.folder), count, length, checkpoint.config.vocabulary, **more)


def record(place="out"):
    return json.loads((Path(place) / "effconvert.json").read_text())["calibration"]


def kept():
    return sorted(file for file in Path("cache/selftext").glob("*"))


@pytest.fixture
def writing(monkeypatch):
    """Count the times that a model writes."""
    calls, real = [], selftext.sample

    def counted(*given, **more):
        calls.append(given)
        return real(*given, **more)

    monkeypatch.setattr(selftext, "sample", counted)
    return calls


# What is written


def test_samples_are_the_same_each_time_and_leave_the_callers_random_numbers_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = samples()
    assert torch.equal(torch.rand(1), expected)
    assert first.shape == (3, WINDOW)
    assert torch.equal(first, samples())
    assert not torch.equal(first, samples(temperature=0.5))
    assert len({*first[:, 0].tolist()}) == 3  # first tokens


def test_samples_go_on_behind_an_end_of_text_and_take_no_settings_of_the_models_own(model):
    """A model that nearly always ends its text, and whose own settings would have it stop there and choose the most likely token."""
    poison(model, "lm_head.weight", 0.0)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5], "do_sample": False, "top_k": 1, "max_length": 4}))
    ids = samples(count=8)
    assert ids.shape == (8, WINDOW)
    assert (ids == 1).sum() + (ids == 5).sum() > 0  # all tokens are as likely
    assert ids.unique().numel() > 100


def test_no_token_is_written_that_the_tokenizer_does_not_know(model):
    poison(model, "lm_head.weight", 0.0)
    checkpoint = open_checkpoint(model)
    ids = selftext.sample(checkpoint, loading.load_tokenizer(model), 8, WINDOW, 20)
    assert ids.max() < 20
    assert not {*ids[:, 0].tolist()} & {0, 1}  # <s> and </s> begin no text


def test_a_text_begins_as_the_tokenizer_begins_one(model):
    file = model / "tokenizer.json"
    held = json.loads(file.read_text())
    held["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(held))
    ids = samples()
    assert ids.shape == (3, WINDOW)
    assert ids[:, 0].tolist() == [0, 0, 0]
    assert 0 not in ids[:, 1].tolist()


def test_samples_are_as_many_and_as_long_as_the_windows(model):
    assert prepared().ids.shape == (TOKENS // WINDOW, WINDOW)
    assert prepared(calibration_window=20).ids.shape == (TOKENS // 20, 20)


def test_the_teacher_writes_where_there_is_one(command, model, writing, llama):
    student = Path(shutil.copytree(llama, "student"))
    poison(student, "model.layers.0.self_attn.o_proj.weight", 0.5)
    result = command("refit", student, "--teacher", model, "-o", "out", "--no-verify", "--calibrate", "self", "--calibration-tokens", TOKENS)
    assert result.exit_code == 0, result.output
    assert [given[0].folder for given in writing] == [model]
    assert record()["text"].startswith("text that the teacher wrote")


def test_the_record_says_what_was_written(model):
    look()
    expected = selftext.write(plan(open_checkpoint(model), (Looking(),)), prepared(), None)
    assert record() == {
        "text": "text that the model wrote (8 samples of 32 tokens, temperature 1, seed 0)",
        "tokens": TOKENS,
        "windows": [WINDOW],
        "sha256": expected.sha256,
    }
    assert "calibrate: self" in Path("out/effconvert.yaml").read_text()
    recipe = Path("out/effconvert.yaml").read_text()
    assert "Other machines and versions may sample another one; effconvert.json has the sha256" in recipe


def test_a_file_that_is_called_self_is_read_by_its_path(model, writing):
    Path("self").write_text("etaoin shrdlu " * 40)
    look(calibrated="./self")
    assert not writing
    assert record()["text"] == "self"


def test_docstrings_can_be_asked_for(model, writing):
    look(calibrated="docstrings")
    assert not writing
    assert record()["text"].startswith("docstrings of the standard library")


# What is kept


def test_a_model_writes_once(model, writing):
    look(place="one")
    look(place="two")
    assert len(writing) == 1
    assert weights("one") == weights("two")
    assert record("one") == record("two")
    assert len(kept()) == 1  # and no draft


@pytest.mark.parametrize("change", ["tokens", "window", "weights", "seed"])
def test_another_question_is_another_text(model, writing, change, monkeypatch):
    look(place="one")
    more = {"tokens": {"calibration_tokens": 2 * TOKENS}, "window": {"calibration_window": 16}}.get(change, {})
    if change == "weights":
        poison(model, "model.layers.0.self_attn.o_proj.weight", 0.5)
    if change == "seed":
        monkeypatch.setattr(selftext, "SEED", 1)
    look(place="two", **more)
    assert len(writing) == 2
    assert record("one")["sha256"] != record("two")["sha256"]


@pytest.mark.parametrize("damage", [b"", b"{", None], ids=["empty", "damaged", "of-another-shape"])
def test_what_is_damaged_in_the_cache_is_written_again(model, writing, damage):
    look(place="one")
    if damage is None:
        save_file({"ids": torch.zeros(2, 3, dtype=torch.int32)}, kept()[0])
    else:
        kept()[0].write_bytes(damage)
    look(place="two")
    assert len(writing) == 2
    assert weights("one") == weights("two")


def test_a_run_killed_while_the_model_writes_leaves_nothing_behind(model, monkeypatch):
    class Dying:
        def __enter__(self):
            return self.advance

        def __exit__(self, *_):
            return None

        def advance(self, tokens):
            raise KeyboardInterrupt

    class Watching:
        def plan(self, *_):
            pass

        def step(self, *_):
            pass

        def bar(self, *_):
            return Dying()

    options = RunOptions(output="out", calibrate="self", calibration_tokens=TOKENS, verify=False)
    with pytest.raises(KeyboardInterrupt):
        convert(str(model), (Looking(),), options, Watching())
    assert not kept()
    assert not Path("out.partial").exists()
    with monkeypatch.context() as patched:
        patched.setattr(selftext, "save_file", lambda _, draft: (Path(draft).write_bytes(b"half"), [][0]))
        with pytest.raises(IndexError):  # as if killed: only the draft is there
            look()
    assert [file.suffix for file in kept()] == [".draft"]
    look()
    assert weights("out")


def test_a_killed_run_goes_on_with_the_same_text(model, writing):
    look(place="unbroken")
    FATAL[:] = [LAYERS - 1]
    with pytest.raises(KeyboardInterrupt):
        look()
    FATAL.clear()
    SOLVED.clear()
    look()
    assert SOLVED == [LAYERS - 1]
    assert len(writing) == 1
    assert weights("out") == weights("unbroken")


def test_a_dry_run_writes_no_text_and_says_how_much_would_be_written(command, model, writing):
    told = command(*refit(model, "--calibrate", "self", "--dry-run"))
    assert told.exit_code == 0, told.output
    assert not writing
    assert not kept()
    assert "8 samples of 32 tokens" in told.output
    assert "writes that text first" in told.output
    look()
    assert "writes that text first" not in command(*refit(model, "--calibrate", "self", "--dry-run")).output  # it is there


def test_progress_is_told_token_by_token(model):
    told = []
    samples(advance=told.append)
    assert sum(told) == 3 * WINDOW
    assert max(told) <= 3


# The default


def test_decoders_write_by_default_and_encoders_read_docstrings(model, writing):
    look(calibrated=None)
    assert len(writing) == 1
    put(Path("encoder"), "bert")
    assert prepared("encoder", calibrate=None, calibration_tokens=1024).name.startswith("docstrings")


# Refusals


def test_who_cannot_write_is_refused(refused, model):
    put(Path("encoder"), "bert")
    letters().save_pretrained("encoder")
    said = refused(ASKER, *refit("encoder", "--calibrate", "self"))
    assert "bert is an encoder and writes no text; give --calibrate FILE" in said


def test_a_decoder_without_a_head_is_refused(refused):
    tiny("llama").model.save_pretrained("headless")
    letters().save_pretrained("headless")
    assert "LlamaModel has no language-model head and writes no text" in refused(ASKER, *refit("headless", "--calibrate", "self"))


def test_a_model_without_a_tokenizer_is_refused(refused, model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(MODEL, *refit(model, "--calibrate", "self"))


def test_a_model_that_does_not_fit_into_memory_is_refused_unless_its_text_is_there(model, monkeypatch, writing):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 300_000_000, "total": 10**12}))
    with pytest.raises(OptionError, match=r"takes 0\.3 GB, and 0\.3 GB are free; give --calibrate FILE, or --calibrate docstrings"):
        prepared()
    with monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**10, "total": 10**12}))
        look()
    assert not prepared().pending
    assert len(writing) == 1


def test_a_model_that_computes_nan_is_refused(model):
    poison(model, "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(ModelError, match="cannot write text to calibrate on"):
        look()
    assert not kept()
    assert not Path("out").exists()
