"""Gated FFNs made from ungated ones: the same logits, or nearly, and a new projection that learns."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.options import RunOptions
from effconvert.surgery.ffn.glu import LEAST_SQUARES, Glu
from effconvert.surgery.width.narrow import Narrow
from tests.heal.healing import opened
from tests.models import logits, save, tiny

KEYS = {"gpt2": "activation_function", "gptj": "activation_function", "distilbert": "activation", "falcon": "activation"}


def to(step, place="out"):
    return convert("model", (step,), RunOptions(output=place, verify=False))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi", "starcoder2", "distilbert", "falcon"])
@pytest.mark.parametrize(
    ("act", "name"), [("gelu", "geglu"), ("gelu_new", "geglu"), ("relu", "reglu"), ("relu2", "reglu"), ("silu", "swiglu"), ("quick_gelu", "swiglu")]
)
def test_the_same_activation_changes_no_logit(kind, act, name):
    if kind == "distilbert" and act not in ("gelu", "relu"):
        pytest.skip("its class has two activations")
    model = tiny(kind, **{KEYS.get(kind, "hidden_act"): act})
    save(model, Path("model"))
    outcome = to(Glu(activation=name))
    assert outcome.plan.is_exact
    expected, found = logits(model), logits(opened())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert outcome.plan.after.parameters - outcome.plan.before.parameters >= 2 * 32 * 48


@pytest.mark.parametrize("kind", ["nemotron", "arcee"])
def test_squared_relu_is_a_reglu(kind):
    model = tiny(kind)
    save(model, Path("model"))
    to(Glu(activation="reglu"))
    expected = logits(model)
    assert (logits(opened()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_slope_of_swiglu_is_that_of_least_squares():
    values = torch.linspace(-10, 10, 20001).double()
    likely, gelu = (-values.square() / 2).exp(), functional.gelu(values)

    def error(slope):
        return float((likely * (gelu - values * torch.sigmoid(slope * values)).square()).sum())

    assert error(LEAST_SQUARES) < min(error(LEAST_SQUARES - 0.005), error(LEAST_SQUARES + 0.005))
    assert (gelu - values * torch.sigmoid(LEAST_SQUARES * values)).abs().max() < 0.020


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_swiglu_of_gelu_is_within_its_bound(act):
    model = tiny("gpt2", activation_function=act)
    save(model, Path("model"))
    outcome = to(Glu(activation="swiglu"))
    assert not outcome.plan.is_exact
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    for old, new in zip(model.transformer.h, opened().transformer.h, strict=True):
        errors = (new.mlp(hidden) - old.mlp(hidden)).abs()
        assert errors.max() > 0
        assert (errors <= 0.020 * old.mlp.c_proj.weight.abs().sum(0)).all()  # each neuron's error, times what it writes
    assert (logits(opened()) - logits(model)).abs().mean() < 0.05 * logits(model).std()


@pytest.mark.parametrize("name", ["geglu", "swiglu"])
def test_the_new_projection_gets_gradients_at_once(name):
    save(tiny("gpt2"), Path("model"))
    to(Glu(activation=name))
    model = opened().train()
    model(torch.arange(3, 12)[None]).logits.square().mean().backward()
    for layer in model.transformer.h:
        grads = {part: parameter.grad.abs().sum() for part, parameter in layer.mlp.effconvert.named_parameters()}
        assert set(grads) == {"gate", "gate_bias", "up", "up_bias", "down", "down_bias"}
        assert all(grads.values())


def test_some_layers_alone_and_the_form_of_gelu_is_kept():
    save(tiny("gpt2"), Path("model"))
    to(Glu(activation="geglu", layers="1"))
    assert json.loads(Path("out/config.json").read_text())["effconvert"]["replaced"][0]["options"] == {"activation": "geglu", "form": "tanh"}
    assert {name.split(".")[2] for name, _ in opened().named_parameters() if ".effconvert." in name} == {"1"}
    outcome = to(Glu(activation="geglu", form="erf"), place="other")
    assert not outcome.plan.is_exact
    assert 0 < (logits(opened("other")) - logits(opened())).abs().max() < 0.01


def test_what_does_not_fit_is_refused():
    save(tiny("gpt2"), Path("model"))
    with pytest.raises(OptionError, match=r"--activation reglu is not like the gelu_new of this gpt2; give --activation geglu or --activation swiglu"):
        to(Glu(activation="reglu"))
    with pytest.raises(OptionError, match="--form erf is of GELU, and --activation swiglu has none; leave it out"):
        to(Glu(activation="swiglu", form="erf"))
    to(Glu(activation="geglu"), place="once")
    with pytest.raises(ModelError, match="glu stands in place of its ffn"):
        convert("once", (Narrow(ffn=24),), RunOptions(output="out"))
    for kind, told in {
        "llama": "llama has a gate in its FFN already",
        "mixtral": "mixtral has experts in place of an FFN",
        "bert": "a layer of bert has no module of its own for ffn",
        "opt": "a layer of opt has no module of its own for ffn",
        "apertus": "apertus computes xielu in its FFN",
    }.items():
        save(tiny(kind), Path(kind))
        with pytest.raises(ModelError, match=told):
            convert(kind, (Glu(activation="geglu"),), RunOptions(output="out"))
    assert not Path("out").exists()
