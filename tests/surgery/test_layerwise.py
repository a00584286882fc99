"""A technique that can be confined to some of the layers."""

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.run import convert
from effconvert.errors import OptionError
from effconvert.options import RunOptions
from effconvert.recipe import step
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mqa import Mqa
from effconvert.surgery.mixing.streaming import Streaming
from tests.models import save, tiny

LAYERS = 6
FILE = '''"""Divide keys, values and what goes up by three."""

from effconvert.surgery._surgery import Layerwise


class Third(Layerwise):
    """Divide keys, values and what goes up by three."""

    @classmethod
    def allowed_options(cls, config):
        return "any layers"

    def is_exact(self, config):
        return False

    def config(self, config):
        return config

    def layer(self, layer):
        for part in (*layer.per_kv_head, "up"):
            layer[part] = layer[part] / 3
'''


def _third():
    """Make the class of the file, for tests that need no file."""
    held = {"__name__": "effconvert.surgery.third"}
    exec(FILE, held)
    return held["Third"]


Third = _third()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A llama of six layers."""
    return save(tiny("llama", num_hidden_layers=LAYERS), tmp_path_factory.mktemp("source") / "six")


def changed(source, output, surgery, verify=False):
    """Convert, and return the layers of which a tensor changed, after holding that only those did that should."""
    convert(str(source), (surgery,), RunOptions(output=output, verify=verify))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, output))
    assert before.keys() == after.keys()
    different = {name for name in before if not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))}
    found = {int(name.split(".")[2]) for name in different}
    parts = ("self_attn.k_proj.weight", "self_attn.k_proj.bias", "self_attn.v_proj.weight", "self_attn.v_proj.bias", "mlp.up_proj.weight")
    assert different == {f"model.layers.{index}.{part}" for index in found for part in parts}
    for name in different:
        assert torch.equal(after[name], before[name] / 3)
    return found


CHOICES = {
    None: {0, 1, 2, 3, 4, 5},
    "0": {0},
    "5": {5},
    3: {3},
    0: {0},
    "-1": {5},
    -1: {5},
    "-6": {0},
    "0-2": {0, 1, 2},
    "2-2": {2},
    "0-5": {0, 1, 2, 3, 4, 5},
    "-3-5": {3, 4, 5},  # from the third from the end to layer 5
    "-3-4": {3, 4},
    "0,2,-1": {0, 2, 5},
    "1-2,2-3,1": {1, 2, 3},
    "4,0-1": {0, 1, 4},
    "00": {0},
    "-1,-2": {4, 5},
}


@pytest.mark.parametrize("layers", CHOICES, ids=repr)
def test_the_layers_that_are_named_are_chosen(layers, source):
    assert Third(layers=layers).chosen(open_checkpoint(source).config) == CHOICES[layers]


@pytest.mark.parametrize("layers", [None, "-1", "1-2,4"], ids=repr)
def test_the_bytes_of_the_chosen_layers_alone_change(layers, source, tmp_path):
    assert changed(source, tmp_path / "out", Third(layers=layers)) == CHOICES.get(layers, {1, 2, 4})


def test_layers_of_a_chain_are_counted_in_what_the_step_before_left(source, tmp_path):
    convert(str(source), (Third(layers="0-1"), Third(layers="1-2")), RunOptions(output=tmp_path / "out", verify=False))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    for index, times in enumerate((1, 2, 1, 0, 0, 0)):
        name = f"model.layers.{index}.mlp.up_proj.weight"
        expected = before[name]
        for _ in range(times):
            expected = expected / 3
        assert torch.equal(after[name], expected)


@pytest.mark.parametrize("layers", ["6", "-7", "0-6", "-1-3", "0,9", "99999999999999999999", "-1-0", 6, -7], ids=repr)
def test_layers_that_are_not_there_are_refused(layers, source, tmp_path):
    with pytest.raises(OptionError, match=rf"--layers {layers} names what is no layer of this model: it has 6, from 0 to 5"):
        convert(str(source), (Third(layers=layers),), RunOptions(output=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", ["3-2", "5-0", "0,4-1"])
def test_layers_that_run_backwards_are_refused_as_that(layers, source, tmp_path):
    with pytest.raises(OptionError, match=rf"--layers {layers.split(',')[-1]} runs backwards; write the lower number first"):
        convert(str(source), (Third(layers=layers),), RunOptions(output=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "layers", ["", "all", "1-", "-", "1,,2", "1, 2", "--1", "-3--1", "1;2", "0-1-2", ",1", "1,", "1\n", 1.5, True, False, [1.5], {"a": 1}], ids=repr
)
def test_what_names_no_layers_is_refused_by_its_value(layers):
    with pytest.raises(OptionError, match=r"^--layers is "):
        Third(layers=layers)
    with pytest.raises(OptionError, match=r"^a step \(streaming\): layers is ") as caught:
        step({"streaming": {"window": 6, "layers": layers}}, "a step")
    assert len(str(caught.value).splitlines()) == 1


def test_a_whole_number_in_yaml_is_a_layer():
    for text, layers in (("3", "3"), ("-1", "-1"), ("0-3", "0-3"), ("'0,2'", "0,2"), ("null", None)):
        assert step(yaml.safe_load(f"streaming: {{window: 6, layers: {text}}}"), "a step") == Streaming(window=6, layers=layers)


def test_layers_survive_being_written_down_and_read_again():
    for layers in (None, "0-3", "-1", 2):
        made = Streaming(window=6, layers=layers)
        assert step(made.recipe, "a step") == made
    assert Streaming(window=6, layers="1").recipe["streaming"]["layers"] == "1"


@pytest.mark.parametrize("kind", [Gqa, Mqa])
def test_a_technique_for_all_layers_says_why_it_takes_no_layers(kind):
    options = {"groups": 2} if kind is Gqa else {}
    with pytest.raises(OptionError, match=r"^this technique changes all layers alike, since config.json says it once for all of them; leave out --layers$"):
        kind(**options, layers="0-1")


def test_one_file_is_a_command(source, with_technique):
    run = with_technique("third", FILE)
    assert "third             Divide keys, values and what goes up by three." in " ".join(run("--help").stdout.split("\n"))
    assert "--layers LAYERS" in run("third", "--help").stdout
    done = run("third", source, "--layers", "-1", "-o", "out", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert "third --layers -1" in done.stdout
    before, after = (load_file(folder / "model.safetensors") for folder in (source, Path("out")))
    assert {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])} == {"5"}


def test_layers_are_an_option_like_others_and_frozen():
    assert "layers" in Third.model_fields
    with pytest.raises(ValidationError, match="frozen"):
        Third(layers="1").layers = "2"
