"""Families that are laid out in several ways, by switches in config.json or in files: each way is read, counted and converted as transformers runs it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, DynamicCache, FalconForCausalLM

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.modeling.caches import kv_bytes
from effconvert.modeling.loading import class_of
from effconvert.options import RunOptions
from effconvert.surgery.attention._angles import frequencies
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.embedding.factor_embed import FactorEmbed
from tests.heal.healing import prose, put, run
from tests.mixers.mixing import with_cache
from tests.models import logits, on_disk, save, tiny

NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCONS = {
    "7b": {},
    "40b": NEW,
    "11b": {**NEW, "num_ln_in_parallel_attn": 1},
    "rw-1b": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "sequential": {"parallel_attn": False, "bias": True},
    "multi-head": {"multi_query": False},
}


@pytest.fixture(params=FALCONS)
def model(request):
    made = tiny("falcon", num_hidden_layers=4, **FALCONS[request.param])
    save(made, Path("model"))
    return made


def to(step):
    return convert("model", (step,), RunOptions(output=Path("out"), tokens=32, context=16))


def opened(folder):
    made, info = class_of(open_checkpoint(Path(folder)).config).from_pretrained(folder, output_loading_info=True)
    assert not any(info[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return made.eval()


def test_queries_keys_and_values_are_those_that_its_class_takes_them_for(model):
    checkpoint = open_checkpoint(Path("model"))
    layer, attention = checkpoint.layer(2, "cpu"), model.transformer.h[2].self_attention
    expected = attention._split_heads(attention.query_key_value.weight.T[None])  # [1, M, heads, D]
    for part, stock in zip("qkv", expected, strict=True):
        rows = stock[0].detach().permute(1, 2, 0)  # [heads, D, M]
        assert torch.equal(layer[part].unflatten(0, (-1, 8)).repeat_interleave(len(rows) * 8 // len(layer[part]), 0), rows)


def test_every_tensor_of_a_layer_is_a_part_and_goes_back_to_its_place(model):
    checkpoint = open_checkpoint(Path("model"))
    assert not checkpoint.ignored
    layer = checkpoint.layer(1, "cpu")
    assert sum(tensor.numel() for tensor in layer.values()) == sum(parameter.numel() for parameter in model.transformer.h[1].parameters())
    for part in layer:
        layer[part] = layer[part]
    written = {name: tensor for name, _, tensor in layer.tensors()}
    assert written.keys() == dict(model.transformer.h[1].named_parameters()).keys()
    assert all(torch.equal(written[name], parameter) for name, parameter in model.transformer.h[1].named_parameters())


def test_the_cache_is_planned_as_its_class_fills_it(model):
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.arange(3, 10)[None], use_cache=True, **with_cache(model, cache))
    assert kv_bytes(open_checkpoint(Path("model")).config, 4, 7) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_whole_layers_are_dropped(model):
    to(PruneLayers(layers="1"))
    converted = opened("out")
    assert type(converted) is FalconForCausalLM
    del model.transformer.h[1]
    torch.testing.assert_close(logits(converted), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only", ["attention", "mlp"])
@pytest.mark.parametrize("model", ["40b", "rw-1b"], indirect=True)
def test_a_part_that_adds_nothing_can_be_left_out(model, only):
    silent = model.transformer.h[2].get_submodule({"attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}[only])
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
    expected = logits(model)
    save(model, Path("model"))
    to(PruneLayers(layers="2", only=only))
    torch.testing.assert_close(logits(opened("out")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["40b"], indirect=True)
def test_heads_are_left_alone_since_its_class_caches_all_of_them_anyway(model):
    with pytest.raises(ModelError, match="falcon has attention of its own"):
        to(Gqa(groups=1))


@pytest.mark.parametrize("switches", [{**NEW, "parallel_attn": False}, {"num_ln_in_parallel_attn": 2}])
def test_switches_that_its_class_can_be_built_with_and_not_run_are_refused(switches):
    save(tiny("falcon", **switches), Path("model"))
    with pytest.raises(ModelError, match=r"model has no transformer\.h\.0\.\w+\.weight, which falcon needs"):
        open_checkpoint(Path("model"))


def test_rope_is_there_where_alibi_is_not():
    row = FAMILIES["falcon"]
    assert (row.of({}).rope, row.of({"alibi": True}).rope) == ("halves", "")
    assert row.of({"alibi": True, **NEW}).kv_heads_key == "num_kv_heads"


# Files whose names and fused tensors transformers takes apart when it loads them


def hub(shards="1MB"):
    """A tiny nomic_bert, written as files of the Hub are: what its class has as q, k and v is one tensor there."""
    model = tiny("nomic_bert")
    model.save_pretrained("model", max_shard_size=shards)
    assert "nomic_bert.encoder.layers.0.attn.Wqkv.weight" in on_disk(Path("model"))
    return model


def test_a_fused_tensor_is_read_as_the_parts_that_its_class_makes_of_it():
    model = hub()
    checkpoint = open_checkpoint(Path("model"))
    plain = open_checkpoint(save(model, Path("plain")))
    for index in range(checkpoint.config.layers):
        layer, other = checkpoint.layer(index, "cpu"), plain.layer(index, "cpu")
        assert {*layer} == {*other}
        assert all(torch.equal(layer[part], other[part]) for part in other)
    assert {name: tensor.shape for name, tensor in checkpoint.outer.items()} == {name: tensor.shape for name, tensor in plain.outer.items()}
    assert plan(checkpoint, ()).before == plan(plain, ()).before


def test_it_is_written_as_its_class_has_it():
    model = hub(shards="8KB")
    outcome = to(Gqa(groups=4))
    assert len(outcome.plan.shards) > 1
    converted = opened("out")
    assert type(converted) is type(model)
    assert torch.equal(logits(converted), logits(model))
    assert on_disk(Path("out")).keys() == {name for name in model.state_dict() if "decoder" not in name}


def test_heads_that_are_shared_are_not_fused_when_the_model_is_saved_again():
    hub()
    to(Gqa(groups=2, pool="mean"))
    converted = opened("out")
    made = type(converted)(converted.config)  # one that was not loaded would be saved under the names of the Hub
    made.load_state_dict(converted.state_dict())
    made.save_pretrained("again")
    assert torch.equal(logits(opened("again")), logits(converted))


def test_a_fused_tensor_that_cannot_be_taken_apart_is_refused():
    hub()
    tensors = on_disk(Path("model"))
    name = "nomic_bert.encoder.layers.0.attn.Wqkv.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has no nomic_bert\.layers\.0\.self_attn\.q_proj\.weight, which nomic_bert needs"):
        open_checkpoint(Path("model"))


TIED = {  # family -> names of the table and of the head
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "roberta": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_table_that_is_stored_as_the_head_alone_is_read(kind):
    """As safetensors' save_model writes it, which keeps one name of a tensor that has two."""
    table, head = TIED[kind]
    model = tiny(kind, tie_word_embeddings=True)
    plain = save(model, Path("plain"))
    tensors = on_disk(save(model, Path("model")))
    tensors[head] = tensors.pop(table)
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    for folder in (Path("model"), plain):
        convert(str(folder), (Gqa(groups=2, pool="mean"),), RunOptions(output=Path(f"{folder}-2"), verify=False))
    ours, theirs = on_disk(Path("model-2")), on_disk(Path("plain-2"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert plan(open_checkpoint(Path("model")), ()).before.parameters == plan(open_checkpoint(plain), ()).before.parameters


@pytest.mark.parametrize(("kind", "turned"), [("llama", 8), ("phi3", 4)])
def test_a_part_of_a_head_is_turned_where_the_class_reads_that(kind, turned):
    model = tiny(kind, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert open_checkpoint(save(model, Path("model"))).config.rotary == turned
    angles = model.model.rotary_emb(torch.zeros(1, 3, 8), torch.arange(3)[None])[0]
    assert angles.shape[-1] == turned


def test_of_two_entries_on_rope_the_one_that_transformers_reads_counts():
    folder = save(tiny("llama"), Path("model"))
    content = json.loads((folder / "config.json").read_text())
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps({**content, **both}))
    theirs = class_of(open_checkpoint(folder).config).from_pretrained(folder).model.rotary_emb.inv_freq
    assert theirs[0] == 0.25
    assert frequencies(open_checkpoint(folder).config) == pytest.approx(theirs.tolist())


def test_of_rope_by_layer_both_entries_stay_as_they_are():
    """Classes with RoPE by layer join them."""
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 5e5}, "full_attention": {"rope_type": "default", "rope_theta": 2e4}}
    folder = save(tiny("gemma3_text", rope_parameters=ropes), Path("model"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}))
    convert("model", (Gqa(groups=2, pool="mean"),), RunOptions(output=Path("out"), verify=False))
    theirs, ours = (AutoConfig.from_pretrained(place).rope_parameters for place in ("model", "out"))
    assert theirs["full_attention"]["rope_type"] == "linear"
    assert ours == theirs


@pytest.mark.parametrize("step", [Gqa(groups=2), FactorEmbed(rank=8)])  # which look at activations, and at the model as a whole
def test_a_model_that_transformers_cannot_run_is_refused_in_a_sentence(step):
    put(Path("model"), "mixtral", hidden_size=45, head_dim=8)
    Path("text.txt").write_text(prose())
    with pytest.raises(ModelError, match=r"calibration failed: .* cannot run it \(RuntimeError: .*16 bytes.*; give a model that transformers runs"):
        run("model", step)


def test_options_that_do_nothing_are_said():
    put(Path("model"), max_position_embeddings=48)
    for options, said in (
        ({"calibrate": "nowhere.txt"}, "--calibrate nowhere.txt is not read, as no step looks at a text"),
        ({"context": 100}, "--context 100 is more than the model reads; the verification's windows have 48 tokens"),
        ({}, ""),
    ):
        outcome = convert("model", (Gqa(groups=2, pool="mean"),), RunOptions(output=Path("out"), dry_run=True, **options))
        assert [remark for remark in outcome.plan.remarks if "--" in remark] == ([said] if said else [])
