"""Which parts of a model decode by the kernel, that logits stay as they are, and what is said where no kernel runs."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

pytest.importorskip("triton")

import effconvert
from effconvert.errors import OptionError
from effconvert.eval.speed.bench import bench
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.kernels import choice
from effconvert.kernels import decode_attention as operation
from effconvert.modeling import attention, decoding
from effconvert.modeling.attention import choose
from effconvert.modeling.model import config_class, model_class
from effconvert.steps import load
from effconvert.surgery.mixing import _call
from tests.mixers.mixing import SAME, far, in_pieces, positions, stock_config, tokens, with_cache
from tests.models import heed_caps, save, tiny

CPU = torch.device("cpu")
SIZES = (8, 1, 2, 1)  # tokens at a time: at the single ones some sinks are still in the window, and none is
NARROW = ("narrow-kv", {"latents": "4+11"})
STREAMING = ("streaming", {"window": 8, "sinks": 3})
MODELS = {  # family, steps, changes to the config
    "gqa": ("llama", [], {"num_key_value_heads": 2}),
    "gqa in a class of ours": ("gpt_neox", [("gqa", {"groups": 2})], {}),
    "windows and soft-caps": ("gemma2", [], {"num_key_value_heads": 1}),
    "share-kv": ("llama", [("share-kv", {"layers": "1"})], {"num_key_value_heads": 2}),
    "narrow-kv": ("llama", [NARROW], {}),
    "streaming": ("llama", [STREAMING], {"num_key_value_heads": 2}),
    "streaming without RoPE": ("opt", [STREAMING], {}),
    "some layers": ("gemma2", [("streaming", {**STREAMING[1], "layers": "1"})], {}),
}


def made(name):
    """The model with random parameters."""
    kind, steps, changes = MODELS[name]
    model = tiny(kind, **changes)
    if not steps:
        return model
    config = stock_config(model)
    for technique, options in steps:
        config = load(technique)(**options).config(config)
    result = heed_caps(model_class(type(model).__name__)(config_class(kind).from_dict(config.content)).eval())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, parameter in sorted(result.named_parameters()):
            parameter.copy_(torch.arange(len(parameter)) if own.endswith("pairs") else 0.2 * torch.randn(parameter.shape, generator=draw))
    return result


@pytest.fixture
def calls(monkeypatch):
    """Kernels run on this machine, in the interpreter; the list has the shapes of queries and keys of each call."""
    found, real = [], operation.decode_attention

    def counted(query, key, *given, **more):
        found.append((tuple(query.shape), tuple(key.shape)))
        return real(query, key, *given, **more)

    monkeypatch.setattr(operation, "decode_attention", counted)
    for file in (attention, decoding, _call):
        monkeypatch.setattr(file, "runs_triton", lambda device, name, asked: asked == "triton")
    return found


@pytest.mark.few(4)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_reference(name, calls):
    model, ids, mask = made(name), tokens(2, sum(SIZES)), torch.ones(2, sum(SIZES), dtype=torch.long)
    mask[1, :4] = 0
    expected, _ = in_pieces(model, ids, SIZES, mask, **positions(model, mask))
    assert not calls
    choose(model, "triton")
    found, _ = in_pieces(model, ids, SIZES, mask, **positions(model, mask))
    assert far(found[mask.bool()], expected[mask.bool()]) <= SAME
    one_token = "streaming" in name
    assert len(calls) == (2 + 3 if name == "some layers" else 2 * (2 if one_token else 3))
    assert {query[2] for query, _ in calls} == ({1} if one_token else {1, 2})
    calls.clear()
    choose(model, "reference")
    assert torch.equal(in_pieces(model, ids, SIZES, mask, **positions(model, mask))[0], expected)
    assert not calls


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo"])
def test_families_with_attention_of_their_own_have_none_and_say_so(kind, calls):
    with pytest.raises(ValueError, match=r"does not cover this call: \w+ForCausalLM does not attend through transformers' AttentionInterface"):
        choose(tiny(kind), "triton")
    choose(tiny("bert"), "triton")  # which has no decoding step


@pytest.mark.parametrize(("kind", "grouped"), [("llama", True), ("gemma3_text", True), ("llama", False), ("gptj", False)])
def test_on_a_cpu_query_heads_that_share_a_kv_head_are_rows_of_one_product(kind, grouped, monkeypatch):
    model = tiny(kind, **({"num_key_value_heads": 2} if grouped else {}))
    ids, mask, before = tokens(2, sum(SIZES)), torch.ones(2, sum(SIZES), dtype=torch.long), model.config._attn_implementation
    mask[1, :4] = 0
    expected, _ = in_pieces(model, ids, SIZES, mask)
    steps, real = [], attention.by_groups
    monkeypatch.setattr(attention, "by_groups", lambda *given, **more: steps.append(given[1].shape[2]) or real(*given, **more))
    choose(model, "auto")
    found, _ = in_pieces(model, ids, SIZES, mask)
    assert far(found[mask.bool()], expected[mask.bool()]) <= SAME
    assert bool(steps) == grouped
    assert (model.config._attn_implementation == attention.NAME) == grouped
    steps.clear()
    choose(model, "reference")
    assert model.config._attn_implementation == before
    monkeypatch.setattr(attention, "FAMILIES", {})
    choose(model, "auto")
    assert model.config._attn_implementation == before  # the class of a family that nobody tested may ask for that name
    assert torch.equal(in_pieces(model, ids, SIZES, mask)[0], expected)
    assert not steps
    monkeypatch.setattr(attention, "runs_triton", lambda *_: True)
    with pytest.raises(ValueError, match="effconvert does not know the family"):
        choose(model, "triton")


def test_narrow_keys_are_not_padded_to_the_width_of_values(calls):
    model = made("narrow-kv")
    choose(model, "triton")
    in_pieces(model, tokens(1, 5), (4, 1))
    assert calls[-1] == ((1, 4, 1, 8), (1, 1, 5, 8))  # values are 11 wide


def test_a_static_cache_is_read_as_far_as_it_is_filled(calls):
    model, ids = made("gqa"), tokens(2, 12)
    expected, _ = in_pieces(model, ids, (12,))
    choose(model, "triton")
    cache = StaticCache(config=model.config, max_cache_len=20)
    found, _ = in_pieces(model, ids, (3, 1, 6, 2), cache=cache)  # a prompt of three, without a mask
    assert far(found, expected) <= SAME
    assert [query[2] for query, _ in calls] == [1, 1, 2, 2]
    assert calls[-1][1][2] == 20


def test_a_prompt_gradients_and_who_wants_weights_take_the_reference(calls):
    model = made("gqa")
    choose(model, "triton")
    in_pieces(model, tokens(1, 8), (8,))
    model(tokens(1, 3)).logits.sum().backward()
    with torch.no_grad():
        model(tokens(1, 3), output_attentions=True)
    assert not calls


def test_what_is_not_covered_is_said_once_and_an_error_where_the_kernel_is_asked_for(calls, monkeypatch):
    model = made("gqa")
    choose(model, "triton")
    choice._warn.cache_clear()
    with torch.no_grad():
        model.double()
        with pytest.raises(ValueError, match=r"kernels are asked for .* query is torch.float64, and it should be float32"):
            model(tokens(1, 2))
        monkeypatch.setattr(decoding, "runs_triton", lambda *_: True)
        choose(model, "auto")
        with pytest.warns(UserWarning, match="decode_attention runs its reference: query is torch.float64"):
            model(tokens(1, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(tokens(1, 3))
        model.float()
        cache = StaticCache(config=model.config, max_cache_len=30)
        model(tokens(1, 9), **with_cache(model, cache))
        with pytest.warns(UserWarning, match="a mask torch.float32"):
            model(tokens(1, 1), attention_mask=torch.zeros(1, 1, 1, 30), **with_cache(model, cache))
    assert not calls


# What runs where


def test_auto_takes_a_kernel_on_cards_that_its_file_names(monkeypatch):
    found = {name: (entry.kernel, entry.measured) for name, entry in choice.operations().items()}
    assert found["decode_attention"] == (True, operation.MEASURED)
    assert found["window"] == (False, ())
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert not choice.runs_triton(cuda, "divergence")
    assert choice.runs_triton(cuda, "divergence", "triton")
    own = choice.Operation("divergence", "", True, ("a card",))
    monkeypatch.setattr(choice, "operations", lambda: {"divergence": own})
    assert choice.runs_triton(cuda, "divergence")
    assert not choice.runs_triton(cuda, "divergence", "reference")
    monkeypatch.setenv("EFFCONVERT_KERNELS", "reference")
    assert not choice.runs_triton(cuda, "divergence")
    monkeypatch.delenv("EFFCONVERT_KERNELS")
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    assert not choice.runs_triton(cuda, "divergence")
    with pytest.raises(ValueError, match=r"kernels is triton, and triton is not installed \(pip install triton\); leave it out"):
        choice.runs_triton(cuda, "divergence", "triton")


def test_kernels_are_refused_where_none_can_run(monkeypatch):
    folder = save(tiny("llama"), Path("model"))
    with pytest.raises(OptionError, match="kernels is triton, and kernels run on CUDA devices, not on cpu; leave it out"):
        effconvert.load(folder, device="cpu", kernels="triton")
    with pytest.raises(OptionError, match="kernels is triton"):
        bench([str(folder)], BenchOptions(device="cpu", kernels="triton"))
    with pytest.raises(OptionError, match="--kernels is 'fast', and it should be 'auto', 'triton' or 'reference'"):
        effconvert.load(folder, kernels="fast")
    assert effconvert.load(folder, device="cpu", kernels="reference").model.config._attn_implementation == "sdpa"
    monkeypatch.setenv("EFFCONVERT_KERNELS", "reference")
    assert effconvert.load(folder, device="cpu").model.config._attn_implementation == "sdpa"
    monkeypatch.setenv("EFFCONVERT_KERNELS", "triton")
    with pytest.raises(OptionError, match="EFFCONVERT_KERNELS is triton, and kernels run on CUDA devices, not on cpu; unset it"):
        effconvert.load(folder, device="cpu")
    with pytest.raises(OptionError, match="EFFCONVERT_KERNELS is triton"):
        effconvert.convert(folder, {"retnet": {"decay": "paper"}}, output="out")
    assert not Path("out").exists()


def test_the_command_says_what_would_run_here_and_why_not(command, monkeypatch):
    shown, kernels = command("kernels").output, [operation.kernel for operation in choice.operations().values()]
    assert "device: cpu" in shown
    assert shown.count("here: the reference, as kernels run on CUDA devices, not on cpu; measured on no card") == kernels.count(True)
    assert shown.count("here: the reference, as it has no kernel") == kernels.count(False)
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    assert "not on cpu and triton is not installed" in command("kernels").output
    monkeypatch.setenv("EFFCONVERT_KERNELS", "fast")
    assert command("kernels").exit_code == 2
    monkeypatch.setenv("EFFCONVERT_KERNELS", "triton")
    assert "here: an error, as kernels run on CUDA devices, not on cpu" in command("kernels").output
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    shown = command("kernels").output
    assert "device: a card; triton is installed" in shown
    assert shown.count("here: the reference, as the kernel was never measured on this card") == kernels.count(True)
    monkeypatch.setenv("EFFCONVERT_KERNELS", "triton")
    assert command("kernels").output.count("here: the kernel; measured on no card") == kernels.count(True)
