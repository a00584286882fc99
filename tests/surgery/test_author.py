"""Mistakes of a technique's author: each is a sentence in the plan that names the technique, and a broken file takes nothing else with it."""

import pytest
import torch

import effconvert.surgery
from effconvert import steps
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.inspection import BROKEN, inspect
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, TechniqueError
from effconvert.surgery._replacement import Replacement
from effconvert.surgery._surgery import Surgery
from tests.models import save, tiny


class Gain(Replacement):
    """Multiply what is at a place by a gain."""

    place = "ffn"

    def parameters(self, config, place=""):
        return {"gain": (config.hidden,)}

    def initial_values(self, config, index, place=""):
        return {"gain": torch.ones(config.hidden)}

    def forward(self, weights, hidden, context):
        return weights["gain"] * context.original(hidden)


MISTAKES = {
    "no first value": (
        {"initial_values": lambda self, config, index, place="": {}},
        "test-author has a parameter 'gain' at ffn, and its `initial_values` gives no value for it",
    ),
    "no initial_values": ({"initial_values": Replacement.initial_values}, "'gain' at ffn, and its `initial_values` gives no value for it"),
    "unfitted": (
        {"initial_values": Replacement.initial_values, "needs_calibration": lambda self, config: True},
        "'gain' at ffn, and its `initial_values` gives no value for it",
    ),
    "other name": (
        {"initial_values": lambda self, config, index, place="": {"gain": torch.ones(config.hidden), "gian": torch.ones(1)}},
        "test-author gives a value for 'gian' in `initial_values`, and its `parameters` has none of that name at ffn",
    ),
    "other shape": (
        {"initial_values": lambda self, config, index, place="": {"gain": torch.ones(config.hidden, 1)}},
        "test-author has a parameter 'gain' at ffn that is 32 by `parameters` and 32 x 1 by `initial_values`",
    ),
    "other shape in values": (
        {"values": lambda self, layer, place: {"gain": torch.empty((), device="meta")}},
        "32 by `parameters` and a single number by `values`",
    ),
    "other name in values": ({"values": lambda self, layer, place: {"gian": torch.empty(32, device="meta")}}, "`values` gives no value for it"),
    "no forward": ({"forward": Replacement.forward}, "test-author has no `forward`, which would run in place of ffn"),
    "no mixer": ({"place": "scores"}, "test-author runs at scores without a mixer"),
    "no part": ({"drops": ("up", "dwon")}, "test-author drops 'dwon', which is no part of a layer; the parts of llama are q, k, v, o, .*gate, up, down"),
    "no place": ({"place": ""}, "test-author runs at '', and there is no such place; its author can choose from layer, attention, ffn, scores"),
    "unknown place": ({"place": "mlp"}, "test-author runs at 'mlp', and there is no such place"),
}


@pytest.fixture(scope="module")
def llama_checkpoint(tmp_path_factory):
    return open_checkpoint(save(tiny("llama"), tmp_path_factory.mktemp("source") / "llama"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_in_the_plan(mistake, llama_checkpoint):
    changes, sentence = MISTAKES[mistake]
    wrong = type("Wrong", (Gain,), {"__module__": __name__, "__doc__": "Wrong.", **changes})
    plan(llama_checkpoint, (Gain(),))
    with pytest.raises(TechniqueError, match=sentence):
        plan(llama_checkpoint, (wrong(layers="1"),))


def test_parts_of_other_families_may_be_dropped(llama_checkpoint):
    """A technique for several families names the parts of all."""
    several = type("Several", (Gain,), {"__module__": __name__, "__doc__": "Several.", "drops": ("q_norm", "gate", "up", "down")})
    assert plan(llama_checkpoint, (several(),)).config.replaced[0].drops == ("q_norm", "gate", "up", "down")


def test_first_values_may_differ_by_place(llama_checkpoint):
    def shapes(self, config, place=""):
        return {"gain": (config.matrices[place][0],)}

    changes = {
        "places": lambda self, config: ("up", "down"),
        "parameters": shapes,
        "initial_values": lambda self, config, index, place="": {"gain": torch.ones(shapes(self, config, place)["gain"])},
    }
    several = type("Several", (Gain,), {"__module__": __name__, "__doc__": "Several.", **changes})
    planned = plan(llama_checkpoint, (several(),))
    assert {target.name: target.shape for target in planned.targets if "layers.0" in target.name and "effconvert" in target.name} == {
        "model.layers.0.mlp.up_proj.effconvert.gain": (48,),
        "model.layers.0.mlp.down_proj.effconvert.gain": (32,),
    }


def test_a_step_says_what_it_allows_without_a_line_of_its_own(llama_checkpoint):
    class Plain(Surgery):
        """Do nothing."""

        def check(self, config):
            config.become("mistral")

        def is_exact(self, config):
            return True

        def config(self, config):
            return config

    class Rank(Plain):
        """Do nothing, by a rank."""

        rank: int

    config = llama_checkpoint.config.with_keys({"attention_bias": False, "mlp_bias": False})
    assert (Plain.allowed_options(config), Rank.allowed_options(config)) == ("as it is", "--rank N")
    with pytest.raises(ModelError, match="mlp_bias"):
        Plain.allowed_options(config.with_keys({"mlp_bias": True}))


FILES = {
    "broken_none": ('"""Do nothing."""\n', "TypeError: it must define one class derived from Surgery or Healing, and defines 0"),
    "broken_import": ('"""Do nothing."""\nimport no_such_package\n', "ModuleNotFoundError: No module named 'no_such_package'"),
    "broken_syntax": ('"""Do nothing."""\nclass\n', "SyntaxError: invalid syntax (broken_syntax.py, line 2)"),
    "broken_lacking": (
        '"""Do nothing."""\nfrom effconvert.surgery._surgery import Surgery\nclass Nothing(Surgery):\n    """Do nothing."""\n',
        "TypeError: its class Nothing lacks check, config, is_exact",
    ),
}


def test_a_broken_file_is_named_and_the_others_are_inspected(llama_checkpoint, tmp_path, monkeypatch, command):
    before = inspect(llama_checkpoint)
    assert not [reason for reason in before.refusals.values() if BROKEN in reason]
    monkeypatch.setattr(effconvert.surgery, "__path__", [*effconvert.surgery.__path__, str(tmp_path)])
    for name, (text, _) in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    seen = inspect(llama_checkpoint)
    assert seen.allowed_options == before.allowed_options
    for name, (_, sentence) in FILES.items():
        path = tmp_path / f"{name}.py"
        assert seen.refusals[name.replace("_", "-")] == f"{BROKEN}: {path} cannot be used: {sentence}"
        with pytest.raises(TechniqueError, match=path.name):
            steps.load(name.replace("_", "-"))
    told = command("broken-none", "model")
    assert (told.exit_code, told.stderr) == (1, f"Error: {tmp_path / 'broken_none.py'} cannot be used: {FILES['broken_none'][1]}\n")
    assert "its file is broken" in command("inspect", llama_checkpoint.folder).stdout


def test_a_technique_that_fails_when_it_is_asked_is_named(llama_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(effconvert.surgery, "__path__", [*effconvert.surgery.__path__, str(tmp_path)])
    (tmp_path / "broken_check.py").write_text(
        '"""Do nothing."""\nfrom effconvert.surgery._surgery import Surgery\nclass Nothing(Surgery):\n    """Do nothing."""\n'
        "    def check(self, config):\n        config.no_such\n    is_exact = config = check\n"
    )
    reason = inspect(llama_checkpoint).refusals["broken-check"]
    assert reason.startswith(f"{BROKEN}: broken-check fails with AttributeError")
