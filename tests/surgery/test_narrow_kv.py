"""One head of fewer keys and values: exact where nothing is lost, and otherwise what loses least goes."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import effconvert.modeling
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.convert.inspection import applicable
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.modeling.loading import class_of
from effconvert.surgery.attention._heads import Heads
from effconvert.surgery.attention._latents import directions, latents
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.narrow_kv import NarrowKv, turn
from effconvert.surgery.attention.share_kv import ShareKv
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.depth.share_layers import ShareLayers
from effconvert.surgery.width.narrow import Narrow
from tests.heal.healing import apart, goes_on_after_a_kill, heldout, opened, prose, put, run, tensors
from tests.mixers.mixing import in_pieces, with_cache
from tests.models import logits, save, tiny

SAME = 1e-5  # of the largest logit, in float32


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def planned(kind="llama", /, changes=None, **options):
    return plan(open_checkpoint(save(tiny(kind, **(changes or {})), Path("planned"))), (NarrowKv(**options),))


def random_heads(layout="halves", rotary=8, kv_heads=3, shared=2, width=8, hidden=40):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.double)

    q, k, v = (normal(count, width, hidden + 1) for count in (kv_heads * shared, kv_heads, kv_heads))
    inputs = torch.cat([normal(500, hidden) @ normal(hidden, hidden) / 6 + normal(hidden), torch.ones(500, 1, dtype=torch.double)], 1)
    return Heads(q, k, v, normal(hidden, kv_heads * shared, width), inputs.T @ inputs / 500, rotary, layout, False), inputs


def attention(heads, inputs, angles):
    """Scores [H, T, T] of the heads, with RoPE by these angles of each pair [T, P], and the values of each query head [H, T, M]."""
    by_token = []
    for rows in (heads.q, heads.k):
        pairs, rest = heads.pairs(rows)
        turned = torch.einsum("hpm,tm->htp", pairs, inputs.to(pairs.dtype)) * torch.polar(torch.ones_like(angles), angles)
        by_token.append(torch.cat([turned.real, turned.imag, torch.einsum("hdm,tm->htd", rest, inputs)], -1))
    scores = by_token[0] @ by_token[1].repeat_interleave(heads.shared, 0).mT
    return scores, torch.einsum("nhd,hdm,tm->htn", heads.o, heads.v.repeat_interleave(heads.shared, 0), inputs)


def one_head(found, inputs, angles):
    """The same of one head of latents."""
    cos, sin = (function(angles)[None, :, found.pairs] for function in (torch.cos, torch.sin))
    queries = turn(torch.einsum("hdm,tm->htd", found.q, inputs)[None], cos[None], sin[None])[0]
    keys, values = turn((inputs @ found.k.T)[None, None], cos[None], sin[None])[0, 0], inputs @ found.c.T
    keys = torch.cat([keys, values], 1) if queries.shape[-1] > keys.shape[1] else keys
    return queries @ keys.T, torch.einsum("nhr,tr->htn", found.o, values)


@pytest.mark.parametrize(("layout", "rotary"), [("halves", 8), ("interleaved", 8), ("halves", 4), ("", 0)])
def test_all_directions_give_the_same_attention(layout, rotary):
    heads, inputs = random_heads(layout, rotary)
    angles = torch.arange(20, dtype=torch.double)[:, None] * torch.logspace(0, -2, rotary // 2, dtype=torch.double)
    found = latents(heads, 3 * rotary // 2, min(40, 3 * (16 - rotary)))
    (scores, values), (new_scores, new_values) = attention(heads, inputs[:20], angles), one_head(found, inputs[:20], angles)
    difference = new_scores - scores
    difference -= difference.mean(-1, keepdim=True)  # softmax ignores what all keys have in common
    assert difference.abs().max() < 1e-9 * scores.abs().max()
    assert (new_values.sum(0) + found.bias - values.sum(0)).abs().max() < 1e-9 * values.abs().max()  # of all heads, whose weights sum to 1


def test_fewer_tokens_than_inputs_do_even_if_rounding_leaves_a_direction_with_less_than_nothing():
    heads, inputs = random_heads()
    few = inputs[:20]
    unseen = torch.linalg.svd(few - few.mean(0)).Vh[-2]  # a direction in which all these tokens are alike
    broken = few.T @ few / len(few) - 1e-6 * torch.outer(unseen, unseen)
    assert torch.linalg.eigvalsh(broken)[0] < 0
    found, whole = (latents(replace(heads, moment=moment), 4, 6) for moment in (broken, broken + 1e-5 * torch.eye(len(broken))))
    values = [torch.einsum("hdr,rm,tm->thd", some.values, some.c, few) for some in (found, whole)]
    assert (values[0] - values[1]).abs().max() <= 1e-3 * values[1].abs().max()


@pytest.mark.parametrize("rank", [5, 12])
def test_no_other_values_of_that_width_lose_less(rank):
    """Against Eckart and Young, on the values as the output sees them."""
    heads, inputs = random_heads()
    values = torch.einsum("sdm,tm->tsd", heads.v, inputs)
    values = values - values.mean(0)
    grams = torch.einsum("nsrd,nsre->sde", *[heads.o.unflatten(1, (3, -1))] * 2)
    weighted = torch.einsum("sde,tsd->tse", torch.linalg.cholesky(grams), values).flatten(1)
    least = torch.linalg.svdvals(weighted)[rank:].square().sum()
    found = latents(heads, 12, rank)
    _, expected = attention(heads, inputs, torch.zeros(500, 4, dtype=torch.double))
    _, kept = one_head(found, inputs, torch.zeros(500, 4, dtype=torch.double))
    means = torch.einsum("nhd,hd->hn", heads.o, (heads.v @ inputs.mean(0)).repeat_interleave(2, 0))
    error = (kept + means[:, None] - expected).square().sum()
    assert least * (1 - 1e-6) <= error <= least * (1 + 1e-3)


def test_a_direction_that_no_query_asks_for_is_worth_nothing():
    heads, _ = random_heads()
    heads.q[0:2, 1], heads.q[0:2, 5] = 0, 0  # pair 1 of the queries of KV head 0
    found = directions(heads)
    assert found.pair_values[1, 0] < 1e-12 < found.pair_values[0, 0]
    kept = latents(heads, 11, 24)
    assert kept.pairs.bincount(minlength=4).tolist() == [3, 2, 3, 3]


@pytest.mark.parametrize(
    ("kind", "changes", "keep"),
    [
        ("llama", {"num_key_value_heads": 2}, 1),  # with biases
        ("mistral", {"sliding_window": 8}, 1),
        ("smollm3", {}, 1),  # layers without RoPE
        ("cohere2", {}, 1),  # these and windows
        ("gpt_neox", {}, 1),  # RoPE turns a part of each head
        ("gpt2", {}, 0.5),  # without RoPE keys and values of all heads are functions of the M numbers that attention reads
        ("opt", {}, 0.5),
    ],
)
def test_nothing_is_lost_where_all_is_kept_or_all_is_in_the_stream(kind, changes, keep):
    model = tiny(kind, **changes)
    save(model, put(Path("source"), kind, **changes))
    outcome = run("source", NarrowKv(keep=keep))
    assert outcome.plan.is_exact
    assert outcome.plan.after.kv_bytes <= keep * outcome.plan.before.kv_bytes
    expected = logits(model)
    assert (logits(opened("out")) - expected).abs().max() <= SAME * expected.abs().max()


def test_heads_that_compute_the_same_in_other_bases_are_kept_once():
    model = tiny("llama", num_key_value_heads=4, attention_bias=False)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            k, v = (module.weight.view(4, 8, -1) for module in (layer.self_attn.k_proj, layer.self_attn.v_proj))
            turns = torch.polar(torch.rand(2, 4, 1, generator=draw) + 0.5, 6 * torch.rand(2, 4, 1, generator=draw))
            keys = torch.complex(k[:2, :4], k[:2, 4:]) * turns
            k[2:] = torch.cat([keys.real, keys.imag], 1)
            v[2:] = torch.randn(2, 8, 8, generator=draw) @ v[:2]
    save(model, put(Path("source"), num_key_value_heads=4))
    run("source", NarrowKv(keep=0.5))
    assert apart("source", "out")[0] < 1e-6
    run("source", NarrowKv(latents="7+16"), place="less")
    assert apart("source", "less")[0] > 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "phi3", "glm", "smollm3"])
def test_a_token_at_a_time_gives_the_same_logits_padding_nothing_and_saving_the_same(kind):
    put(Path("source"), kind)
    run("source", NarrowKv(keep=0.4))
    model = opened("out")
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        whole, (steps, _) = model(ids).logits, in_pieces(model, ids, [1] * ids.shape[1])
        mask, positions = torch.tensor([[0] * 5 + [1] * 24, [1] * 29]), torch.stack([torch.arange(-5, 24).clamp_min(0), torch.arange(29)])
        rows = torch.cat([torch.cat([ids.new_zeros(1, 5), ids], 1), torch.arange(31, 60)[None]])
        padded = model(rows, attention_mask=mask, position_ids=positions)
    assert (steps - whole).abs().max() <= SAME * whole.abs().max()
    assert (padded.logits[:1, 5:] - whole).abs().max() <= SAME * whole.abs().max()
    assert model.generate(rows, attention_mask=mask, max_new_tokens=2, do_sample=False).shape == (2, 31)
    model.save_pretrained("again")
    assert torch.equal(logits(opened("again")), logits(model))
    assert json.loads(Path("again/config.json").read_text())["effconvert"] == json.loads(Path("out/config.json").read_text())["effconvert"]
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_the_cache_is_as_small_as_the_plan_says():
    put(Path("source"))
    outcome = run("source", NarrowKv(latents="5+9"))
    cache = effconvert.modeling.cache_for(opened("out").config)
    opened("out")(torch.tensor([[3] * 10]), use_cache=True, **with_cache(opened("out"), cache))
    assert [(layer.keys.shape, layer.values.shape) for layer in cache.layers] == [((1, 1, 10, 10), (1, 1, 10, 9))] * 2
    assert outcome.plan.after.kv_bytes == 2 * (10 + 9) * 4


def test_greedy_and_beam_generation_run_from_the_cache():
    put(Path("source"))
    run("source", NarrowKv(keep=0.5))
    model = opened("out")
    ids = torch.arange(3, 20)[None].repeat(2, 1)
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    again = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(greedy, again)
    assert model.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0).shape[1] == 21


def test_the_pair_of_each_angle_survives_bfloat16_and_is_not_trained():
    put(Path("source"))
    save(opened("source").bfloat16(), Path("source"))
    run("source", NarrowKv(latents="5+9"))
    model = class_of(read_config(Path("out"))).from_pretrained("out", dtype=torch.bfloat16)
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert [name.rpartition(".")[2] for name in names] == ["pairs", "pairs"]
    assert all((parameter == parameter.round()).all() for name, parameter in model.named_parameters() if name in names)
    model(torch.arange(3, 20)[None]).logits.float().sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if ".effconvert." in name and name not in names)


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "opt"])
def test_refit_and_transfer_bring_part_of_it_back(kind):
    put(Path("source"), kind, noise=1.0, only="weight")
    run("source", NarrowKv(keep=0.3), place="plain")
    run("source", NarrowKv(keep=0.3), Refit(), place="fitted")
    run("source", NarrowKv(keep=0.3), Transfer(), place="trained")
    plain, fitted, trained = apart("source", "plain", "fitted", "trained")
    assert fitted < 0.95 * plain
    assert trained < plain


def test_refit_changes_nothing_where_nothing_was_lost():
    put(Path("source"))
    run("source", NarrowKv(keep=1), place="plain")
    run("source", NarrowKv(keep=1), Refit(), place="fitted")
    plain, fitted = tensors(Path("plain")), tensors(Path("fitted"))
    assert all(torch.equal(plain[name], fitted[name]) for name in plain)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(monkeypatch):
    put(Path("source"))
    steps = (NarrowKv(keep=0.5), Refit())
    goes_on_after_a_kill(monkeypatch, *steps)


def test_more_is_kept_where_more_would_be_lost():
    """Layer 1's keys and values hardly differ from token to token, so it needs few."""
    model = tiny("llama", num_hidden_layers=3)
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.k_proj, model.model.layers[1].self_attn.v_proj):
            module.weight *= 1e-3
    save(model, put(Path("source"), num_hidden_layers=3))
    outcome = run("source", NarrowKv(keep=0.5))
    sizes = {index: record.options["latents"] for record in outcome.plan.config.replaced for index in record.layers}
    assert sizes[1] == "8+8"
    numbers = [2 * int(pairs) + int(rank) for pairs, rank in (sizes[index].split("+") for index in range(3))]
    assert sum(numbers) in (96 - 1, 96)
    assert outcome.plan.recipe[0]["narrow-kv"]["latents"] == ",".join(sizes[index] for index in range(3))


def test_layers_and_other_techniques_beside_it():
    put(Path("source"), num_hidden_layers=4)
    run("source", PruneLayers(layers="1", only="attention"), NarrowKv(keep=0.5), place="skipping")
    assert {index for record in read_config(Path("skipping")).replaced for index in record.layers} == {0, 2, 3}
    run("source", Gqa(groups=2), NarrowKv(latents="8+8", layers="0,2"), Refit(), place="fewer")
    assert read_config(Path("fewer")).replaced[0].layers == (0, 2)
    ids = heldout()
    with torch.no_grad():
        assert opened("fewer")(ids).logits.isfinite().all()
    for step, message in ((Gqa(groups=1), "fits 2 KV heads"), (ShareKv(layers="2"), "layer 2"), (NarrowKv(keep=0.3), "layer 0 has narrow-kv")):
        with pytest.raises((OptionError, ModelError), match=message):
            run("fewer", step, place="refused")


def test_a_teacher_that_has_it_too_or_other_heads_is_refused():
    put(Path("source"))
    run("source", NarrowKv(latents="8+8"), place="narrow")
    with pytest.raises(OptionError, match="layer 0 of the teacher has narrow-kv too"):
        run("narrow", Narrow(ffn=24), Refit(), place="refused")
    run("source", Narrow(heads=2), place="fewer")
    with pytest.raises(OptionError, match="has 2 query heads and the teacher 4"):
        run("fewer", NarrowKv(latents="8+8"), Refit(teacher="source"), place="refused")
    assert not Path("refused.partial").exists()


def test_layers_that_share_their_attention_are_refused():
    put(Path("source"))
    run("source", ShareLayers(groups=1), place="shared")
    with pytest.raises(OptionError, match="layer 0 shares its attention with others"):
        run("shared", NarrowKv(latents="8+8"), place="refused")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --keep, .* or --latents"),
        ({"keep": 1, "latents": "4+4"}, "give either --keep, .* or --latents"),
        ({"keep": 0}, "--keep is 0, and it should be greater than 0"),
        ({"keep": 1.5}, "--keep is 1.5, and it should be less than or equal to 1"),
        ({"latents": "4"}, "--latents is '4'"),
        ({"latents": "17+8"}, r"--latents 17\+8 does not fit layer 0; it can be 1 to 16\+1 to 32"),
        ({"latents": "0+8", "layers": "0"}, r"--latents 0\+8 does not fit layer 0"),
        ({"latents": "4+4,4+4,4+4"}, "--latents has 3 sizes, and 2 layers are chosen"),
        ({"keep": 1, "layers": "7"}, "names what is no layer"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        planned(**options)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen3", {}, "queries and keys of qwen3 go through a norm"),
        ("olmo", {"clip_qkv": 3.0}, "changes queries or keys beside RoPE"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "changes queries or keys beside RoPE"),
        ("ministral3", {}, "changes queries or keys beside RoPE"),
        ("falcon", {}, "attention of its own"),
        ("bert", {}, "bert is an encoder, and narrow-kv narrows the cache"),
    ],
)
def test_attention_with_more_in_it_is_refused(kind, changes, message):
    with pytest.raises(ModelError, match=message):
        planned(kind, changes, keep=1)


def test_names_and_notes_say_the_size():
    assert NarrowKv(keep=0.5).label == "narrow-kv-0.5"
    assert NarrowKv(latents="4+8").label == "narrow-kv-4+8"
    assert NarrowKv(latents="4+8,4+9").label == "narrow-kv"
    result = planned(latents="8+16")
    assert "50.0% of the numbers in the cache of these layers stay" in " ".join(result.notes)
    assert NarrowKv.allowed_options(result.checkpoint.config) == "--keep R, or --latents 16+32"


def test_inspect_lists_no_technique_for_which_no_layer_is_left():
    put(Path("source"))
    run("source", NarrowKv(latents="8+16"), place="all")
    refusals = applicable(read_config(Path("all")))[1]
    assert refusals["gqa"].startswith("its narrow-kv fits 4 KV heads")
    for name in ("streaming", "linear"):
        assert refusals[name].startswith("this llama has narrow-kv in place of its attention in every layer already"), name
    run("source", NarrowKv(latents="8+16", layers="0"), place="one")
    assert "streaming" in applicable(read_config(Path("one")))[0]


def test_a_size_that_is_spelt_otherwise_is_refused_with_how_it_is_spelt():
    with pytest.raises(OptionError, match=r"^--latents is '4-8', and it should be as in its description: Pairs of numbers that RoPE turns \+ other numbers"):
        NarrowKv(latents="4-8")
