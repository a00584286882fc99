"""A technique for each place is one short file: examples are put beside the others, converted, opened by transformers, run, saved and healed."""

from pathlib import Path

import pytest
import torch
import transformers

import effconvert.surgery
from effconvert import steps
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.options import RunOptions
from effconvert.recipe import step
from tests.mixers.mixing import AS_OTHERS
from tests.models import characters, heed_caps, logits, on_disk, save, tiny

FOLDER = Path(__file__).parent / "examples"
EXACT = {  # options at which no logit may change, and families
    "softer-scores": ({}, ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "gemma3_text"]),
    "gated-ffn": ({}, ["llama", "gemma2", "phi3", "gpt2", "gpt_neox", "distilbert", "modernbert"]),
    "blended-layer": ({}, [kind for kind in FAMILIES if kind not in ("mistral", *AS_OTHERS)]),
    "thin-projection": ({"rank": 32}, ["llama", "cohere", "opt", "bert", "distilbert", "gpt_neox"]),
    "as-mistral": ({}, ["llama"]),
}
CHANGING = {
    "mean-attention": ({}, ["bert", "roberta", "distilbert", "modernbert"]),
    "thin-projection": ({"rank": 3}, ["qwen2", "gpt_neox", "bert"]),
    "every-second-layer": ({}, ["llama", "gemma2", "gpt2", "bert", "modernbert"]),
    "scaled-embedding": ({"factor": 2}, ["llama", "gpt2"]),
    "lent-cache": ({}, ["llama", "qwen3", "cohere"]),
    "shared-ffn": ({}, ["llama", "gemma2", "phi3", "gpt2", "opt", "bert", "modernbert"]),
}


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.setattr(effconvert.surgery, "__path__", [*effconvert.surgery.__path__, str(FOLDER)])


def source(kind, folder):
    changes = {} if FAMILIES[kind].transposed or "mlp_bias" not in tiny(kind).config.to_dict() else {"mlp_bias": False, "attention_bias": False}
    return save(tiny(kind, **changes), folder / "source")


def opened(folder):
    kind = transformers.AutoConfig.from_pretrained(folder).model_type.removeprefix("effconvert_")
    auto = transformers.AutoModelForCausalLM if FAMILIES[kind].decoder else transformers.AutoModelForMaskedLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return heed_caps(model.eval())


@pytest.mark.parametrize("file", sorted(FOLDER.glob("[a-z]*.py")), ids=lambda file: file.stem)
def test_an_example_is_short(file):
    assert len([line for line in file.read_text().splitlines() if line]) <= 40
    assert file.stem.replace("_", "-") in {**EXACT, **CHANGING}
    assert steps.techniques()[file.stem.replace("_", "-")] == file.read_text().splitlines()[0].strip('"')


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in EXACT.items() for kind in kinds])
def test_neutral_options_change_no_logit(name, kind, tmp_path):
    folder = source(kind, tmp_path)
    outcome = convert(str(folder), (step({name: EXACT[name][0]}, "step"),), RunOptions(output=tmp_path / "out"))
    assert outcome.report.difference is not None
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(opened(folder)), rtol=1e-4, atol=1e-5)


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in CHANGING.items() for kind in kinds])
def test_what_changes_something_is_written_opened_and_saved_again(name, kind, tmp_path):
    folder = source(kind, tmp_path)
    outcome = convert(str(folder), (step({name: CHANGING[name][0]}, "step"),), RunOptions(output=tmp_path / "out"))
    model = opened(tmp_path / "out")
    assert outcome.plan.after.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert logits(model).shape == logits(opened(folder)).shape
    assert not torch.allclose(logits(model), logits(opened(folder)), rtol=1e-3)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(opened(tmp_path / "again")), logits(model))
    model.train()(torch.arange(3, 12)[None]).logits.square().mean().backward()
    own = {name: parameter for name, parameter in model.named_parameters() if ".effconvert." in name}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in own.values())


HEALED = {  # what the plan says of refitting and training each, by its place
    "gated-ffn": (
        "llama",
        "nothing makes up for gated-ffn in place of their ffn: attention is refitted where it differs from the original's, and else nothing is; use transfer",
        "trains the 2 layers that have gated-ffn in place of their ffn, and what else has other shapes than the original's",
    ),
    "softer-scores": (
        "llama",
        "in layers with a mixer only the output projection is refitted; transfer does more",
        "trains the 2 layers that have a mixer, and what else has other shapes than the original's",
    ),
    "mean-attention": (
        "modernbert",
        "in layers with mean-attention in place of their attention only the MLP's output projection is refitted; transfer does more",
        "trains the 2 layers that have mean-attention in place of their attention, and what else has other shapes than the original's",
    ),
}


@pytest.mark.parametrize("name", HEALED)
def test_the_plan_says_what_healing_does_at_a_place(name, tmp_path):
    kind, refitted, trained = HEALED[name]
    notes = plan(open_checkpoint(source(kind, tmp_path)), (step({name: {}}, "step"), Transfer(), Refit())).notes
    assert {f"transfer: {trained}", f"refit: {refitted}"} <= {*notes}


@pytest.mark.parametrize(("places", "changed"), [(("gate",), set()), (("q",), {"v", "o"}), (("v",), {"q", "o"})])
def test_refit_leaves_alone_what_a_technique_runs_in_place_of(places, changed, tmp_path, monkeypatch):
    monkeypatch.setattr(steps.load("thin-projection"), "places", lambda self, config: places)
    monkeypatch.setattr(steps.load("thin-projection"), "drops", places)
    folder, thin = source("llama", tmp_path), (step({"thin-projection": {"rank": 4}}, "step"),)
    text = characters(folder)
    for name, refit in (("plain", False), ("refitted", True)):
        convert(str(folder), thin, RunOptions(output=tmp_path / name, refit=refit, verify=False, calibrate=str(text), calibration_tokens=512))
    plain, refitted = on_disk(tmp_path / "plain"), on_disk(tmp_path / "refitted")
    assert plain.keys() == refitted.keys()
    found = {name.split(".")[-2].removesuffix("_proj") for name in plain if not torch.equal(plain[name], refitted[name])}
    assert found <= changed
    assert bool(found) == bool(changed)


@pytest.mark.parametrize("name", ["every-second-layer", "shared-ffn", "lent-cache"])
def test_an_odd_last_layer_is_left_alone(name, tmp_path):
    planned = plan(open_checkpoint(save(tiny("llama", num_hidden_layers=3), tmp_path / "source")), (step({name: {}}, "step"),))
    assert planned.config.layers == (2 if name == "every-second-layer" else 3)
    assert [record.layers for record in planned.config.shared] == ([] if name == "every-second-layer" else [(0, 1)])


def test_several_places_of_one_layer(tmp_path):
    folder = source("llama", tmp_path)
    chain = [step(given, "step") for given in ({"softer-scores": {"layers": "0"}}, {"gated-ffn": {}}, {"thin-projection": {"rank": 32, "layers": "1"}})]
    with pytest.raises(OptionError, match=r"layer 1 has gated-ffn in place of its ffn already"):
        convert(str(folder), tuple(chain), RunOptions(output=tmp_path / "out"))
    outcome = convert(str(folder), (chain[0], step({"gated-ffn": {"layers": "0"}}, "step"), chain[2]), RunOptions(output=tmp_path / "out"))
    assert [(record.technique, record.place, record.layers) for record in outcome.plan.config.replaced] == [
        ("softer-scores", "scores", (0,)),
        ("gated-ffn", "ffn", (0,)),
        ("thin-projection", "up", (1,)),
        ("thin-projection", "down", (1,)),
    ]
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(opened(folder)), rtol=1e-4, atol=1e-5)
    again = convert(str(tmp_path / "out"), (step({"gqa": {"groups": 4}}, "step"),), RunOptions(output=tmp_path / "same"))
    assert again.plan.config == outcome.plan.config


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("gated-ffn", "bert", "a layer of bert has no module of its own for ffn"),
        ("gated-ffn", "opt", "a layer of opt has no module of its own for ffn"),
        ("mean-attention", "llama", "llama is a decoder, and mean-attention sees later tokens"),
        ("thin-projection", "phi3", "phi3 holds gate, up in one module, so up alone cannot be replaced"),
    ],
)
def test_a_family_without_such_a_place_is_refused_with_the_reason(name, kind, told, tmp_path):
    options = {"rank": 2} if name == "thin-projection" else {}
    with pytest.raises(ModelError, match=told):
        convert(str(source(kind, tmp_path)), (step({name: options}, "step"),), RunOptions(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_layers_with_different_parameters_are_looked_at_one_after_the_other(tmp_path):
    """What layer 0 needs says nothing of layer 1: a second step that looks finds each layer with its own tensors."""
    folder = source("llama", tmp_path)
    text = characters(folder)
    chain = (step({"thin-projection": {"rank": 8, "layers": "0"}}, "step"), step({"retnet": {"layers": "1"}}, "step"), step("refit", "step"))
    outcome = convert(str(folder), chain, RunOptions(output=tmp_path / "out", verify=False, calibrate=str(text), calibration_tokens=512))
    assert {name for shard in outcome.plan.shards.values() for name in (target.name for target in shard) if ".effconvert." in name} == {
        *(f"model.layers.0.mlp.{part}_proj.effconvert.{name}" for part in ("up", "down") for name in ("left", "right")),
        *(f"model.layers.1.self_attn.effconvert.{name}" for name in ("decay", "gain", "gate", "gate_bias")),
    }
    opened(tmp_path / "out")


def test_a_technique_that_claims_to_be_somewhere_else_is_refused(tmp_path):
    folder = source("llama", tmp_path)
    convert(str(folder), (step("gated-ffn", "step"),), RunOptions(output=tmp_path / "out", verify=False))
    file = tmp_path / "out/config.json"
    good = file.read_text()
    for before, after, told in (
        ('"place": "ffn"', '"place": "attention"', "it runs at ffn|mlp.effconvert.gain, for which its config.json has no place"),
        ('"technique": "gated-ffn"', '"technique": "gqa"', "gqa replaces nothing"),
        ('"place": "ffn"', '"place": "nowhere"', "there is no place 'nowhere'"),
    ):
        assert before in good
        file.write_text(good.replace(before, after))
        with pytest.raises(EffconvertError, match=told):
            convert(str(tmp_path / "out"), (step({"gqa": {"groups": 4}}, "step"),), RunOptions(output=tmp_path / "same", verify=False))
