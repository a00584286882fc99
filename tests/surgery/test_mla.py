"""Latent attention in transformers' own deepseek_v3: exact where nothing is lost, and otherwise what loses least goes, the same in all layers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import effconvert.modeling
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.reading import read_config
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal.refit import Refit
from effconvert.surgery._rope import split_pairs
from effconvert.surgery.attention._angles import frequencies, rope_entry_of_pairs
from effconvert.surgery.attention._latents import directions, latents
from effconvert.surgery.attention._mla import assigned, halves, interleaved, value_latents
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mla import CONSTANT, Mla
from effconvert.surgery.attention.narrow_kv import NarrowKv
from effconvert.surgery.attention.share_kv import ShareKv
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.projections.low_rank import LowRank
from effconvert.surgery.width.narrow import Narrow
from tests.heal.healing import apart, opened, prose, put, run, tensors
from tests.mixers.mixing import in_pieces, with_cache
from tests.models import logits, save, tiny
from tests.surgery.test_narrow_kv import one_head, random_heads

SAME = 1e-5  # of the largest logit, in float32
UNBIASED = {"attention_bias": False, "mlp_bias": False}
HALF = {"rank": 8, "rope_dims": 8}  # of the models with 2 KV heads of 8
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def source(folder="source", kind="llama", **changes):
    changes = {"num_key_value_heads": 2, **(UNBIASED if kind == "llama" else {"sliding_window": None}), **changes}
    return put(Path(folder), kind, **changes)


def planned(kind="llama", changes=None, **options):
    changes = {"num_key_value_heads": 2, **(UNBIASED if kind == "llama" else {"sliding_window": None} if kind == "mistral" else {})} | (changes or {})
    return plan(open_checkpoint(save(tiny(kind, **changes), Path("planned"))), (Mla(**options),))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 1}),  # plain RoPE
        ("llama", {"num_key_value_heads": 4}),  # as many values as the stream is wide
        ("llama", {"head_dim": 16, "num_key_value_heads": 4}),  # more
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"num_key_value_heads": 2}),
    ],
)
def test_nothing_is_lost_where_all_is_kept(kind, changes):
    original = opened(source("source", kind, max_position_embeddings=256, **changes))
    config = read_config(Path("source"))
    outcome = run("source", Mla(rank=min(config.hidden, config.kv_heads * config.head_dim)))
    assert outcome.plan.is_exact
    assert not outcome.plan.calibration
    expected, found = logits(original, 250), logits(opened("out"), 250)
    assert (found - expected).abs().max() <= 3 * SAME * expected.abs().max()  # RoPE's angles are rounded otherwise
    stays = {name: tensor for name, tensor in tensors(Path("source")).items() if not any(part in name for part in ("q_proj", "k_proj", "v_proj"))}
    assert all(torch.equal(tensors(Path("out"))[name], tensor) for name, tensor in stays.items())


def test_a_part_of_a_head_that_the_class_before_did_not_read_is_left_out():
    original = opened(source("source", max_position_embeddings=256))
    content = json.loads(Path("source/config.json").read_text())
    Path("source/config.json").write_text(json.dumps({**content, "partial_rotary_factor": 0.5}))
    run("source", Mla(rank=16))
    expected, found = logits(original, 250), logits(opened("out"), 250)
    assert (found - expected).abs().max() <= 3 * SAME * expected.abs().max()


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 3, 3, 3], [0, 2, 1, 3]])
def test_the_class_computes_what_one_head_of_latents_does(counts):
    """In float64, through the norm, with the angles that config.json says."""
    heads, inputs = random_heads()
    heads.q[..., -1] = 0  # a bias, which has no place
    found = latents(heads, counts, 20)
    parts = {part: rows.double() for part, rows in assigned(found, heads.moment, 0.3, CONSTANT).items()}
    raw = {"model_type": "llama", "hidden_size": 40, "num_attention_heads": 6, "num_hidden_layers": 1, "head_dim": 8, "max_position_embeddings": 64}
    config = Config(raw, FAMILIES["llama"])
    rope, pairs = rope_entry_of_pairs(config, counts), sum(counts)
    divisors = rope.get("long_factor") or [1e4 ** (pair / 4) for pair in range(4)]
    angles = torch.arange(20, dtype=torch.double)[:, None] / torch.tensor(divisors, dtype=torch.double)
    original = torch.arange(20, dtype=torch.double)[:, None] * torch.tensor(frequencies(config), dtype=torch.double)
    scores, values = one_head(found, inputs[:20], original)

    def turned(rows):
        first, second, rest = split_pairs(rows, 2 * pairs, "interleaved")
        assert not rest.shape[-1]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)

    rows = inputs[:20, :-1] @ parts["kv_a"].T + parts["kv_a.bias"]
    latent, key = rows[:, :21], turned(rows[:, 21:])
    normed = latent * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * parts["kv_a_norm"]
    query = turned((inputs[:20, :-1] @ parts["q"].T).unflatten(1, (6, -1)).transpose(0, 1))
    assert ((query @ key.T) * (2 * pairs) ** -0.5 - 0.3 * scores).abs().max() < 1e-5 * scores.abs().max()
    mixed = (normed @ parts["kv_b"].T).unflatten(1, (6, 8))  # [T, H, D]
    outputs = torch.einsum("nhd,thd->htn", heads.o, mixed)
    means = torch.einsum("nhd,hd->hn", heads.o, found.means)
    assert (outputs - values - means[:, None]).abs().max() < 1e-5 * values.abs().max()
    assert (normed[:, -1] - 1).abs().max() < 1e-6
    same = value_latents(parts) @ inputs[:20].T
    assert (same.T - normed).abs().max() < 1e-5 * normed.abs().max()
    assert torch.equal(halves(interleaved(found.q, pairs), pairs), found.q)


def test_the_directions_of_each_frequency_are_its_best():
    heads, _ = random_heads()
    found, both = directions(heads), latents(heads, [3, 0, 2, 1], 24)
    assert both.pairs.tolist() == [0, 0, 0, 2, 2, 3]
    vector, gains = found.pair_vectors[3, :, -1].conj(), found.gains[:, 3]
    key = torch.einsum("s,sm->m", vector * gains, heads.pairs(heads.k)[0][:, 3])
    assert torch.allclose(torch.complex(both.k[5], both.k[11]), key)


def test_frequencies_without_loss_get_no_pair():
    model = tiny("llama", num_key_value_heads=2, **UNBIASED)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.view(2, 2, 4, -1)[:, :, 2] = 0  # pair 2 of both heads
            layer.self_attn.k_proj.weight.view(2, 2, 4, -1)[1, :, 0] = 0  # pair 0 of one head
    save(model, source())
    outcome = run("source", Mla(rank=16, rope_dims=10))
    assert "--frequencies 1,2,0,2 " in " ".join(outcome.plan.notes)
    expected = logits(model)
    assert (logits(opened("out")) - expected).abs().max() <= SAME * expected.abs().max()
    run("source", Mla(rank=16, rope_dims=8), place="less")
    assert apart("source", "less")[0] > 1e-5


def test_one_pair_of_each_frequency_is_plain_rope():
    source()
    run("source", Mla(rank=8, frequencies="1,1,1,1"))
    assert read_config(Path("out")).get("rope_parameters") == {"rope_type": "default", "rope_theta": 10000.0}
    run("source", Mla(rank=8, frequencies="2,0,1,1"), place="other")
    rope = read_config(Path("other")).get("rope_parameters")
    assert (rope["rope_type"], rope["rope_theta"], rope["long_factor"]) == ("longrope", 1.0, pytest.approx([1.0, 1.0, 100.0, 1000.0]))
    assert rope["short_factor"] == rope["long_factor"]


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, LLAMA3, {**LLAMA3, "high_freq_factor": 2.0, "factor": 2.0}])
def test_angles_are_those_of_transformers(rope):
    theirs = transformers.LlamaConfig(head_dim=64, rope_parameters=rope, max_position_embeddings=512)
    expected, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu")
    raw = {"model_type": "llama", "head_dim": 64, "num_attention_heads": 4, "rope_parameters": rope}
    assert frequencies(Config(raw, FAMILIES["llama"])) == pytest.approx(expected.tolist(), rel=1e-6)
    old = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    raw = {**raw, "rope_parameters": None, "rope_theta": rope["rope_theta"], "rope_scaling": {**old, "type": rope["rope_type"]}}
    assert frequencies(Config(raw, FAMILIES["llama"])) == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_token_at_a_time_gives_the_same_logits_and_padding_nothing():
    source()
    run("source", Mla(**HALF))
    model, ids = opened("out"), torch.arange(3, 27)[None]
    with torch.no_grad():
        whole, (steps, _) = model(ids).logits, in_pieces(model, ids, [1] * ids.shape[1])
        padded = model(
            torch.cat([ids.new_zeros(1, 5), ids], 1), attention_mask=torch.tensor([[0] * 5 + [1] * 24]), position_ids=torch.arange(-5, 24)[None].clamp_min(0)
        )
    assert (steps - whole).abs().max() <= SAME * whole.abs().max()
    assert (padded.logits[:, 5:] - whole).abs().max() <= SAME * whole.abs().max()
    assert model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0).shape[1] == 28


def test_the_cache_is_as_small_as_the_plan_says():
    source()
    outcome = run("source", Mla(rank=9, rope_dims=10))
    cache = effconvert.modeling.cache_for(opened("out").config)
    opened("out")(torch.tensor([[3] * 10]), use_cache=True, **with_cache(opened("out"), cache))
    assert [(layer.keys.shape, layer.values.shape) for layer in cache.layers] == [((1, 1, 10, 10), (1, 1, 10, 10))] * 2
    assert outcome.plan.after.kv_bytes == 2 * (9 + 1 + 10) * 4
    assert "a token caches 20 numbers a layer (9 of values, a constant, 10 of keys) in place of 32" in " ".join(outcome.plan.notes)


def test_bfloat16_costs_no_more_than_in_the_original():
    """The constant latent is exact in it, and rounding is relative, so a large constant beside small latents takes no precision from them."""
    original = opened(source())
    save(original.bfloat16(), Path("source"))
    expected = logits(opened("source", dtype=torch.float32))
    run("source", Mla(rank=16))
    before, after = ((logits(opened(folder, dtype=torch.bfloat16)).float() - expected).square().mean().sqrt() for folder in ("source", "out"))
    assert after < 2 * before


def test_refit_brings_part_of_it_back():
    source(noise=1.0, only="weight")
    run("source", Mla(**HALF), place="plain")
    run("source", Mla(**HALF), Refit(), place="fitted")
    plain, fitted = apart("source", "plain", "fitted")
    assert fitted < 0.8 * plain
    before, after = (tensors(Path(folder)) for folder in ("plain", "fitted"))
    changed = {name.partition("0.self_attn.")[2] for name in before if ".0." in name and not torch.equal(before[name], after[name])}
    assert changed == {"q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias", "o_proj.weight"}
    assert all(after[name][8] == CONSTANT for name in after if name.endswith("kv_a_proj_with_mqa.bias"))


def test_refit_changes_nothing_where_nothing_was_lost():
    source()
    run("source", Mla(rank=16), place="plain")
    run("source", Mla(rank=16), Refit(), place="fitted")
    before, after = (tensors(Path(folder)) for folder in ("plain", "fitted"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_other_techniques_make_of_the_result():
    source(num_hidden_layers=3)
    run("source", Mla(**HALF))
    for place, step in enumerate((Narrow(ffn=24), PruneLayers(layers="1"), PruneLayers(layers="1", only="attention"), LowRank(rank=6))):
        run("out", step, Refit(), place=str(place))
        assert logits(opened(str(place))).isfinite().all()
    for step in (Gqa(groups=1), ShareKv(layers="1"), NarrowKv(keep=0.5), Linear(), Mla(rank=4)):
        with pytest.raises(ModelError, match=r"has attention of its own|has no keys and values of their own|has latent attention already|caches latents"):
            run("out", step, place="refused")
    with pytest.raises(ModelError, match=r"deepseek_v3 makes the keys and values of all heads of one latent, .* change their number before mla"):
        run("out", Narrow(heads=2), place="refused")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--rank is 0"),
        ({"rank": 17}, "--rank 17 is more than the 16 numbers of values"),
        ({"rank": 8, "rope_dims": 7}, "--rope-dims is 7, and it should be a multiple of 2"),
        ({"rank": 8, "frequencies": "1,1"}, r"--frequencies 1,1 does not fit: RoPE has 4 frequencies here, and each can have 0 to 2 pairs"),
        ({"rank": 8, "frequencies": "3,1,1,1"}, "--frequencies 3,1,1,1 does not fit"),
        ({"rank": 8, "frequencies": "0,0,0,0"}, "--frequencies 0,0,0,0 does not fit"),
        ({"rank": 8, "frequencies": "1,1,1,1", "rope_dims": 6}, "--frequencies has 4 pairs in sum, and --rope-dims 6"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        planned(**options)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "its queries have a bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "is of the type dynamic"),
        ("mistral", {"sliding_window": 8}, "it has a sliding window"),
        ("qwen2", {}, "biases of queries"),
        ("qwen3", {}, "go through a norm"),
        ("granite", {}, "its scores have a factor of their own"),
        ("gpt_neox", {}, "RoPE does not turn all of its keys"),
        ("gemma2", {}, "its norms stand elsewhere"),
        ("mixtral", {}, "it has experts"),
        ("bert", {}, "it is an encoder"),
        ("fnet", {}, "it is an encoder"),
        ("arcee", {"attention_bias": False, "mlp_bias": False}, "its FFN has no gate"),
        ("deepseek_v3", {}, "has latent attention already"),
    ],
)
def test_what_a_deepseek_v3_cannot_compute_is_refused(kind, changes, message):
    with pytest.raises(ModelError, match=message):
        planned(kind, changes, rank=4)


def test_what_has_a_technique_already_is_refused():
    source()
    run("source", NarrowKv(keep=1), place="narrow")
    with pytest.raises(ModelError, match="something of effconvert's is in it already"):
        run("narrow", Mla(rank=8), place="refused")


def test_a_class_that_needs_other_tensors_is_not_misread():
    source()
    run("source", Mla(**HALF))
    content = json.loads(Path("out/config.json").read_text())
    for key, value, message in (("first_k_dense_replace", 1, "has experts in its other layers"), ("q_lora_rank", 8, "q_lora_rank = 8")):
        Path("out/config.json").write_text(json.dumps({**content, key: value}))
        with pytest.raises(ModelError, match=message):
            open_checkpoint(Path("out"))


def test_more_keys_than_there_are_is_refused_before_they_are_chosen():
    source()
    with pytest.raises(OptionError, match="--rope-dims 18 is more than the 16 numbers of keys"):
        run("source", Mla(rank=8, rope_dims=18))


def test_names_and_options_say_the_size():
    assert Mla(rank=8).label == "mla-8"
    assert Mla(**HALF).label == "mla-8-8"
    assert Mla.allowed_options(planned(**{**HALF, "frequencies": "1,1,1,1"}).checkpoint.config) == "--rank 1 to 16, --rope-dims 2 to 16"
