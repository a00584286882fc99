"""What people do to a model with mixers, and what they ask for: a sentence of whose fault it is, before anything is written."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.heal.transfer import Transfer
from effconvert.options import RunOptions
from effconvert.steps import load
from effconvert.surgery._placed import open_checked
from effconvert.surgery.mixing._mixing import Mixing
from tests.convert.conftest import one_line
from tests.mixers.mixing import converted, names, pair
from tests.models import characters, save, tiny

STREAMING = {"technique": "streaming", "place": "scores", "options": {"window": 6, "sinks": 2}, "layers": [0]}
LINEAR = {"technique": "linear", "place": "scores", "options": {"feature": "hedgehog", "window": 5, "features": None}, "layers": [1]}


@pytest.fixture
def folder(tmp_path):
    """A llama of three layers: streaming, linear, softmax."""
    _, model = pair("llama", ("streaming", {"window": 6, "sinks": 2, "layers": "0"}), ("linear", {"window": 5, "layers": "1"}), num_hidden_layers=3)
    return save(model, tmp_path / "model")


def say(folder, change):
    """Change what config.json says."""
    file = folder / "config.json"
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))


def mixers(*entries):
    return lambda said: said["effconvert"].update(replaced=[json.loads(json.dumps(entry)) for entry in entries])


def test_what_was_not_touched_opens(folder):
    config = open_checked(folder).config
    assert names(config) == ["streaming", "linear", None]
    say(folder, mixers(STREAMING, LINEAR))
    assert open_checked(folder).config == config


EDITED = {
    "thirty million layers": (lambda said: said.update(num_hidden_layers=3 * 10**7), "num_hidden_layers = 30000000, and no model has more than 10000"),
    "unknown mixer": (mixers({**STREAMING, "technique": "nonsense"}, LINEAR), "no technique 'nonsense'"),
    "a technique that is no mixer": (mixers({**STREAMING, "technique": "gqa", "options": {"groups": 2}}, LINEAR), "gqa"),
    "a name that is none": (mixers({**STREAMING, "technique": ["streaming"]}, LINEAR), "effconvert wrote"),
    "window 0": (mixers({**STREAMING, "options": {"window": 0}}, LINEAR), "--window is 0"),
    "window of letters": (mixers({**STREAMING, "options": {"window": "many"}}, LINEAR), "--window is 'many'"),
    "sinks beyond the window": (mixers({**STREAMING, "options": {"window": 2, "sinks": 4}}, LINEAR), "--window 2 is smaller than --sinks 4"),
    "an option missing": (mixers({**STREAMING, "options": {}}, LINEAR), "--window is needed"),
    "an option misspelt": (mixers({**STREAMING, "options": {"windows": 6}}, LINEAR), "no option --windows"),
    "options are a list": (mixers({**STREAMING, "options": [6]}, LINEAR), "effconvert wrote"),
    "a layer twice in one": (mixers({**STREAMING, "layers": [0, 0]}, LINEAR), "layer 0 has two techniques"),
    "a layer in both": (mixers(STREAMING, {**LINEAR, "layers": [0, 1]}), "layer 0 has two techniques"),
    "a layer too far": (mixers({**STREAMING, "layers": [3]}, LINEAR), "layer 3"),
    "a layer before the first": (mixers({**STREAMING, "layers": [-1]}, LINEAR), "layer -1"),
    "a layer that is no number": (mixers({**STREAMING, "layers": ["0"]}, LINEAR), "effconvert wrote"),
    "a layer and a half": (mixers({**STREAMING, "layers": [0.5]}, LINEAR), "effconvert wrote"),
    "layers are no list": (mixers({**STREAMING, "layers": 0}, LINEAR), "effconvert wrote"),
    "mixers are no list": (lambda said: said["effconvert"].update(replaced=5), "effconvert wrote"),
    "mixers are a name": (lambda said: said["effconvert"].update(replaced="streaming"), "effconvert wrote"),
    "no mixers at all": (lambda said: said.update(effconvert={}), "effconvert wrote"),
    "the block is a list": (lambda said: said.update(effconvert=[1]), "effconvert wrote"),
    "the block is a word": (lambda said: said.update(effconvert="yes"), "effconvert wrote"),
    "the block is gone": (lambda said: said.pop("effconvert"), "[Ee]ffconvert"),
    "the block is null": (lambda said: said.update(effconvert=None), "[Ee]ffconvert"),
    "an empty list": (mixers(), "effconvert wrote"),
    "number of layers": (lambda said: said.update(num_hidden_layers=1), "there is no layer 1"),
    "layers of letters": (lambda said: said.update(num_hidden_layers="three"), "effconvert wrote"),
    "another family": (lambda said: said.update(model_type="effconvert_gpt2"), "effconvert wrote"),
    "an encoder": (lambda said: said.update(model_type="effconvert_bert"), "effconvert|bert"),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_config_is_refused_in_a_sentence(folder, name):
    change, told = EDITED[name]
    say(folder, change)
    with pytest.raises(ModelError, match=told) as refusal:
        open_checked(folder)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("name", [name for name in EDITED if name not in ("another family", "an encoder")])
def test_transformers_refuses_an_edited_config_too(folder, name):
    """As what it is, or as nothing: never with its mixers left out."""
    say(folder, EDITED[name][0])
    with pytest.raises(Exception, match=r"\w") as refusal:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not isinstance(refusal.value, AttributeError | NameError | AssertionError), repr(refusal.value)


def put(folder, change):
    """Change the tensors."""
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


MIXER = "model.layers.1.self_attn.effconvert."
TENSORS = {
    "missing": (lambda held: held.pop(f"{MIXER}query_map"), f"has no {MIXER}query_map, which linear needs"),
    "another shape": (lambda held: held.update({f"{MIXER}query_map": torch.zeros(4, 3, 8)}), f"{MIXER}query_map is 4 x 3 x 8"),
    "in a softmax layer": (
        lambda held: held.update({"model.layers.2.self_attn.effconvert.share": torch.zeros(4)}),
        "layers.2.self_attn.effconvert.share, for which",
    ),
    "of another mixer": (
        lambda held: held.update({"model.layers.0.self_attn.effconvert.share": torch.zeros(4)}),
        "layers.0.self_attn.effconvert.share, for which",
    ),
    "of nobody": (lambda held: held.update({f"{MIXER}nonsense": torch.zeros(4)}), f"{MIXER}nonsense, for which"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, name):
    change, told = TENSORS[name]
    put(folder, change)
    with pytest.raises(ModelError, match=told) as refusal:
        open_checked(folder)
    assert "\n" not in str(refusal.value)


def test_nan_in_a_mixer_is_found_when_it_is_converted(folder, tmp_path):
    put(folder, lambda held: held[f"{MIXER}share"].fill_(float("nan")))
    with pytest.raises(ModelError, match="NaN"):
        convert(str(folder), (step("linear", layers="2"),), RunOptions(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# What is asked for


def refused(model, error, told, *steps, **more):
    with pytest.raises(error, match=told) as refusal:
        convert(str(model), steps, RunOptions(output=Path("out"), dry_run=True, **more))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def step(name, **options):
    return load(name)(**options)


def test_options_that_make_no_sense_are_refused(tmp_path):
    for name, options, told in (
        ("streaming", {"window": 3}, "--window 3 is smaller than --sinks 4"),
        ("streaming", {"window": 0}, "--window is 0"),
        ("streaming", {}, "--window is needed"),
        ("streaming", {"window": 4, "sinks": -1}, "--sinks is -1"),
        ("linear", {"feature": "relu"}, "--feature is 'relu'"),
        ("linear", {"features": 8}, "--features belongs to --feature t2r"),
        ("linear", {"feature": "elu", "features": 8}, "--features belongs to --feature t2r"),
        ("linear", {"window": -1}, "--window is -1"),
        ("linear", {"keep_softmax": "first"}, "--keep-softmax is 'first'"),
    ):
        with pytest.raises(OptionError, match=told):
            step(name, **options)
    assert step("streaming", window=4).sinks == 4
    assert step("linear", feature="t2r", features=8).features == 8


def test_layers_are_chosen_kept_and_stepped_over(tmp_path):
    config = open_checked(save(tiny("llama", num_hidden_layers=6), tmp_path / "model")).config
    for options, expected in (
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"layers": "0"}, {0}),
        ({"layers": 0}, {0}),
        ({"keep_softmax": "0,-1"}, {1, 2, 3, 4}),
        ({"layers": "0-1/2"}, {0}),
        ({"layers": "0-5/2", "keep_softmax": "2"}, {0, 4}),
        ({"keep_softmax": "1-5/2"}, {0, 2, 4}),
        ({"layers": "1,3-4", "keep_softmax": 4}, {1, 3}),
    ):
        made = step("linear", window=5, **options)
        made.check(config)
        assert made.chosen(config) == expected
        assert {index for index, name in enumerate(names(made.config(config))) if name} == expected


def test_layers_that_are_not_there_and_none_at_all_are_refused(tmp_path):
    model = save(tiny("llama"), tmp_path / "model")
    refused(model, OptionError, "no layer is left to change", step("linear", keep_softmax="0-1"))
    refused(model, OptionError, "no layer is left to change", step("streaming", window=6, layers="0", keep_softmax="0"))
    refused(model, OptionError, "--layers 5 names what is no layer", step("linear", layers="5"))
    refused(model, OptionError, "--keep-softmax 5 names what is no layer", step("linear", keep_softmax="5"))


def test_layers_with_a_window_of_their_own_that_is_no_longer_are_left_alone(tmp_path):
    alternating = open_checked(save(tiny("gemma3_text"), tmp_path / "model")).config  # a window of 8, and none
    for window, expected in ((7, {0, 1}), (8, {1}), (9, {1})):
        assert step("streaming", window=window).chosen(alternating) == expected
    assert step("linear", window=0).chosen(alternating) == {0, 1}
    everywhere = save(tiny("mistral"), tmp_path / "mistral")
    refused(everywhere, OptionError, "a window that is no longer", step("streaming", window=8))


class Smoothed(Mixing):
    """A mixer whose window is of something else than softmax."""

    window: int = 1000

    def parameters(self, config, place=""):
        return {}

    def mix(self, weights, call):
        return call.query


def test_an_option_of_that_name_alone_leaves_no_layer_alone(tmp_path):
    config = open_checked(save(tiny("gemma2"), tmp_path)).config
    assert any(config.windows())
    assert Smoothed().chosen(config) == {0, 1}


def test_a_layer_that_has_a_mixer_gets_no_other(folder):
    for name in ("streaming", "linear"):
        told = refused(folder, OptionError, "layer 0 has streaming in place of its scores already", step(name, window=6))
        assert "--layers" in told
    refused(folder, OptionError, "layer 1 has linear in place of its scores already", step("linear", layers="1,2"))
    model = save(tiny("llama"), folder.parent / "plain")
    refused(model, OptionError, "layer 0 has linear in place of its scores already", step("linear"), step("streaming", window=6))


def test_a_layer_without_one_gets_one(folder):
    out = convert(str(folder), (step("linear", feature="elu", layers="-1"),), RunOptions(output=Path("out"))).output
    config = open_checked(out).config
    assert names(config) == ["streaming", "linear", "linear"]
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_number_of_heads_is_changed_before_mixers_are_put_in(folder):
    for name, groups in (("gqa", 2), ("mqa", None)):
        refused(folder, ModelError, "fits 4 KV heads; change their number first", step(name, **({"groups": groups} if groups else {})))
    grouped = save(converted(tiny("llama", num_key_value_heads=2), ("linear", {"window": 5})), folder.parent / "grouped")
    refused(grouped, ModelError, "fits 2 KV heads; change their number first", step("expand-kv", groups=4))
    model = save(tiny("llama"), folder.parent / "plain")
    characters(model)
    refused(model, ModelError, "fits 4 KV heads; change their number first", step("linear"), step("gqa", groups=2))
    convert(str(model), (step("gqa", groups=2, pool="mean"), step("linear", window=5)), RunOptions(output=Path("out"), tokens=32, context=16))
    assert open_checked(Path("out")).config.kv_heads == 2


def test_capped_scores_are_refused_where_no_feature_map_can_follow_them(tmp_path):
    model = save(tiny("gemma2"), tmp_path / "model")
    assert "streaming" in refused(model, ModelError, "^gemma2 caps its scores", step("linear"))
    convert(str(model), (step("streaming", window=6, sinks=2),), RunOptions(output=Path("out"), dry_run=True))
    uncapped = open_checked(save(tiny("gemma2", attn_logit_softcapping=None), tmp_path / "uncapped")).config
    step("linear").check(uncapped)


def test_an_encoder_has_no_window(tmp_path):
    model = save(tiny("bert"), tmp_path / "model")
    refused(model, OptionError, "--window 6 is for decoders", step("linear", window=6))
    refused(model, ModelError, "bert is an encoder, and streaming", step("streaming", window=6))


def test_there_is_nothing_to_transfer_where_layers_are_those_of_the_original(tmp_path):
    model = save(tiny("llama", num_hidden_layers=3), tmp_path / "model")
    characters(model)
    refused(model, OptionError, "its attention and FFNs have the shapes of the original's", Transfer(teacher=str(model)))
    refused(model, OptionError, "its attention and FFNs have the shapes of the original's", step("prune-layers", drop=1), transfer=True)


def test_the_command_line_says_the_same(command, folder):
    def fails(code, *args):
        result = command(*args, "-o", "out")
        told = one_line(result)
        assert result.exit_code == code
        assert not Path("out").exists()
        return told

    assert "--window 3 is smaller than --sinks 4" in fails(2, "streaming", "--window", 3, folder)
    assert "layer 0 has streaming in place of its scores already" in fails(2, "linear", folder)
    assert "fits 4 KV heads; change their number first" in fails(1, "gqa", "--groups", 2, folder)
    say(folder, mixers({**STREAMING, "options": {"window": 0}}, LINEAR))
    assert "--window is 0" in fails(1, "linear", "--layers", 2, folder)
    assert "--window is 0" in one_line(command("inspect", folder))


def test_what_the_table_says_of_a_model_names_its_mixers(command, folder):
    told = command("inspect", folder)
    assert told.exit_code == 0, told.stderr
    assert "streaming" in told.stdout
    assert "linear" in told.stdout


def test_what_no_memory_holds_of_earlier_tokens_is_refused_before_it_is_asked_for(command, folder, tmp_path):
    plain = save(tiny("llama"), tmp_path / "plain")
    assert "GB are free" in one_line(command("streaming", "--window", 10**12, plain, "-o", "out"))
    say(folder, mixers({**STREAMING, "options": {"window": 10**12}}, LINEAR))
    characters(folder)
    assert "GB are free" in one_line(command("eval", folder, "--tokens", "60", "--context", "20"))


@pytest.mark.parametrize("changes", [{"technique": "retnet", "options": {}}, {"options": {"feature": "elu", "window": 3}}], ids=str)
def test_a_config_that_cannot_be_is_refused_at_transformers_own_door_too(changes, tmp_path):
    _, model = pair("bert", ("linear", {"feature": "elu"}))
    file = save(model, tmp_path) / "config.json"
    written = json.loads(file.read_text())
    written["effconvert"]["replaced"][0].update(changes)
    file.write_text(json.dumps(written))
    with pytest.raises((ModelError, OptionError), match=r"retnet|--window 3"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
