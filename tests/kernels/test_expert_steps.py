"""Which models compute the experts of a decoding step by our function, that logits stay as they are, and what is said where no kernel runs."""

import copy

import pytest
import torch

pytest.importorskip("triton")

from effconvert.kernels import experts as operation
from effconvert.modeling import experts
from effconvert.modeling.experts import NAME, choose_experts
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


def test_in_a_class_of_ours_too(calls):
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


def test_generation_and_saving_know_nothing_of_it(calls, tmp_path):
    model = tiny("qwen2_moe")
    expected = model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False)
    choose_experts(model, "auto")
    assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False), expected)
    assert set(calls) == {("reference", 1)}
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


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
    assert not calls


def test_what_a_kernel_does_not_cover(calls):
    """An activation that it does not know: an error where kernels are asked for, and else transformers' function."""
    model, ids = tiny("mixtral", hidden_act="relu2"), tokens(1, 3)
    with torch.no_grad():
        expected = model(ids[:, :1]).logits
        choose_experts(model, "auto")
        assert torch.equal(model(ids[:, :1]).logits, expected)
        assert not calls
        choose_experts(model, "triton")
        with pytest.raises(ValueError, match="that of experts does not cover this call: activation is None"):
            model(ids)
