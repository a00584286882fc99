"""Pooling by what heads compute: what comes before it is an exact rewrite, and what heads share is found whatever basis they are in."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.reading import read_config
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.families import FAMILIES
from effconvert.heal._activations import Activations
from effconvert.heal._layerwise import LayerRunner
from effconvert.options import RunOptions
from effconvert.surgery.attention._heads import Heads, read_heads
from effconvert.surgery.attention._pooling import align, order, pca_values, pool
from effconvert.surgery.attention.expand_kv import ExpandKv
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mqa import Mqa
from tests.models import ATTENDING, GROUPING, SCALED_BY_POSITION, SETTINGS, UNTURNED, alike, characters, hide, logits, orthogonal, save, tiny, turn

HIDDEN, HEADS, KV, WIDTH = 20, 8, 4, 6
PLAIN = {  # changes to a config without which RoPE is not all that is seen of it, or less than two pairs are
    "gpt_neox": {"rotary_pct": 0.5},
    "stablelm": {"partial_rotary_factor": 0.5},
    "olmo": {"clip_qkv": None},
    "ministral3": {"rope_parameters": {**SCALED_BY_POSITION, "llama_4_scaling_beta": 0.0}},
}
UNCLIPPED = {"olmo": {"clip_qkv": None}}  # what is clipped has no other basis
ROTARY = [(6, "halves"), (6, "interleaved"), (4, "halves"), (4, "interleaved"), (0, "")]  # of WIDTH dimensions, in pairs so
layouts = pytest.mark.parametrize(("rotary", "layout"), ROTARY)
norms = pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(rotary, layout, normed=False, noise=1.0, like=(0, 0, 0, 0)):
    """KV heads that are one of two, which `like` names, and noise, each in a basis of its own; what they read is not white."""
    draw = torch.Generator().manual_seed(2)
    mixed = random(HIDDEN, HIDDEN, seed=1)
    k, v = (random(2, WIDTH, HIDDEN, seed=seed)[list(like)] + noise * random(KV, WIDTH, HIDDEN, seed=seed + 1) for seed in (3, 5))
    q = random(HEADS, WIDTH, HIDDEN, seed=7) * (0.2 + random(HEADS, WIDTH, 1, seed=8).abs())
    o = random(HIDDEN, HEADS, WIDTH, seed=9) * (0.2 + random(1, HEADS, WIDTH, seed=10).abs())
    keys = torch.stack([turn(WIDTH, rotary, layout, draw, normed, dtype=torch.float64) for _ in range(KV)])
    values = torch.stack([orthogonal(WIDTH, draw, torch.float64) for _ in range(KV)])
    twice = [each.repeat_interleave(HEADS // KV, 0) for each in (keys, values)]
    return Heads(twice[0] @ q, keys @ k, values @ v, torch.einsum("mhe,hde->mhd", o, twice[1]), mixed @ mixed.T / HIDDEN, rotary, layout, normed)


def rope(position, rotary, layout):
    """The matrix of RoPE at a position, [D, D]."""
    made = torch.eye(WIDTH, dtype=torch.float64)
    for pair in range(rotary // 2):
        one, other = (pair, pair + rotary // 2) if layout == "halves" else (2 * pair, 2 * pair + 1)
        angle = torch.tensor(position * 10.0 ** (-pair), dtype=torch.float64)
        made[one, one], made[one, other], made[other, one], made[other, other] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
    return made


def scores(some):
    """What the heads make of tokens at positions far and near: [distances, H, N, N]."""
    states, serving = random(5, HIDDEN, seed=11), HEADS // len(some.k)
    queries = torch.einsum("hdm,nm->hnd", some.q, states)
    keys = torch.einsum("hdm,nm->hnd", some.k, states).repeat_interleave(serving, 0)
    return torch.stack([queries @ rope(far, some.rotary, some.layout) @ keys.mT for far in (0, 1, 7, 100)])


def outputs(some):
    """What each query head writes for each state it attends to: [H, M, M]."""
    return torch.einsum("mhd,hdn->hmn", some.o, some.v.repeat_interleave(HEADS // len(some.v), 0))


def score_forms(some):
    """The bilinear forms whose sum, each turned by its own angle, is a score: [H, M, M], complex for each pair and one of what is in none."""
    k, half = some.k.repeat_interleave(HEADS // len(some.k), 0), some.rotary // 2
    if some.layout == "halves":
        first, second = range(half), range(half, some.rotary)
    else:
        first, second = range(0, some.rotary, 2), range(1, some.rotary, 2)
    forms = []
    for one, other in zip(first, second, strict=True):
        query, key = (torch.complex(rows[:, one], rows[:, other]) for rows in (some.q, k))
        forms.append(torch.einsum("hm,hn->hmn", query, key.conj()))
    if some.rotary < WIDTH:
        forms.append(torch.einsum("hdm,hdn->hmn", some.q[:, some.rotary :], k[:, some.rotary :]).to(torch.complex128))
    return forms


def root(second):
    values, vectors = torch.linalg.eigh(second)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def value_error(before, after):
    return float(torch.linalg.norm((outputs(after) - outputs(before)) @ root(before.moment)) ** 2)


def key_error(before, after):
    weight = root(before.moment).to(torch.complex128)
    pairs = zip(score_forms(after), score_forms(before), strict=True)
    return float(sum(torch.linalg.norm(weight @ (one - other) @ weight) ** 2 for one, other in pairs))


def least(forms, groups, ranks):
    """What no choice of one head for each group can go below (Eckart and Young): the singular values beyond the rank of one head."""
    total = 0.0
    for form, rank in zip(forms, ranks, strict=True):
        for stacked in form.unflatten(0, (groups, -1)).flatten(1, 2):
            total += float((torch.linalg.svdvals(stacked)[rank:] ** 2).sum())
    return total


def close(found, expected, by=1e-9):
    return (found - expected).abs().max() <= by * expected.abs().max()


@layouts
def test_pairs_are_taken_apart_and_put_together_again(rotary, layout):
    some = heads(rotary, layout)
    pairs, still = some.pairs(some.k)
    assert pairs.shape == (KV, rotary // 2, HIDDEN)
    assert still.shape == (KV, WIDTH - rotary, HIDDEN)
    assert torch.equal(some.rows(pairs, still), some.k)
    turned = torch.polar(torch.ones(rotary // 2, dtype=torch.float64), 7 * 10.0 ** -torch.arange(rotary // 2, dtype=torch.float64))
    assert close(some.rows(turned[:, None] * pairs, still), rope(7, rotary, layout) @ some.k)


@norms
@layouts
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_aligning_changes_no_score_and_no_output(rotary, layout, normed, groups):
    before = heads(rotary, layout, normed)
    after = align(before, groups)
    assert close(scores(after), scores(before))
    assert close(outputs(after), outputs(before))
    assert groups == KV or not close(after.k, before.k, 0.1)
    if normed:  # and no norm of a head: only signs
        assert close(after.k.abs(), before.k.abs())
        assert close(after.q.abs(), before.q.abs())


@pytest.mark.parametrize("groups", [1, 2])
def test_all_directions_of_the_values_are_the_values(groups):
    before = heads(6, "halves")
    v, o = pca_values(before, groups, KV // groups * WIDTH)
    found = torch.einsum("mhd,hdn->hmn", o, v.repeat_interleave(HEADS // groups, 0))
    assert close(found, outputs(before), 1e-7)  # HIDDEN < 4 * WIDTH: some directions hold nothing


@layouts
def test_putting_heads_in_another_order_changes_nothing_but_the_order(rotary, layout):
    before = heads(rotary, layout)
    after = before.reordered([2, 0, 3, 1])
    own = [4, 5, 0, 1, 6, 7, 2, 3]
    assert torch.equal(scores(after), scores(before)[:, own])
    assert torch.equal(outputs(after), outputs(before)[own])


@layouts
@pytest.mark.parametrize("groups", [1, 2])
def test_pca_loses_as_little_as_can_be_lost(rotary, layout, groups):
    before = heads(rotary, layout)
    after, weight = pool(before, groups, "pca"), root(before.moment)
    assert value_error(before, after) == pytest.approx(least([outputs(before) @ weight], groups, [WIDTH]), rel=1e-4)
    forms = [weight.to(torch.complex128) @ form @ weight.to(torch.complex128) for form in score_forms(before)]
    ranks = [1] * (rotary // 2) + [WIDTH - rotary] * (rotary < WIDTH)
    assert key_error(before, after) == pytest.approx(least(forms, groups, ranks), rel=1e-4)


@layouts
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_pca_loses_less_than_aligning_and_aligning_less_than_the_mean(rotary, layout, noise):
    before = heads(rotary, layout, noise=noise)
    after = {rule: pool(before, 1, rule) for rule in ("pca", "aligned", "mean")}
    for error in (value_error, key_error):
        lost = {rule: error(before, some) for rule, some in after.items()}
        assert lost["pca"] < lost["aligned"] < 0.8 * lost["mean"]


@norms
@layouts
@pytest.mark.parametrize("rule", ["pca", "aligned"])
def test_heads_that_are_one_in_other_bases_become_one_without_loss(rotary, layout, normed, rule):
    before = heads(rotary, layout, normed, noise=0.0)
    after = pool(before, 1, rule)
    assert close(outputs(after), outputs(before), 1e-7)
    assert close(scores(after), scores(before), 1e-7)
    assert not close(scores(pool(before, 1, "mean")), scores(before), 0.1)


def test_an_aligned_mean_is_as_large_as_what_it_is_the_mean_of():
    before = heads(6, "halves", noise=3.0)
    after = pool(before, 2, "aligned")
    for rows, pooled in ((before.k, after.k), (before.v, after.v)):
        sizes = torch.linalg.matrix_norm(rows).unflatten(0, (2, -1)).mean(1)
        assert close(torch.linalg.matrix_norm(pooled), sizes)


@norms
@layouts
def test_heads_that_are_alike_are_put_together(rotary, layout, normed):
    assert order(heads(rotary, layout, normed, noise=0.1, like=(0, 1, 0, 1)), 2) == [0, 2, 1, 3]
    assert order(heads(rotary, layout, normed, noise=0.1, like=(0, 1, 1, 0)), 2) == [0, 3, 1, 2]
    assert order(heads(rotary, layout, normed, noise=0.1, like=(0, 0, 1, 1)), 2) == [0, 1, 2, 3]
    for like, expected in (((0, 1, 0, 1), [0, 2, 1, 3]), ((0, 1, 1, 0), [0, 3, 1, 2])):  # values alone decide, and keys alone
        alike, apart = (heads(rotary, layout, normed, noise=0.1, like=each) for each in ((0, 0, 0, 0), like))
        assert order(replace(alike, v=apart.v, o=apart.o), 2) == expected
        assert order(replace(apart, v=alike.v, o=alike.o), 2) == expected


def load(folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def converted(source, surgery, output, *later):
    options = RunOptions(output=output, calibrate=str(source.parent / "calibration.txt"), calibration_tokens=1024, verify=False)
    convert(str(source), (surgery, *later), options)
    return load(output)


def hidden(kind, like, folder, gains=False, **changes):
    """A model whose KV heads are copies, of those that `like` names, in bases of their own: saved, and what it computes."""
    model = alike(tiny(kind, **UNCLIPPED.get(kind, {}), **changes), like)
    expected = logits(model)
    hide(model, gains)
    assert close(logits(model), expected, 1e-4)  # the bases are the family's own freedom
    source = save(model, folder / "source")
    characters(source)
    return source, expected


@pytest.mark.few(4)
@pytest.mark.parametrize("rule", ["pca", "aligned"])
@pytest.mark.parametrize("kind", GROUPING)
def test_copies_in_bases_of_their_own_become_what_they_were(kind, rule, tmp_path):
    source, expected = hidden(kind, (0, 0, 2, 2), tmp_path, gains=rule == "pca")
    assert close(logits(converted(source, Gqa(groups=2, pool=rule), tmp_path / rule)), expected, 1e-4)
    assert not close(logits(converted(source, Gqa(groups=2, pool="mean"), tmp_path / "mean")), expected, 0.05)


@pytest.mark.few(2)
@pytest.mark.parametrize("rule", ["pca", "aligned"])
@pytest.mark.parametrize("kind", ["llama", "cohere", "glm", "qwen3"])
def test_heads_that_several_query_heads_share_become_what_they_were(kind, rule, tmp_path):
    source, expected = hidden(kind, (0, 0, 2, 2), tmp_path, num_attention_heads=8, hidden_size=64)
    assert close(logits(converted(source, Gqa(groups=2, pool=rule), tmp_path / rule)), expected, 1e-4)


@pytest.mark.parametrize("rule", ["pca", "aligned"])
def test_copies_in_a_gpt2_with_biases_become_the_one_head_of_a_gpt_bigcode(rule, tmp_path):
    source, expected = hidden("gpt2", (0, 0, 0, 0), tmp_path, gains=rule == "pca", activation_function="gelu_new")
    found = converted(source, Mqa(pool=rule), tmp_path / rule)
    assert isinstance(found, transformers.GPTBigCodeForCausalLM)
    assert close(logits(found), expected, 1e-4)
    assert not close(logits(converted(source, Mqa(pool="mean"), tmp_path / "mean")), expected, 0.05)


@pytest.mark.few(2)
@pytest.mark.parametrize("rule", ["pca", "aligned"])
@pytest.mark.parametrize("kind", ["llama", "glm", "qwen3", "olmo2"])
def test_copies_that_lie_apart_are_found(kind, rule, tmp_path):
    source, expected = hidden(kind, (0, 1, 0, 1), tmp_path, gains=rule == "pca")
    found = converted(source, Gqa(groups=2, pool=rule, grouping="similar"), tmp_path / "similar")
    assert close(logits(found), expected, 1e-4)
    found = converted(source, Gqa(groups=2, pool=rule), tmp_path / "adjacent")
    assert not close(logits(found), expected, 0.05)


@pytest.mark.parametrize("kind", ["llama", "phi3", "olmo2"])
def test_heads_that_are_repeated_and_pooled_in_one_run_are_what_they_were(kind, tmp_path):
    model = tiny(kind, num_key_value_heads=2)
    source = save(model, tmp_path / "source")
    characters(source)
    found = converted(source, ExpandKv(), tmp_path / "out", Gqa(groups=2))
    assert found.config.num_key_value_heads == 2
    assert close(logits(found), logits(model), 1e-4)


def test_what_is_computed_in_float64_is_stored_in_the_type_of_the_checkpoint(tmp_path):
    source = save(tiny("llama").to(torch.bfloat16), tmp_path / "source")
    characters(source)
    assert {parameter.dtype for parameter in converted(source, Gqa(groups=2), tmp_path / "out").parameters()} == {torch.bfloat16}


def test_copies_that_lie_apart_are_found_for_a_plain_mean_too(tmp_path):
    model = alike(tiny("llama"), (0, 1, 0, 1))
    source = save(model, tmp_path / "source")
    characters(source)
    found = converted(source, Gqa(groups=2, pool="mean", grouping="similar"), tmp_path / "similar")
    assert close(logits(found), logits(model), 1e-5)


@pytest.mark.parametrize("surgery", [Gqa(groups=4), Gqa(groups=4, grouping="similar"), Gqa(groups=4, pool="aligned"), Gqa(groups=2, pool="mean")])
def test_what_needs_no_text_asks_for_none(surgery, tmp_path):
    source = save(tiny("llama"), tmp_path / "source")  # it has no tokenizer
    assert not surgery.needs_calibration(read_config(source))
    convert(str(source), (surgery,), RunOptions(output=tmp_path / "out", verify=False))
    same = (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert same == (surgery.groups == 4)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "mistral"])  # with biases and without
def test_what_is_weighed_is_the_mean_square_of_what_the_projections_read(kind, tmp_path):
    model = tiny(kind)
    planned = plan(open_checkpoint(save(model, tmp_path / "source")), (Gqa(groups=4),))
    ids = torch.randint(3, 128, (6, 20), generator=torch.Generator().manual_seed(0))  # more than one batch
    read = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: read.append(args[0].double().flatten(0, 1)))
    model(ids)
    biased = model.config.to_dict().get("attention_bias", False)
    states = torch.cat([read[0], torch.ones(len(read[0]), biased)], 1)
    outer = [model.outer for model in planned.models("cpu")]
    activations = Activations(planned.checkpoint, planned.teacher, outer, ids.split(2))
    found = read_heads(planned.models("cpu", activations)[-1].layers[0])
    assert close(found.moment, states.T @ states / len(states), 1e-5)
    projected = torch.einsum("hdm,nm->nhd", found.q, states).flatten(1)
    assert close(projected, model.model.layers[0].self_attn.q_proj(read[0].float()).double(), 1e-5)


@pytest.mark.parametrize("kind", GROUPING)
def test_models_with_normed_queries_get_a_sentence(kind):
    config = Config({**SETTINGS[kind], "model_type": kind}, FAMILIES[kind])
    assert bool(Gqa(groups=2).notes(config)) == ("q_norm" in FAMILIES[kind].parts or kind in UNCLIPPED)
    assert ("clipped" in Gqa(groups=2).notes(config)) == (kind in UNCLIPPED)
    assert not Gqa(groups=2, pool="mean").notes(config)
    assert Gqa(groups=4).notes(config) == "the model has 4 KV heads already, so nothing changes"


@pytest.mark.parametrize("kind", ATTENDING)
@torch.inference_mode()
def test_the_dimensions_that_a_family_turns_are_those_of_its_row(kind, tmp_path):
    model = tiny(kind, **PLAIN.get(kind, {}))
    if FAMILIES[kind].norms_turned:  # gains after RoPE are no part of it
        model.base_model.get_submodule(FAMILIES[kind].layers)[0].get_submodule(FAMILIES[kind].parts["q_norm"]).weight.data.fill_(1)
    config = read_config(save(model, tmp_path / "source"))
    base, family = model.base_model, config.family
    ids = torch.full((1, 48), 7)  # one token, so that in the first layer only positions differ
    outside = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith(f"{family.layers}.")}
    runner = LayerRunner(config, outside, [ids], torch.device("cpu"))
    layer = base.get_submodule(family.layers)[0]
    [look] = runner.run(0, dict(layer.named_parameters()), runner.begin(), ("q",))
    for index in UNTURNED.get(kind, ()):
        [later] = runner.run(index, base.get_submodule(family.layers)[index].state_dict(), [look.out], ("q",))  # of causal attention no position sees another
        assert close(later.query, later.query[:, :, :1].expand_as(later.query), 1e-5)
        assert (config.rotary_of(0), config.rotary_of(index)) == (config.rotary, 0)
    query = look.query[0]  # [H, T, D]
    if config.normed:  # before RoPE the query of the first position, which is turned by nothing
        plain = query[:, :1].expand_as(query)
    else:
        plain = layer.get_submodule(family.parts["q"])(look.inputs["q"])[0]
        width, heads = config.head_dim, config.heads
        plain = plain.unflatten(1, (heads, 3, width))[:, :, 0] if family.per_head else plain[:, : heads * width].unflatten(1, (heads, width))
        plain = plain.movedim(0, 1)
        plain = plain * query.norm() / plain.norm()  # opt scales its queries
    turned = (query - plain).abs().amax((0, 1)) > 1e-4 * plain.abs().max()
    assert turned.nonzero().flatten().tolist() == list(range(config.rotary))
    half = config.rotary // 2
    pairs = {"halves": [(j, j + half) for j in range(half)], "interleaved": [(2 * j, 2 * j + 1) for j in range(half)], "": []}
    kept = {name: all(close(query[..., both].norm(dim=-1), plain[..., both].norm(dim=-1), 1e-4) for both in map(list, made)) for name, made in pairs.items()}
    assert [name for name, alike in kept.items() if alike] == ([family.rope, ""] if half else list(pairs))
