"""Calibration: what text is taken, how it is refused, and what a killed run leaves for the next one."""

import gzip
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert import calibration, drafts, output
from effconvert.convert import write as stream
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.text import calibration_text, default_text
from effconvert.heal._calibration import Calibration
from effconvert.heal.refit import Refit
from effconvert.options import RunOptions
from tests.convert.test_seam import Plain
from tests.heal.healing import letters, put

ASKER, MODEL = 2, 1  # exit codes: whose fault it is
TOKENS = 256  # of calibration: 8 windows of 32
LAYERS = 3  # of the tiny model


class Looking(Plain):
    """Scales o by what it sees: each layer's change depends on the changes below it."""

    @property
    def name(self):
        return "looking"

    def needs_calibration(self, config):
        return True

    def layer(self, layer):
        seen = 1.0
        if layer.activations:
            SOLVED.append(layer.index)
            if layer.index in FATAL:
                raise KeyboardInterrupt
            seen = 30 * torch.cat([look.inputs["o"] for look in layer.activations.capture(layer, ("o",), until="o")]).std().item()
        layer["o"] = layer["o"] * seen


SOLVED, FATAL = [], []  # layers that were solved; those at which a run is killed


@pytest.fixture(autouse=True)
def _unharmed():
    SOLVED.clear()
    FATAL.clear()


def all_layers():
    return list(range(LAYERS)) == SOLVED


def words(count, seed=0):
    """Random letters with blanks between."""
    draw = random.Random(seed)
    return "".join(draw.choice("etaoin shrdlu ") for _ in range(count))


@pytest.fixture
def text():
    """A text file of twice as many tokens (bytes) as are asked for."""
    path = Path("text.txt")
    path.write_text(words(2 * TOKENS))
    return path


def look(model="model", calibrated="text.txt", tokens=TOKENS, place="out", **more):
    """Convert by the technique that looks."""
    given = {"calibrate": str(calibrated) if calibrated else None, "calibration_tokens": tokens, "verify": False, **more}
    return convert(str(model), (Looking(),), RunOptions(output=place, **given))


def weights(folder):
    return {file.name: file.read_bytes() for file in Path(folder).glob("*.safetensors")}


def refit(model, *more, tokens=TOKENS):
    """A command that calibrates: the model is healed towards itself."""
    return ("refit", model, "--teacher", model, "-o", "out", "--no-verify", "--calibration-tokens", tokens, *more)


def planned(tokens=TOKENS, steps=None):
    conversion = plan(open_checkpoint(Path("model")), steps or (Looking(),))
    return replace(conversion, calibration=calibration.prepare(conversion, RunOptions(calibrate="text.txt", calibration_tokens=tokens)))


def ids_of(model=Path("model"), **options):
    given = {"calibrate": "text.txt", "calibration_tokens": TOKENS, **options}
    return calibration.prepare(plan(open_checkpoint(model), (Looking(),)), RunOptions(**given))


# What text


def test_windows_come_from_all_over_the_text(model):
    Path("text.txt").write_text("".join(chr(97 + at // 400) for at in range(400 * 20)))  # a ... t, in 400s
    ids = ids_of(model).ids
    assert ids.shape == (8, 32)
    letters = {letter for window in ids.tolist() for letter in window}
    starts = [window[0] for window in ids.tolist()]
    assert len(letters) >= 8
    assert starts == sorted(starts)
    assert starts[-1] - starts[0] >= 16  # of 20 letters


def test_windows_are_the_same_each_time_and_another_text_gives_others(model, text):
    first, again = ids_of(model), ids_of(model)
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256
    text.write_text(words(2 * TOKENS, seed=1))
    assert ids_of(model).sha256 != first.sha256


@pytest.mark.usefixtures("one_window_a_batch")
def test_an_encoders_windows_are_cut_into_texts_of_several_lengths_with_ends_of_their_own():
    windows = 200 + torch.arange(5 * 32).view(5, 32)
    batches = Calibration("text", windows, (1, 4), ((101, 100), (102,))).batches
    assert [tuple(batch.shape) for batch in batches] == [(1, 32), (4, 8), (1, 32), (4, 8), (1, 32)]
    for batch in batches:
        assert batch[:, :2].tolist() == [[101, 100]] * len(batch)
        assert batch[:, -1].tolist() == [102] * len(batch)
    for batch, window in ((batches[1], windows[1]), (batches[3], windows[3])):
        assert torch.equal(batch[0, 2:7], window[2:7])  # the first text of a window
        assert torch.equal(batch[3, 2:7], window[26:31])  # and the last
    plain = Calibration("text", windows)
    assert torch.equal(torch.cat(plain.batches), windows)
    assert plain.sha256 != Calibration("text", windows, (1, 4)).sha256


@pytest.mark.parametrize(("kind", "ends", "lengths"), [("bert", True, [64, 16]), ("bert", False, [64, 16]), ("roberta", True, [63])])
def test_encoders_are_calibrated_on_long_and_short_texts(kind, ends, lengths):
    """RoBERTa's first position is the padding's, and a quarter of 63 tokens is too short."""
    put(Path("encoder"), kind)
    made = letters()
    if ends:
        around = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        made.backend_tokenizer.post_processor = around
    made.save_pretrained("encoder")
    Path("text.txt").write_text(words(3000))
    calibrated = ids_of(Path("encoder"), calibration_tokens=1024)
    assert [batch.shape[1] for batch in calibrated.batches][: len(lengths)] == lengths
    assert calibrated.record["windows"] == lengths
    for batch in calibrated.batches:
        assert bool((batch[:, 0] == 1).all()) == ends
        assert bool((batch[:, -1] == 2).all()) == ends


@pytest.mark.usefixtures("one_window_a_batch")
def test_windows_are_as_long_as_asked_for_and_run_one_at_a_time(model):
    Path("text.txt").write_text(words(3000))
    assert ids_of(model, calibration_window=20).ids.shape == (TOKENS // 20, 20)
    assert ids_of(model, calibration_window=32).sha256 == ids_of(model).sha256
    assert [batch.shape for batch in Calibration("text", torch.zeros(3, 64, dtype=torch.long)).batches] == [(1, 64)] * 3
    look(calibration_window=20)
    assert "calibration-window: 20" in Path("out/effconvert.yaml").read_text()
    assert json.loads(Path("out/effconvert.json").read_text())["calibration"]["windows"] == [20]


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (65, "--calibration-window 65 is more than the 64 tokens that the model reads; give at most that"),
        (33, "--calibration-window 33 needs --calibration-tokens 264 \\(8 windows\\) or more, and it is 256"),
    ],
)
def test_windows_that_cannot_be_are_refused(model, text, window, said):
    with pytest.raises(OptionError, match=said):
        ids_of(model, calibration_window=window)


def test_windows_are_no_longer_than_the_model_reads(model):
    Path("text.txt").write_text(words(3000))
    assert ids_of(model, calibration_tokens=2048).ids.shape == (32, 64)


def test_just_as_many_tokens_as_are_asked_for_will_do(model):
    Path("text.txt").write_text(words(TOKENS))
    assert ids_of(model).ids.numel() == TOKENS
    Path("text.txt").write_text(words(TOKENS - 1))
    with pytest.raises(OptionError):
        ids_of(model)


def test_the_default_text_is_none_that_is_measured_on():
    given = calibration_text()
    measured = [part for part in default_text().content.split("\n\n") if len(part) > 200]
    assert measured
    assert not [part for part in measured if part in given.content]


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz"])
def test_json_lines_with_a_text_are_read(model, text, name):
    lines = text.read_text()
    content = "".join(json.dumps({"text": part, "id": at}) + "\n" for at, part in enumerate([lines[:100], lines[100:]]))
    Path(name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    text.write_text(f"{lines[:100]}\n\n{lines[100:]}")
    assert ids_of(model, calibrate=name).sha256 == ids_of(model).sha256


def test_a_recorded_calibration_says_what_was_looked_at(model, text):
    look()
    record = json.loads(Path("out/effconvert.json").read_text())["calibration"]
    assert record == {"text": "text.txt", "tokens": TOKENS, "windows": [32], "sha256": ids_of(model).sha256}
    assert str(Path.cwd()) not in Path("out/effconvert.json").read_text()


# Refusals


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a" * 100, "96 tokens in windows of 32"),
        (b"a" * 20, "20 tokens"),  # less than a window
        (b"a", "1 tokens, and --calibration-tokens"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\x7fELF\xff\xfe\x00", "not UTF-8"),
    ],
    ids=["short", "shorter", "one", "empty", "blank", "binary"],
)
def test_a_text_that_will_not_do_is_refused_with_what_it_has(refused, model, content, told):
    Path("bad.txt").write_bytes(content)
    said = refused(ASKER, *refit(model, "--calibrate", "bad.txt"))
    assert "bad.txt" in said
    assert told in said
    assert "--text" not in said  # which is another option
    assert "--context" not in said


def test_how_many_tokens_are_needed_is_said(refused, model, text):
    said = refused(ASKER, *refit(model, "--calibrate", "text.txt", tokens=1024))
    assert "1024" in said
    assert str(2 * TOKENS) in said


@pytest.mark.parametrize("place", ["missing.txt", "missing.jsonl", ".", "model", ""], ids=["txt", "jsonl", "here", "folder", "nothing"])
def test_what_is_no_file_is_refused(refused, model, place):
    assert "--calibrate" in refused(ASKER, *refit(model, "--calibrate", place))


@pytest.mark.parametrize(
    "content",
    ['{"words": "a"}\n', "", "no json\n", '"text"\n', '{"text": null}\n' * 200, '{"text": 5}\n' * 400, '{"text": ["a"]}\n' * 400],
    ids=["no-text", "empty", "no-json", "a-string", "null", "number", "list"],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_json_lines_without_texts_are_refused(refused, model, content, name):
    Path(name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert name in refused(ASKER, *refit(model, "--calibrate", name))


def test_a_compressed_file_that_is_none_is_refused(refused, model):
    Path("bad.jsonl.gz").write_text("not compressed")
    assert "bad.jsonl.gz" in refused(ASKER, *refit(model, "--calibrate", "bad.jsonl.gz"))


@pytest.mark.parametrize("tokens", [0, 63, -1, "many", 1.5])
def test_a_number_of_tokens_that_is_none_is_refused(refused, model, text, tokens):
    assert "--calibration-tokens" in refused(ASKER, *refit(model, "--calibrate", "text.txt", tokens=tokens))


def test_a_model_without_a_tokenizer_cannot_be_calibrated(refused, model, text):
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(MODEL, *refit(model, "--calibrate", "text.txt"))


def test_a_damaged_tokenizer_is_refused(refused, model, text):
    (model / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(MODEL, *refit(model, "--calibrate", "text.txt"))


def test_a_tokenizer_of_another_model_is_refused(refused, model, text):
    file = model / "tokenizer.json"
    held = json.loads(file.read_text())
    held["model"]["vocab"]["e"] = 300
    file.write_text(json.dumps(held))
    said = refused(MODEL, *refit(model, "--calibrate", "text.txt"))
    assert "300" in said
    assert "258" in said


def poison(model, name, value):
    where = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    file = model / where[name]
    tensors = load_file(file)
    tensors[name][:] = value
    save_file(tensors, file, metadata={"format": "pt"})


POISONS = {
    "solved": ("model.layers.1.self_attn.o_proj.weight", float("nan")),
    "run": ("model.layers.1.mlp.up_proj.weight", float("inf")),  # which no step asks for
    "embedding": ("model.embed_tokens.weight", float("nan")),  # of which only some rows are read
    "values": ("model.layers.0.self_attn.v_proj.weight", 3e38),  # finite, and what comes of it is not
    "states": ("model.layers.0.mlp.up_proj.weight", 3e38),
}


@pytest.mark.parametrize(("step", "poisoned"), [(step, at) for step in ("gqa", "refit") for at in POISONS])
def test_nan_and_infinity_are_refused(refused_late, llama, model, text, step, poisoned):
    sound = Path(shutil.copytree(llama, "sound"))
    poison(model, *POISONS[poisoned])
    how = ("gqa", "--groups", 2, model) if step == "gqa" else ("refit", model, "--teacher", sound)
    said = refused_late(MODEL, *how, "-o", "out", "--no-verify", "--calibrate", "text.txt", "--calibration-tokens", TOKENS)
    assert "NaN or infinity" in said


def test_a_dry_run_says_all_errors_and_writes_nothing(refused, command, contents, model, text):
    assert "tokens" in refused(ASKER, *refit(model, "--calibrate", "text.txt", "--dry-run", tokens=1024))
    before = contents(Path())
    assert command(*refit(model, "--calibrate", "text.txt", "--dry-run")).exit_code == 0
    assert contents(Path()) == before
    look(dry_run=True)
    assert contents(Path()) == before
    assert not SOLVED


def test_more_tokens_than_memory_has_room_for_are_refused_with_how_many_fit(model, monkeypatch):
    Path("text.txt").write_text(words(16 * TOKENS))
    conversion, tokens = planned(16 * TOKENS), 16 * TOKENS
    rest, token = calibration._bytes(conversion)
    free = rest + 9 * TOKENS * token
    monkeypatch.setattr(calibration.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0)))
    monkeypatch.setattr(calibration.psutil, "virtual_memory", lambda: SimpleNamespace(available=free, total=10**12))
    with pytest.raises(OptionError, match=rf"^calibration on {tokens} tokens takes about [\d.]+ GB of memory, and [\d.]+ GB are free; give --calib.* 2048$"):
        calibration.check_memory(conversion)
    calibration.check_memory(replace(planned(2048), peak=conversion.peak))
    monkeypatch.setattr(calibration.psutil, "virtual_memory", lambda: SimpleNamespace(available=0, total=10**12))
    with pytest.raises(OptionError, match="convert on a larger machine"):
        calibration.check_memory(conversion)


@pytest.mark.parametrize("dry_run", [True, False])
def test_memory_for_calibration_is_asked_for_before_anything_is_written(model, text, monkeypatch, contents, dry_run):
    before = contents(Path())
    with monkeypatch.context() as patched:
        patched.setattr(calibration, "LIBRARIES", 10**15)
        with pytest.raises(OptionError, match="calibration on 256 tokens takes about"):
            look(dry_run=dry_run)
    assert contents(Path()) == before


def test_attention_of_all_tokens_counts_where_a_step_keeps_it(model, text):
    config = planned().checkpoint.config
    attention = 16 * config.heads * config.head_dim + 2 * config.heads * 32  # queries and keys, and scores
    healed, looking = (calibration._bytes(planned(steps=steps))[1] for steps in ((Refit(),), (Looking(),)))
    assert looking == 3 * 4 * config.hidden * 3 // 2
    assert healed == (4 * config.hidden * 8 + attention) * 3 // 2


# Killed


def test_a_killed_run_is_gone_on_with_and_ends_in_the_same_bytes(model, text):
    look(place="unbroken")
    assert all_layers()
    for fatal in range(1, LAYERS):
        SOLVED.clear()
        FATAL[:] = [fatal]
        with pytest.raises(KeyboardInterrupt):
            look()
        assert list(range(fatal - 1, fatal + 1)) == SOLVED  # those before were found
        assert len(list(Path("out.partial").glob("layer-*"))) == fatal
    FATAL.clear()
    SOLVED.clear()
    look()
    assert SOLVED == [LAYERS - 1]
    assert weights("out") == weights("unbroken")


def test_a_run_killed_while_a_layer_is_saved_is_gone_on_with(model, text, monkeypatch):
    look(place="unbroken")

    def die(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(drafts, "to_disk", die)
        with pytest.raises(KeyboardInterrupt):
            look()
    look()
    assert weights("out") == weights("unbroken")


def test_a_run_killed_while_shards_are_written_does_not_look_again(model, text, monkeypatch):
    look(place="unbroken")
    real, left = stream.save_manifest, [2]

    def dying(*given):
        real(*given)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stream, "save_manifest", dying)
        with pytest.raises(KeyboardInterrupt):
            look()
    SOLVED.clear()
    outcome = look()
    assert not SOLVED
    assert outcome.resumed == 2
    assert weights("out") == weights("unbroken")


@pytest.mark.parametrize("change", ["text", "tokens", "model"])
def test_what_was_seen_of_another_text_or_model_is_not_used(model, text, change):
    FATAL[:] = [LAYERS - 1]
    with pytest.raises(KeyboardInterrupt):
        look()
    assert list(Path("out.partial").glob("layer-*"))
    FATAL.clear()
    SOLVED.clear()
    if change == "text":
        text.write_text(words(2 * TOKENS, seed=1))
    if change == "model":
        poison(model, "model.layers.0.self_attn.o_proj.weight", 0.5)
    tokens = TOKENS // 2 if change == "tokens" else TOKENS
    look(tokens=tokens)
    assert all_layers()
    look(place="fresh", tokens=tokens)
    assert weights("out") == weights("fresh")


def test_of_the_working_files_nothing_is_left(model, text):
    outcome = look()
    assert not list(Path().rglob("*draft*"))
    assert not Path("out.partial").exists()
    assert not output.foreign_files(Path("out"))
    record = json.loads(Path("out/effconvert.json").read_text())
    assert set(record["files"]) == set(outcome.plan.output_files) == {file.name for file in Path("out").iterdir()} - {"effconvert.json"}


def test_a_layer_sees_what_the_converted_layers_below_it_make(model, text):
    """Layer 1 is scaled by what it reads, and that is another thing once layer 0 was changed."""
    look()
    before = {name: tensor for file in Path("model").glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = {name: tensor for file in Path("out").glob("*.safetensors") for name, tensor in load_file(file).items()}
    changed = Path(shutil.copytree("model", "changed"))
    for file in changed.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: after[name] if "layers.0." in name else before[name] for name in tensors}, file, metadata={"format": "pt"})
    name = "model.layers.1.self_attn.o_proj.weight"
    expected, alone = ((before[name].float() * 30 * spread_in_second(folder, ids_of().ids)).bfloat16() for folder in (changed, model))
    torch.testing.assert_close(after[name], expected, rtol=2**-8, atol=0)  # a step of bfloat16
    assert (after[name] != alone).float().mean() > 0.5


@torch.inference_mode()
def spread_in_second(folder, ids):
    """How far numbers spread that o reads in layer 1 of a whole model."""
    seen, whole = [], AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    whole(ids)
    return seen[0].std()


def test_states_that_are_no_numbers_name_the_layer(model, text):
    poison(model, "model.layers.1.mlp.up_proj.weight", 3e38)
    with pytest.raises(ModelError, match=r"^layer 1 computes NaN or infinity"):
        look()
