"""Latent attention decodes by its latents: the logits are the family's, and keys and values of all heads are not made."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache

from effconvert.kernels import decode_attention as operation
from effconvert.modeling import attention, decoding
from effconvert.modeling.attention import choose
from tests.mixers.mixing import far, in_pieces, positions, tokens
from tests.models import tiny

SIZES = (8, 1, 2, 1)  # tokens at a time
SAME = 2e-6  # of the largest logit, in float32


@pytest.fixture
def model():
    """A deepseek_v3 without experts, as mla writes it."""
    return tiny("deepseek_v3")


def expansions(model):
    """Return a list that grows by the number of tokens of which keys and values are made."""
    counts = []
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, out: counts.append(args[0].shape[2]))
    return counts


def test_steps_give_the_same_logits_without_keys_and_values_of_all_heads(model):
    ids, mask = tokens(2, sum(SIZES)), torch.ones(2, sum(SIZES), dtype=torch.long)
    mask[1, :4] = 0
    expected, _ = in_pieces(model, ids, SIZES, mask, **positions(model, mask))
    choose(model, "auto")
    counts = expansions(model)
    found, _ = in_pieces(model, ids, SIZES, mask, **positions(model, mask))
    assert 0 < far(found, expected) <= SAME
    assert set(counts) == {SIZES[0]}  # the prompt's
    assert far(in_pieces(model, ids, (3, 1, 8))[0], in_pieces(tiny("deepseek_v3"), ids, (12,))[0]) <= SAME  # without a mask
    choose(model, "reference")
    assert torch.equal(in_pieces(model, ids, SIZES, mask, **positions(model, mask))[0], expected)
    assert counts[-1] == sum(SIZES)  # those of all tokens, in each step


def test_the_function_that_a_user_sets_afterwards_is_heeded(model):
    ids = tokens(2, sum(SIZES))
    expected, _ = in_pieces(model, ids, SIZES)
    choose(model, "auto")
    model.set_attn_implementation("sdpa")
    assert torch.equal(in_pieces(model, ids, SIZES)[0], expected)


def test_an_adapter_and_a_copy_of_the_model_are_heeded(model):
    class Doubled(torch.nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    ids = tokens(2, sum(SIZES))
    copied = copy.deepcopy(model)
    choose(model, "auto")
    again = copy.deepcopy(model)
    again.set_attn_implementation("sdpa")
    assert torch.equal(in_pieces(again, ids, SIZES)[0], in_pieces(copied, ids, SIZES)[0])
    for some in (model, copied):
        for layer in some.model.layers:
            layer.self_attn.kv_b_proj.__class__ = Doubled
    assert far(in_pieces(model, ids, SIZES)[0], in_pieces(copied, ids, SIZES)[0]) <= SAME


def test_a_static_cache_and_gradients(model):
    ids = tokens(2, 12)
    expected, _ = in_pieces(model, ids, (12,))
    choose(model, "auto")
    found, _ = in_pieces(model, ids, (3, 1, 6, 2), cache=StaticCache(config=model.config, max_cache_len=20))
    assert far(found, expected) <= SAME
    model(ids[:, :2]).logits.sum().backward()
    assert model.model.layers[0].self_attn.kv_b_proj.weight.grad.isfinite().all()


def test_a_step_runs_as_a_kernel_where_it_is_asked_for(model, monkeypatch):
    pytest.importorskip("triton")
    ids, shapes, real = tokens(2, sum(SIZES)), [], operation.decode_attention
    expected, _ = in_pieces(model, ids, SIZES)
    monkeypatch.setattr(
        operation, "decode_attention", lambda query, key, *given, **more: shapes.append((query.shape, key.shape)) or real(query, key, *given, **more)
    )
    for file in (attention, decoding):
        monkeypatch.setattr(file, "runs_triton", lambda device, name, asked: asked == "triton")
    choose(model, "triton")
    found, _ = in_pieces(model, ids, SIZES)
    assert far(found, expected) <= SAME
    heads, width = model.config.num_attention_heads, model.config.kv_lora_rank + model.config.qk_rope_head_dim
    assert shapes[0] == ((2, heads, 1, width), (2, 1, 9, width))


@pytest.mark.parametrize("width", [5, 8, 11])
@pytest.mark.parametrize("case", ["one token", "the first tokens", "a mask", "a prompt"])
def test_rows_of_groups_are_softmax_of_each_head(width, case):
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3)
    count, keys = {"one token": (1, 9), "the first tokens": (3, 3), "a mask": (2, 9), "a prompt": (6, 6)}[case]
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, *shape, generator=draw) for shape in ((6, count, 8), (2, keys, 8), (2, keys, width)))
    mask = torch.rand(2, 1, count, keys, generator=draw) > 0.3 if case == "a mask" else None
    scores = query.double() @ key.double().repeat_interleave(3, 1).mT * 8**-0.5
    seen = mask if mask is not None else torch.ones(count, keys, dtype=torch.bool).tril(keys - count)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.double().repeat_interleave(3, 1)
    whole, _ = attention.softmax(module, query, key, value, mask)
    assert (whole.transpose(1, 2) - expected).abs().max() <= 1e-6
    step = decoding.by_groups(module, query, key, value, mask)
    assert step is None if case == "a prompt" else torch.equal(step, whole)


def test_what_is_no_plain_step_is_left_to_the_family():
    module, (query, key) = SimpleNamespace(is_causal=True), (torch.ones(1, 2, 1, 8), torch.ones(1, 2, 9, 8))
    assert decoding.by_groups(module, query, key, key, None) is not None
    for given in ({"position_bias": torch.ones(1, 2, 1, 9)}, {"softcap": 3.0}, {"dropout": 0.1}, {"is_causal": False}, {"output_attentions": True}):
        assert decoding.by_groups(module, query, key, key, None, **given) is None, given
    assert decoding.by_groups(module, query, key, key, torch.zeros(1, 1, 1, 9)) is None  # a mask that is added to scores
    assert decoding.by_groups(SimpleNamespace(is_causal=False), query, key, key, None) is None
    assert decoding.by_groups(module, torch.ones(1, 2, 3, 8), key, key, None) is None  # a prompt into a static cache
