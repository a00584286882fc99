"""Which models compute the experts of a decoding step by our function, that logits stay as they are, and what is said where no kernel runs."""

import copy
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from effconvert.kernels import experts as operation
from effconvert.modeling import experts
from effconvert.modeling.experts import OURS, choose_experts
from effconvert.modeling.model import config_class, model_class
from effconvert.steps import load
from tests.mixers.mixing import SAME, far, in_pieces, stock_config, tokens
from tests.models import tiny

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "olmoe", "granitemoe")
SIZES = (20, 1, 3, 1)  # tokens of a text at a time: the first of them are more than a step has


@pytest.fixture
def calls(monkeypatch):
    """Kernels run on this machine where they are asked for, in the interpreter; the list has how many tokens each call has, by what."""
    found, kernel, reference = [], operation.experts, experts.experts_reference
    monkeypatch.setattr(operation, "experts", lambda hidden, *given: found.append(("kernel", len(hidden))) or kernel(hidden, *given))
    monkeypatch.setattr(experts, "experts_reference", lambda hidden, *given: found.append(("reference", len(hidden))) or reference(hidden, *given))
    monkeypatch.setattr(experts, "runs_triton", lambda device, name, asked: asked == "triton")
    return found


def sparse_layers(model):
    return sum(experts.experts_by(module) is not None for module in model.modules())


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, calls):
    model, ids = tiny(kind), tokens(1, sum(SIZES))
    before, layers = model.config._experts_implementation, sparse_layers(model)
    assert layers
    with torch.no_grad():
        expected, _ = in_pieces(model, ids, SIZES)
        for kernels, counts in (("auto", [("reference", 1)] * 2), ("triton", [("kernel", 1), ("kernel", 3), ("kernel", 1)])):
            calls.clear()
            choose_experts(model, kernels)
            found, _ = in_pieces(model, ids, SIZES)
            assert far(found, expected) <= SAME
            assert calls == [count for count in counts for _ in range(layers)]
        calls.clear()
        choose_experts(model, "reference")
        assert model.config._experts_implementation == before
        assert torch.equal(in_pieces(model, ids, SIZES)[0], expected)
        assert not calls


@pytest.mark.slow
def test_in_a_class_of_ours_too(calls, tmp_path):
    config = load("streaming")(window=8, sinks=2).config(stock_config(tiny("mixtral")))
    model = model_class("MixtralForCausalLM")(config_class("mixtral").from_dict(config.content)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
        expected, _ = in_pieces(model, tokens(1, 12), (10, 1, 1))
        choose_experts(model, "auto")
        assert far(in_pieces(model, tokens(1, 12), (10, 1, 1))[0], expected) <= SAME
        assert set(calls) == {("reference", 1)}
        assert far(in_pieces(copy.deepcopy(model), tokens(1, 12), (10, 1, 1))[0], expected) <= SAME
    model.save_pretrained(tmp_path)
    code = "import effconvert; from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('.').config._experts_implementation)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["grouped_mm"]  # as of a stock class, where no stock class has been asked before


def test_generation_and_saving_know_nothing_of_it(calls, tmp_path):
    model = tiny("qwen2_moe")
    expected = model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False)
    choose_experts(model, "auto")
    assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False), expected)
    assert set(calls) == {("reference", 1)}
    model.save_pretrained(tmp_path)
    assert OURS not in (tmp_path / "config.json").read_text()


def test_gradients_go_through_transformers_function(calls):
    model, ids = tiny("mixtral"), tokens(1, 1)
    choose_experts(model, "auto")
    model(ids).logits.sum().backward()
    assert not calls
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_eager_experts_and_dense_models_stay(calls):
    eager, dense = tiny("mixtral"), tiny("llama")
    eager.set_experts_implementation("eager")
    for model, name in ((eager, "eager"), (dense, dense.config._experts_implementation)):
        choose_experts(model, "auto")
        assert model.config._experts_implementation == name
    with pytest.raises(ValueError, match="its experts are computed by eager"):
        choose_experts(eager, "triton")
    assert not calls


def test_a_model_that_is_made_from_its_config_computes_as_transformers_does(calls):
    model, ids = tiny("mixtral"), tokens(1, 1)
    choose_experts(model, "auto")
    other = type(model)(model.config).eval()
    with torch.no_grad():
        found = other(ids).logits
        assert not calls
        choose_experts(other, "reference")
        assert torch.equal(other(ids).logits, found)


@pytest.mark.parametrize("variable", ["reference", "auto"])
def test_the_variable_says_it_too(variable, calls, monkeypatch):
    model, ids = tiny("mixtral"), tokens(1, 1)
    choose_experts(model, "auto")
    monkeypatch.setenv("EFFCONVERT_KERNELS", variable)
    choose_experts(model, "auto")
    with torch.no_grad():
        model(ids)
    assert bool(calls) == (variable == "auto")


def test_what_a_kernel_does_not_cover(calls, monkeypatch):
    """Another gate, too many experts, or two types: an error where kernels are asked for, and else a warning and transformers' function."""
    cases = [({"hidden_act": "relu2"}, "another gate than silu"), ({"num_experts": 65}, "it has 65 experts, and it should have at most 64")]
    for changes, why in cases:
        model, ids = tiny("mixtral", **changes), tokens(1, 1)
        with torch.no_grad():
            expected = model(ids).logits
            with pytest.raises(ValueError, match=f"that of experts does not cover this call: .*{why}"):
                choose_experts(model, "triton")
            choose_experts(model, "auto")
            assert far(model(ids).logits, expected) <= SAME
        assert bool(calls) == ("num_experts" in changes)  # for a CPU there may be any number
        calls.clear()
    model = tiny("mixtral")
    choose_experts(model, "triton")
    monkeypatch.setattr(experts, "runs_triton", lambda *_: True)
    module = next(module for module in model.modules() if experts.experts_by(module))
    module.kernels = "auto"  # as on a card that the kernel was measured on
    hidden, chosen, weights = torch.randn(2, 32), torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2)
    with torch.no_grad():
        expected = module(hidden, chosen, weights)
        assert calls.pop() == ("kernel", 2)
        module.to(torch.bfloat16)  # transformers casts the rows to it
        with pytest.warns(UserWarning, match="experts runs its reference: gate_up is torch.bfloat16, and hidden torch.float32"):
            found = module(hidden, chosen, weights)
    assert not calls
    assert far(found.float(), expected) < 0.05


def test_autocast_is_left_to_transformers(calls):
    model, ids = tiny("mixtral"), tokens(1, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        choose_experts(model, "auto")
        assert torch.equal(model(ids).logits, expected)
    assert not calls
