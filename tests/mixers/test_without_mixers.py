"""Converted models that cache as their family does, or only counts: what transformers offers for generation works; and settings that others cannot follow."""

import json

import pytest
import torch
import transformers

import effconvert
from effconvert.convert.run import convert
from effconvert.options import RunOptions
from effconvert.surgery.attention.share_kv import ShareKv
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.projections.low_rank import LowRank
from tests.models import characters, save, tiny

STEPS = {"low-rank": LowRank(rank=8), "share-kv": ShareKv(layers="1"), "skip": PruneLayers(layers="1", only="attention"), "linear": Linear(window=4)}
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
SETTINGS = {"cache_implementation": "static", "prompt_lookup_num_tokens": 2, "repetition_penalty": 1.3, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The original, whose settings for generation are unusual, and the results of the steps, which are verified."""
    place = tmp_path_factory.mktemp("without")
    save(tiny("llama", attention_bias=False, mlp_bias=False, num_hidden_layers=4), place / "model")
    text = characters(place / "model")
    (place / "model" / "generation_config.json").write_text(json.dumps(SETTINGS))
    for name, step in STEPS.items():
        convert(str(place / "model"), (step,), RunOptions(output=place / name, tokens=128, context=48, calibrate=str(text), calibration_tokens=256))
    return place


def ids():
    return torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(0)).repeat(1, 3)


def plain(folder):
    model = effconvert.load(folder).model
    model.generation_config = transformers.GenerationConfig()
    return model


@pytest.mark.parametrize("name", ["low-rank", "share-kv", "skip"])
def test_drafts_of_another_model_or_of_the_prompt_give_the_same(folders, name):
    model, draft = plain(folders / name), plain(folders / "model")
    expected = model.generate(ids(), **GREEDY)
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        assert torch.equal(model.generate(ids(), **how, **GREEDY), expected)


def test_a_model_without_a_mixer_takes_every_mask_and_a_static_cache(folders):
    model = plain(folders / "low-rank")
    square = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    assert torch.equal(model(ids(), attention_mask=square).logits, model(ids(), attention_mask=torch.ones_like(ids())).logits)
    static = model.generate(ids(), cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(static, model.generate(ids(), **GREEDY))


@pytest.mark.parametrize("name", STEPS)
def test_settings_of_the_original_stay_where_they_can_be_followed(folders, name):
    assert json.loads((folders / name / "generation_config.json").read_text()) == SETTINGS
    settings = effconvert.load(folders / name).model.generation_config
    assert settings.cache_implementation == ("static" if name == "low-rank" else None)
    assert settings.prompt_lookup_num_tokens == (None if name == "linear" else 2)
    assert settings.repetition_penalty == 1.3
