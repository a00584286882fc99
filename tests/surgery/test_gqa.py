import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from effconvert.checkpoint.reading import read_config
from effconvert.convert.run import convert
from effconvert.errors import OptionError
from effconvert.options import RunOptions
from effconvert.surgery.attention.expand_kv import ExpandKv
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mqa import Mqa
from tests.models import GROUPING, characters, logits, save, tiny

RULES = {"mean": lambda heads: heads.mean(1, dtype=np.float64), "first": lambda heads: heads[:, 0]}


def run(model, surgery, folder, **how):
    """Convert `model` and return the tensors before and after."""
    source = save(model, folder / "source", **how)
    convert(str(source), (surgery,), RunOptions(output=folder / "out", verify=False))
    return load_file(source / "model.safetensors"), load_file(folder / "out" / "model.safetensors")


def load(folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def pooled(tensor, heads, groups, rule):
    """Group by group, in numpy: rows [heads * D, ...] -> [groups * D, ...]."""
    array = tensor.numpy()
    width, size = len(array) // heads, heads // groups
    by_head = np.stack([array[head * width : (head + 1) * width] for head in range(heads)])
    by_group = np.stack([by_head[group * size : (group + 1) * size] for group in range(groups)])
    return RULES[rule](by_group).reshape(groups * width, *array.shape[1:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"]),
        ("qwen2", ["k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"]),
        ("mistral", ["k_proj.weight", "v_proj.weight"]),
        ("olmo2", ["k_proj.weight", "v_proj.weight", "k_norm.weight"]),
    ],
)
@pytest.mark.parametrize("groups", [2, 1])
def test_pooled_weights_are_those_of_numpy_and_the_rest_stays(kind, names, rule, groups, tmp_path):
    before, after = run(tiny(kind), Gqa(groups=groups, pool=rule), tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{index}.self_attn.{name}" for index in range(2) for name in names}
    for name in changed:
        np.testing.assert_allclose(after[name], pooled(before[name], 4, groups, rule), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_the_fused_projection_of_phi3_is_pooled_in_its_k_and_v(rule, tmp_path):
    before, after = run(tiny("phi3"), Gqa(groups=2, pool=rule), tmp_path)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    q, k, v = (before[name][start : start + 32] for start in (0, 32, 64))
    expected = np.concatenate([q.numpy(), pooled(k, 4, 2, rule), pooled(v, 4, 2, rule)])
    np.testing.assert_allclose(after[name], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(after[name][:32], q)


@pytest.mark.parametrize("rule", RULES)
def test_the_fused_projection_of_gpt2_is_pooled_and_turned(rule, tmp_path):
    before, after = run(tiny("gpt2"), Mqa(pool=rule), tmp_path)
    for suffix in ("weight", "bias"):
        name = f"transformer.h.1.attn.c_attn.{suffix}"
        q, k, v = before[name].T.split(32) if suffix == "weight" else before[name].split(32)
        expected = np.concatenate([q.numpy(), pooled(k, 4, 1, rule), pooled(v, 4, 1, rule)])
        np.testing.assert_allclose(after[name], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(after["transformer.h.0.mlp.c_fc.weight"], before["transformer.h.0.mlp.c_fc.weight"].T)


@pytest.mark.parametrize(("heads", "kv_heads", "groups"), [(4, 4, 2), (4, 4, 1), (4, 2, 1), (6, 6, 3), (6, 6, 2), (6, 6, 1), (6, 3, 1), (6, 2, 1)])
def test_any_number_of_groups_that_divides_will_do(heads, kv_heads, groups, tmp_path):
    model = tiny("llama", hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)
    before, after = run(model, Gqa(groups=groups, pool="mean"), tmp_path)
    for part in ("k", "v"):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        np.testing.assert_allclose(after[name], pooled(before[name], kv_heads, groups, "mean"), rtol=1e-6, atol=1e-7)
    converted = load(tmp_path / "out")
    assert converted.config.num_key_value_heads == groups
    assert torch.isfinite(logits(converted)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_taken_in_float32_and_stored_in_the_type_of_the_checkpoint(dtype, tmp_path):
    before, after = run(tiny("llama").to(dtype), Gqa(groups=1, pool="mean"), tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert after[name].dtype == dtype
    assert torch.equal(after[name], before[name].float().view(4, 8, 32).mean(0).to(dtype))
    in_low_precision = sum(before[name].view(4, 8, 32)[1:], before[name].view(4, 8, 32)[0]) / 4
    assert not torch.equal(after[name], in_low_precision)  # or this test would not see the difference


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", GROUPING)
def test_heads_that_were_repeated_are_pooled_back_to_what_they_were(kind, rule, tmp_path):
    source = save(tiny(kind, num_key_value_heads=2), tmp_path / "source")
    convert(str(source), (ExpandKv(),), RunOptions(output=tmp_path / "wide", verify=False))
    convert(str(tmp_path / "wide"), (Gqa(groups=2, pool=rule),), RunOptions(output=tmp_path / "back", verify=False))
    assert (tmp_path / "wide" / "model.safetensors").read_bytes() != (source / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_surgeries_one_after_the_other_are_the_same_as_in_one_run(tmp_path):
    source = save(tiny("qwen2"), tmp_path / "source")
    steps = (Gqa(groups=2, pool="mean"), Gqa(groups=1, pool="first"), ExpandKv(groups=2))
    folder = source
    for number, step in enumerate(steps):
        convert(str(folder), (step,), RunOptions(output=tmp_path / str(number), verify=False))
        folder = tmp_path / str(number)
    convert(str(source), steps, RunOptions(output=tmp_path / "at-once", verify=False))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "at-once" / name).read_bytes() == (folder / name).read_bytes()


def test_a_gpt2_whose_heads_are_alike_computes_the_same_as_a_gpt_bigcode(tmp_path):
    model = tiny("gpt2", activation_function="gelu_new")
    with torch.no_grad():
        for block in model.transformer.h:
            for at in (32, 64):
                for parameter in (block.attn.c_attn.weight, block.attn.c_attn.bias):
                    parameter[..., at : at + 32] = parameter[..., at : at + 8].repeat(*[1] * (parameter.ndim - 1), 4)
    expected = logits(model)
    run(model, Mqa(pool="mean"), tmp_path)
    converted = load(tmp_path / "out")
    assert isinstance(converted, transformers.GPTBigCodeForCausalLM)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["multi_query"] is True
    assert (logits(converted) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_gpt2_whose_heads_differ_does_not_compute_the_same(tmp_path):
    model = tiny("gpt2")
    run(model, Mqa(pool="mean"), tmp_path)
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_a_gpt2_with_a_switch_that_gpt_bigcode_lacks_stays_what_it_is(key, tmp_path):
    run(tiny("gpt2", **{key: True}), Mqa(pool="mean"), tmp_path)
    config = read_config(tmp_path / "out")
    assert (config.kind, config.family.shares_kv_in_our_class, config.kv_heads, config.raw[key]) == ("gpt2", True, 1, True)


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_a_switch_that_is_off_is_dropped_from_the_config(key, tmp_path):
    run(tiny("gpt2"), Mqa(pool="mean"), tmp_path)
    assert key not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_mqa_is_gqa_with_one_group(kind, tmp_path):
    source = save(tiny(kind), tmp_path / "source")
    options = {"calibrate": str(characters(source)), "calibration_tokens": 512, "verify": False}
    for name, surgery in {"mqa": Mqa(), "gqa": Gqa(groups=1)}.items():
        convert(str(source), (surgery,), RunOptions(output=tmp_path / name, **options))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "mqa" / name).read_bytes() == (tmp_path / "gqa" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"groups": 0}, "--groups is 0, and it should be greater than or equal to 1"),
        ({"groups": -2}, "--groups is -2, and it should be greater than or equal to 1"),
        ({"groups": "many"}, "--groups is 'many', and it should be a whole number"),
        ({"groups": 1.5}, "--groups is 1.5, and it should be a whole number"),
        ({}, "--groups is needed"),
        ({"groups": 2, "pool": "max"}, "--pool is 'max', and it should be 'pca', 'aligned', 'mean' or 'first'"),
        ({"group": 2, "groups": 2}, "there is no option --group; did you mean --groups"),
    ],
)
def test_options_out_of_bounds_are_refused(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        Gqa(**options)


@pytest.mark.parametrize(
    ("groups", "changes", "sentence"),
    [
        (3, {}, "--groups 3 does not divide this model's 4 KV heads; give 1 or 2 or 4"),
        (8, {}, "--groups 8 is more than this model's 4 KV heads; give 1 or 2 or 4; effconvert expand-kv makes more"),
        (4, {"num_key_value_heads": 2}, "--groups 4 is more than this model's 2 KV heads; give 1 or 2; effconvert expand-kv makes more"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused_with_those_that_do(groups, changes, sentence, tmp_path):
    with pytest.raises(OptionError, match=sentence):
        run(tiny("llama", **changes), Gqa(groups=groups), tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_groups_that_suit_a_model_are_listed(tmp_path):
    six = save(tiny("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=6), tmp_path / "six")
    assert Gqa.allowed_options(read_config(six)) == "--groups 1, 2, 3, 6"
    assert Gqa.allowed_options(read_config(save(tiny("gpt2"), tmp_path / "gpt2"))) == "--groups 1, 2, 4"
    assert Gqa.allowed_options(read_config(save(tiny("bert"), tmp_path / "bert"))) == "--groups 1, 2, 4"
    assert Gqa.allowed_options(read_config(save(tiny("gpt_bigcode"), tmp_path / "bigcode"))) == "--groups 1"
