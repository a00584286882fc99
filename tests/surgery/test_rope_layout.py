"""Families whose RoPE turns other pairs: the order of a head, what becomes of config.json, equal logits, the way back, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from effconvert.checkpoint.config import Config
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal.refit import Refit
from effconvert.surgery._rope import laid_out_anew, split_pairs
from effconvert.surgery.attention._angles import part_of
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mla import Mla
from effconvert.surgery.attention.rope import Rope
from effconvert.surgery.attention.rope_layout import RopeLayout
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.projections.low_rank import LowRank
from tests.heal.healing import letters, opened, prose, run
from tests.mixers.mixing import stock_config
from tests.models import alike, logits, on_disk, save, tiny

UNBIASED = {"attention_bias": False, "mlp_bias": False}  # so that every family has room for what there is
FIRST = [("ernie4_5", "llama"), ("helium", "llama"), ("glm", "llama"), ("phi3", "llama"), ("llama", "ernie4_5")]
FIRST += [("gptj", "phi"), ("codegen", "phi"), ("roformer", "jina_embeddings_v3")]
PLAIN = [("llama", "helium"), ("llama", "phi3"), ("llama", "glm"), ("phi3", "glm"), ("glm", "phi3")]  # without biases
IN_FLOAT32 = ("ernie4_5", "helium", "roformer")  # whose classes compute something in float32 always, or keep sines and cosines so
ORDERS = [(8, "halves"), (8, "interleaved"), (4, "halves"), (4, "interleaved")]  # of a head of 8: how many numbers RoPE turns, and its layout


def build(kind, **changes):
    """A tiny model; RoFormer's sines and cosines are not random."""
    model = tiny(kind, **changes)
    if kind == "roformer":
        table = model.roformer.encoder.embed_positions
        table.weight.data = table.create_weight()
    return model


def put(model, folder="source"):
    """Write a model with a tokenizer, and a text for what looks at one."""
    Path("text.txt").write_text(prose())
    save(model, Path(folder))
    letters().save_pretrained(folder)
    return model


def said(folder):
    return json.loads(Path(folder, "config.json").read_text())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def turned(rows, count, layout):
    """RoPE of rows [T, 8] at positions 0, 1, ...: the first four pairs have angles, whatever `count` of them there are; in float64, by complex numbers."""
    first, second, rest = split_pairs(rows, count, layout)
    angles = torch.arange(len(rows))[:, None] * torch.tensor([1.0, 0.1, 0, 0]).double()[: count // 2]
    pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag, rest], -1)


@pytest.mark.parametrize("after", ORDERS)
@pytest.mark.parametrize("before", ORDERS)
def test_scores_are_the_same_in_every_order(before, after):
    """Of the pairs of a whole head, the last two have the frequency 0."""
    query, key = random(20, 8), random(20, 8, seed=1)
    if before[0] == 4:
        query[:, 4:] *= 3  # the rest matters
    expected = turned(query, *before) @ turned(key, *before).T
    found = turned(laid_out_anew(query, *before, *after), *after) @ turned(laid_out_anew(key, *before, *after), *after).T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert torch.equal(laid_out_anew(laid_out_anew(query, *before, *after), *after, *before), query)


def test_rows_go_where_they_should():
    rows = torch.arange(8)
    assert laid_out_anew(rows, 8, "interleaved", 8, "halves").tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert laid_out_anew(rows, 4, "interleaved", 4, "halves").tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert laid_out_anew(rows, 4, "interleaved", 8, "halves").tolist() == [0, 2, 4, 5, 1, 3, 6, 7]
    assert laid_out_anew(rows, 8, "halves", 4, "halves").tolist() == [0, 1, 4, 5, 2, 3, 6, 7]  # those that stand still go last


def test_a_part_of_a_head_is_as_many_numbers_as_it_was():
    """Classes round down what they multiply: 30 / 44 * 44 is less than 30."""
    for width in range(2, 260, 2):
        for count in range(2, width + 1, 2):
            rope = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": part_of(count, width)}}
            assert Config({"model_type": "glm", "head_dim": width, **rope}, FAMILIES["glm"]).rotary == count


@pytest.fixture(scope="module", params=[*FIRST, *(pytest.param(pair, marks=pytest.mark.slow) for pair in PLAIN)], ids="-".join)
def pair(request, tmp_path_factory):
    """A model, and what came of it: the family before, both models."""
    kind, to = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-{to}")
    model = build(kind, **(UNBIASED if (kind, to) in PLAIN else {}))
    save(model, folder / "source")
    letters().save_pretrained(folder / "source")
    run(folder / "source", RopeLayout(to=to), place=folder / "out")
    found = opened(folder / "out")
    assert type(found).__name__ == FAMILIES[to].lm
    return {kind, to}, model, found


def test_no_logit_changes(pair):
    _, model, found = pair
    expected = logits(model, 60)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(found, 60), expected, rtol=1e-5, atol=1e-5)


def test_no_logit_changes_but_by_rounding_in_float64(pair):
    kinds, model, found = pair
    if kinds & {*IN_FLOAT32}:
        pytest.skip("one of the classes computes in float32")
    expected, got = (logits(one.double()) for one in (model, found))
    model.float(), found.float()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_padding_and_the_cache_do_the_same(pair):
    _, model, found = pair
    ids = torch.arange(10, 30)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected, got = (one(ids, attention_mask=mask).logits[mask.bool()] for one in (model, found))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if "lm_head" in dict(model.named_children()) and model.can_generate():
        first, second = (one.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0) for one in (model, found))
        assert torch.equal(first, second)


def test_these_are_all_pairs():
    assert {*FIRST, *PLAIN} == {(kind, to) for kind, family in FAMILIES.items() for to in family.relaid}


BOTH_WAYS = [(kind, to) for kind, to in [*FIRST, *PLAIN] if kind in FAMILIES[to].relaid]


@pytest.mark.parametrize(("kind", "to"), BOTH_WAYS, ids=map("-".join, BOTH_WAYS))
def test_the_way_back_gives_the_same_bits(kind, to):
    put(build(kind, **(UNBIASED if (kind, to) != ("llama", "ernie4_5") else {})).bfloat16())
    run("source", RopeLayout(to=to), place="there")
    run("there", RopeLayout(to=kind), place="back")
    before, there, after = (on_disk(Path(folder)) for folder in ("source", "there", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    q = "model.layers.0.self_attn.q_proj.weight"
    if q in before and q in there:  # else it is fused with others
        assert torch.equal(there[q], before[q]) == (FAMILIES[kind].rope == FAMILIES[to].rope)
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in ("source", "back"))
    assert {key for key in ours.keys() | UNBIASED.keys() if ours.get(key, False) != theirs.get(key, False)} == {"_name_or_path"}


def test_a_base_goes_by_the_width_of_a_head_where_all_of_it_turns():
    put(build("glm", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5}, **UNBIASED))
    outcome = run("source", RopeLayout(to="llama"), place="there")
    assert said("there")["rope_parameters"] == {"rope_type": "proportional", "rope_theta": 250000.0, "factor": 4.0, "partial_rotary_factor": 0.5}
    assert "frequency 0" in " ".join(outcome.plan.notes)
    run("there", RopeLayout(to="glm"), place="back")
    assert said("back")["rope_parameters"] == {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0, "partial_rotary_factor": 0.5}
    for folder in ("there", "back"):
        torch.testing.assert_close(logits(opened(folder)), logits(opened("source")), rtol=1e-5, atol=1e-5)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONG_HALF = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
HALF = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("kind", "to", "rope", "more"),
    [
        ("ernie4_5", "llama", LLAMA3, {}),
        ("helium", "llama", YARN, {}),
        ("helium", "llama", {"rope_type": "dynamic", "factor": 2.0}, {}),
        ("phi3", "llama", LONG, {"original_max_position_embeddings": 16}),
        ("phi3", "glm", LONG_HALF | HALF, {"original_max_position_embeddings": 16}),
    ],
    ids=lambda value: value.get("rope_type") if isinstance(value, dict) else value,
)
def test_scaled_angles_stay_as_they_are(kind, to, rope, more):
    put(build(kind, rope_parameters={"rope_theta": 1e3, **rope}, **more))
    run("source", RopeLayout(to=to))
    for length in (12, 60):
        torch.testing.assert_close(logits(opened(), length), logits(opened("source"), length), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "to"), [*FIRST, *PLAIN], ids=map("-".join, [*FIRST, *PLAIN]))
def test_what_a_config_leaves_out_is_said_for_the_other_class(kind, to):
    """The default sizes of both classes, from an empty config.json."""
    family = FAMILIES[kind]
    unbiased = {key: False for key in family.biased if key} if (kind, to) in PLAIN else {}
    before = Config({"model_type": kind, "architectures": [family.lm], **unbiased}, family)
    after = RopeLayout(to=to).config(before)
    ours, theirs = (AutoConfig.for_model(**config.raw) for config in (before, after))
    same = ["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size", "tie_word_embeddings"]
    same += ["bos_token_id", "eos_token_id", "pad_token_id"]
    assert {key: getattr(ours, key, None) for key in same} == {key: getattr(theirs, key, None) for key in same}
    for names in (("hidden_act", "activation_function"), ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), ("intermediate_size", "n_inner")):
        first, second = ([getattr(one, name) for name in names if hasattr(one, name)] for one in (ours, theirs))
        assert first == second or (first, second) == ([None], [4 * ours.hidden_size])  # of n_inner
    for one, config in ((ours, before), (theirs, after)):
        assert getattr(one, "num_key_value_heads", one.num_attention_heads) == config.kv_heads
        assert (getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads) == config.head_dim
    assert not {"rotary_dim", "n_embd", "n_head", "embedding_size", "rope_theta", "partial_rotary_factor"} & after.raw.keys()


def test_techniques_that_know_the_new_family_apply():
    put(build("ernie4_5", use_bias=False))
    run("source", RopeLayout(), Mla(rank=32))
    assert type(opened()).__name__ == "DeepseekV3ForCausalLM"
    torch.testing.assert_close(logits(opened()), logits(opened("source")), rtol=1e-4, atol=1e-4)
    put(alike(build("glm"), (0, 0, 2, 2)), "doubled")
    run("doubled", RopeLayout(), Gqa(groups=2), place="pooled")
    torch.testing.assert_close(logits(opened("pooled")), logits(opened("doubled")), rtol=1e-4, atol=1e-4)


def test_who_asks_for_a_technique_that_the_old_family_has_not_is_told_the_way():
    with pytest.raises(ModelError, match=r"gptj has attention of its own.*; `effconvert rope-layout` writes it as a phi, where it can"):
        Gqa(groups=1).check(stock_config(build("gptj")))


@pytest.mark.parametrize(("kind", "step"), [("roformer", Linear(feature="elu")), ("glm", LowRank(rank=6, parts="gate"))])
def test_a_place_that_the_old_family_has_not_is_there(kind, step):
    put(build(kind))
    run("source", RopeLayout(), place="there")
    run("there", step, place="later")
    run("source", RopeLayout(), step, place="at-once")
    first, second = (on_disk(Path(folder)) for folder in ("later", "at-once"))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_healing_behind_it_is_what_it_is_in_the_new_family():
    put(build("glm"))
    run("source", RopeLayout(), place="there")
    run("there", Gqa(groups=2), Refit(), place="later")
    run("source", RopeLayout(), Gqa(groups=2), Refit(), place="at-once")
    torch.testing.assert_close(logits(opened("at-once")), logits(opened("later")), rtol=1e-3, atol=1e-3)


def test_bare_models_and_their_poolers():
    whole = build("roformer")
    put(whole.roformer)
    run("source", RopeLayout())
    found, ids = opened(), torch.arange(5, 25)[None]
    assert torch.equal(found.pooler.dense.weight, torch.zeros(32, 32))
    torch.testing.assert_close(found(ids).last_hidden_state, whole.roformer(ids).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "step", "error", "reason"),
    [
        ("glm", {}, RopeLayout(to="phi3"), OptionError, "no place for the bias of k, q, v; give llama"),
        ("llama", {}, RopeLayout(to="phi"), OptionError, "give ernie4_5 or helium or phi3 or glm"),
        ("llama", {"head_dim": 16, **UNBIASED}, RopeLayout(to="helium"), OptionError, "as wide as the stream"),
        ("phi3", {"sliding_window": 8}, RopeLayout(), ModelError, "as a llama, its layers have a sliding window"),
        ("glm", {"rope_parameters": {**LLAMA3, **HALF}}, RopeLayout(), ModelError, "would turn 8 of 16 numbers"),
        ("glm", {"rope_parameters": {"rope_type": "default", **HALF, "rope_theta": 1e20}}, RopeLayout(), ModelError, "float32 does not"),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}, **UNBIASED}, RopeLayout(to="phi3"), OptionError, "is llama3, and Phi3Model knows"),
        ("phi3", {"rope_parameters": {**LONG_HALF, **HALF}}, RopeLayout(to="llama"), OptionError, "longrope would turn 4 of 8 numbers .*; give glm"),
        ("roformer", {"embedding_size": 16}, RopeLayout(), ModelError, "as wide as the layers"),
        ("roformer", {"hidden_act": "relu"}, RopeLayout(), ModelError, "has gelu where this roformer has relu"),
        ("cohere", {}, RopeLayout(), ModelError, "turns neighbours.* otherwise the same; rope-layout takes llama, phi3"),
        ("qwen2", {}, RopeLayout(), ModelError, "half a head apart, as most programs expect"),
        ("gpt2", {}, RopeLayout(), ModelError, "gpt2 has no RoPE"),
        ("ernie4_5", {}, Rope(), ModelError, "has RoPE already; rope-layout changes its pairs"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_reason(kind, changes, step, error, reason):
    put(build(kind, **changes))
    with pytest.raises(error, match=reason):
        run("source", step)
    assert not Path("out").exists()


def test_what_effconvert_put_in_and_other_sines_are_refused():
    put(build("llama"))
    run("source", Linear(feature="elu", layers="1"), place="mixed")
    with pytest.raises(ModelError, match="parts of effconvert in it"):
        run("mixed", RopeLayout())
    put(tiny("bert"), "bert")
    run("bert", Rope(theta=500.0, fit="none"), place="turned")
    with pytest.raises(ModelError, match="not those of RoPE with the base 10000"):
        run("turned", RopeLayout())
