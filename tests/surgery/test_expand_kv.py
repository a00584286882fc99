import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from effconvert.checkpoint.reading import read_config
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.options import RunOptions
from effconvert.surgery.attention.expand_kv import ExpandKv
from tests.models import GROUPING, logits, save, tiny


@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups", "written"), [(4, 1, None, 4), (4, 1, 2, 2), (4, 2, None, 4), (12, 2, 4, 4), (12, 2, 6, 6), (12, 2, None, 12), (6, 3, 6, 6)]
)
def test_more_kv_heads_compute_the_same(heads, kv_heads, groups, written, tmp_path):
    model = tiny("qwen2", hidden_size=48, num_attention_heads=heads, num_key_value_heads=kv_heads)
    source = save(model, tmp_path / "source")
    convert(str(source), (ExpandKv(groups=groups),), RunOptions(output=tmp_path / "out", verify=False))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == written
    expected = logits(model)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_each_head_is_repeated_in_place_bit_for_bit(tmp_path):
    source = save(tiny("olmo2", num_key_value_heads=2), tmp_path / "source")
    convert(str(source), (ExpandKv(),), RunOptions(output=tmp_path / "out", verify=False))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("k_proj", "v_proj", "k_norm"):
        first, second = before[f"model.layers.1.self_attn.{name}.weight"].split(8)
        assert torch.equal(after[f"model.layers.1.self_attn.{name}.weight"], torch.cat([first, first, second, second]))


@pytest.mark.parametrize(
    ("kv_heads", "groups", "sentence"),
    [
        (1, 3, "--groups 3 does not lie between this model's 1 KV heads and 4 query heads.*give 2 or 4"),
        (1, 8, "--groups 8 does not lie between .*give 2 or 4"),
        (2, 2, "--groups 2 does not lie between .*give 4"),
        (2, 1, "--groups 1 does not lie between .*give 4"),
    ],
)
def test_a_number_that_does_not_fit_is_refused_with_those_that_do(kv_heads, groups, sentence, tmp_path):
    source = save(tiny("llama", num_key_value_heads=kv_heads), tmp_path / "source")
    with pytest.raises(OptionError, match=sentence):
        convert(str(source), (ExpandKv(groups=groups),), RunOptions(output=tmp_path / "out", verify=False))


@pytest.mark.parametrize("groups", [0, -1, "all"])
def test_a_number_out_of_bounds_is_refused(groups):
    with pytest.raises(OptionError, match="--groups is "):
        ExpandKv(**{"groups": groups})


@pytest.mark.parametrize("kind", GROUPING)
def test_a_multi_head_model_is_refused(kind, tmp_path):
    source = save(tiny(kind), tmp_path / "source")
    with pytest.raises(ModelError, match=f"this {kind} has a KV head for each of its 4 query heads already"):
        convert(str(source), (ExpandKv(),), RunOptions(output=tmp_path / "out", verify=False))


def test_a_gpt_bigcode_is_refused(tmp_path):
    source = save(tiny("gpt_bigcode"), tmp_path / "source")
    with pytest.raises(ModelError, match="gpt_bigcode cannot be written with another number of KV heads"):
        convert(str(source), (ExpandKv(),), RunOptions(output=tmp_path / "out", verify=False))


def test_the_numbers_that_suit_a_model_are_listed(tmp_path):
    config = read_config(save(tiny("llama", hidden_size=48, num_attention_heads=12, num_key_value_heads=2), tmp_path))
    assert ExpandKv.allowed_options(config) == "--groups 4, 6, 12"
