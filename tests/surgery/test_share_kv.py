"""Layers that read the keys and values of an earlier one, and what both get for it."""

import copy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch

import effconvert.modeling
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.convert.calibration import calibration_bytes
from effconvert.convert.inspection import applicable
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.heal.refit import Refit
from effconvert.modeling.loading import class_of
from effconvert.surgery.attention import _across, _heads
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.share_kv import ShareKv, neighbours, pairs
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.ffn.moe_split import MoeSplit
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.width.narrow import Narrow
from tests.heal.healing import heldout, killed_saving, letters, prose, put, run, tensors
from tests.mixers.mixing import with_cache
from tests.models import logits, save, tiny

PAIRS = {"layers": "1-3/2"}


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def opened(folder):
    return class_of(read_config(Path(folder))).from_pretrained(folder).eval()


@torch.inference_mode()
def apart(*folders):
    """The mean KL(model || converted) on held-out text, in nats a token."""
    ids = heldout()
    expected = opened("model")(ids).logits.log_softmax(-1)
    return [float((expected.exp() * (expected - opened(folder)(ids).logits.log_softmax(-1))).sum(-1).mean()) for folder in folders]


def alike(kind, **changes):
    """A model whose layer 1 sees what layer 0 sees, and projects it to the same keys and values in other bases."""
    model = tiny(kind, num_hidden_layers=2, **changes)
    first, second = (layer.self_attn for layer in model.model.layers)
    draw = torch.Generator().manual_seed(5)
    width = len(first.k_proj.weight) // 4
    turns = torch.polar(torch.rand(4, width // 2, 1, generator=draw) + 0.5, 6 * torch.rand(4, width // 2, 1, generator=draw))
    mixes = torch.linalg.qr(torch.randn(4, width, width, generator=draw)).Q
    with torch.no_grad():
        for name, parameter in model.model.layers[0].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.layers[1].input_layernorm.load_state_dict(model.model.layers[0].input_layernorm.state_dict())
        for suffix in ("weight", "bias"):
            k, v = (getattr(module, suffix) for module in (first.k_proj, first.v_proj))
            if k is not None:
                halves = k.reshape(4, 2, width // 2, -1)
                keys = torch.complex(halves[:, 0], halves[:, 1]) * turns  # one number for each pair of dimensions that RoPE turns
                getattr(second.k_proj, suffix).copy_(torch.stack([keys.real, keys.imag], 1).view_as(k))
                getattr(second.v_proj, suffix).copy_((mixes @ v.reshape(4, width, -1)).view_as(v))
    return model


@pytest.mark.parametrize(("kind", "changes"), [("llama", {"attention_bias": False}), ("llama", {}), ("mistral", {})])
def test_a_reader_that_would_keep_the_same_in_another_basis_loses_nothing(kind, changes):
    save(alike(kind, **changes), Path("model"))
    letters().save_pretrained("model")
    run("model", ShareKv(layers="1"))
    run("model", ShareKv(layers="1", pool="first"), place="first")
    ids = heldout()
    expected, fitted, plain = (opened(folder)(ids).logits for folder in ("model", "out", "first"))
    assert (fitted - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (plain - expected).abs().max() > 0.01 * expected.abs().max()


def test_pooling_across_layers_is_exact_where_the_reader_sees_a_linear_map_of_the_inputs(monkeypatch):
    """Keys and values of layer 1 are those of layer 0 in other bases, of inputs y = A x: pooled, both layers have the scores and outputs that they had."""
    save(alike("llama", attention_bias=False), Path("model"))
    first, second = (open_checkpoint(Path("model")).layer(index, "cpu") for index in (0, 1))
    width, draw = first.config.hidden, torch.Generator().manual_seed(1)
    first["o"] = torch.randn(width, width, generator=draw)
    x, mix = torch.randn(400, width, generator=draw).double(), torch.randn(width, width, generator=draw).double()
    y = x @ mix.T
    second = second.on_top(1, second.config)
    for part in ("k", "v"):
        second[part] = (second[part].double() @ torch.linalg.inv(mix)).float()
    second = second.on_top(1, second.config)
    monkeypatch.setattr(_heads, "second_moment", lambda *_: x.T @ x / len(x))
    monkeypatch.setattr(_across, "_moments", lambda *_: (y.T @ y / len(y), y.T @ x / len(x)))
    old = [(layer["q"].double(), layer["k"].double(), layer["v"].double(), layer["o"].double()) for layer in (first, second)]
    (reader,) = _across.pool_layers(first, [second]).values()
    new = [(first["q"], first["k"], first["v"], first["o"]), (reader["q"], first["k"], first["v"], reader["o"])]
    for rows, before, after in zip((x, y), old, new, strict=True):
        kept = [(rows, before[1], before[2]), (x, after[1].double(), after[2].double())]  # what is projected to keys and values
        scores, outputs = [], []
        for (inputs, k, v), (q, _, _, o) in zip(kept, (before, [part.double() for part in after]), strict=True):
            query, key, value = ((read @ weight.T).unflatten(-1, (4, -1)) for read, weight in ((rows, q), (inputs, k), (inputs, v)))
            scores.append(torch.einsum("thd,shd->hts", query, key))
            outputs.append(value.flatten(1) @ o.T)
        assert (scores[1] - scores[0]).abs().max() < 1e-3 * scores[0].abs().max()
        assert (outputs[1] - outputs[0]).abs().max() < 1e-3 * outputs[0].abs().max()


@pytest.mark.slow
def test_what_is_fitted_to_readers_is_better_and_refit_betters_both():
    put(Path("model"), num_hidden_layers=4)
    for folder, steps in {"first": [ShareKv(**PAIRS, pool="first")], "pca": [ShareKv(**PAIRS)], "healed": [ShareKv(**PAIRS), Refit()]}.items():
        run("model", *steps, place=folder)
    first, pca, healed = apart("first", "pca", "healed")
    assert healed < 0.8 * pca
    assert pca < 0.9 * first
    run("pca", Refit(teacher="model"), place="later")
    assert apart("later")[0] < 0.8 * pca


def test_refit_runs_readers_on_what_the_layer_before_them_has_computed_last():
    """The refit of a reader alone, and then whole: the loss falls at each, which it does not where keys are of another batch."""
    put(Path("model"), num_hidden_layers=4)
    run("model", ShareKv(layers="3", pool="first"), place="plain")
    run("model", ShareKv(layers="3", pool="first"), Refit(), place="healed")
    plain, healed = apart("plain", "healed")
    assert healed < 0.5 * plain


def test_tokens_one_by_one_are_the_whole_text_and_the_cache_has_half_the_layers():
    put(Path("model"), num_hidden_layers=4)
    outcome = run("model", ShareKv(**PAIRS), Refit())
    model, ids = opened("out"), heldout()[:2, :24]
    assert outcome.plan.after.kv_bytes * 2 == outcome.plan.before.kv_bytes
    cache = effconvert.modeling.cache_for(model.config)
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        steps = [model(ids[:, at : at + 6], use_cache=True, **with_cache(model, cache)).logits for at in range(0, 24, 6)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    save(model, Path("again"))
    assert tensors(Path("again")).keys() == tensors(Path("out")).keys()
    assert not any(".1.self_attn.k_proj" in name or ".3.self_attn.v_proj" in name for name in tensors(Path("out")))
    assert torch.equal(logits(opened("again")), logits(model))


@pytest.mark.parametrize("saved", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(monkeypatch, saved):
    put(Path("model"), num_hidden_layers=4)
    steps = (ShareKv(**PAIRS), Refit())
    run("model", *steps, place="whole")
    killed_saving(monkeypatch, saved, lambda: run("model", *steps))
    run("model", *steps)
    whole, out = tensors(Path("whole")), tensors(Path("out"))
    assert whole.keys() == out.keys()
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_a_layer_reads_the_nearest_one_before_it_with_its_window():
    put(Path("model"), "gemma3_text", num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3)
    run("model", ShareKv(last=3), Refit())
    config = read_config(Path("out"))
    assert [config.cache_of(layer) for layer in range(6)] == [0, 1, 2, 1, 2, 1]
    with pytest.raises(OptionError, match="layer 1 has no layer before it with the same window that keeps keys and values, and no technique in its attention"):
        run("model", ShareKv(layers="1-2"), place="none")


def test_other_techniques_go_with_it():
    put(Path("model"), num_hidden_layers=4, mlp_bias=False, attention_bias=False)
    run("model", ShareKv(**PAIRS), MoeSplit(experts=4, active=2), Refit())
    assert read_config(Path("out")).kind == "qwen2_moe"
    assert [read_config(Path("out")).cache_of(layer) for layer in range(4)] == [0, 0, 2, 2]
    logits(opened("out"))
    run("model", Gqa(groups=2, pool="mean"), ShareKv(**PAIRS), Refit(), place="grouped")
    assert plan(open_checkpoint(Path("grouped")), ()).before.kv_bytes * 4 == plan(open_checkpoint(Path("model")), ()).before.kv_bytes


def test_pairs_are_the_cheapest_without_a_common_layer():
    draw = Random(0)
    for kind, layers, types in (("llama", 7, {}), ("gemma3_text", 9, {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 3})):
        config = read_config(save(tiny(kind, num_hidden_layers=layers, **types), Path(f"{kind}-deep")))
        edges = neighbours(config)
        costs = {edge: draw.random() for edge in edges}
        for count in range(1, 4):
            apart = [some for some in combinations(edges, count) if len({layer for edge in some for layer in edge}) == 2 * count]
            cheapest = min(apart, key=lambda some: sum(costs[edge] for edge in some))
            assert sorted(pairs(config, costs, count)) == sorted(cheapest)


@pytest.mark.slow
def test_the_pairs_that_are_chosen_cost_less_than_others():
    put(Path("model"), num_hidden_layers=6)
    outcome = run("model", ShareKv(drop=2), place="chosen")
    layers = outcome.plan.recipe[0]["share-kv"]["layers"]
    assert outcome.plan.after.kv_bytes * 3 == outcome.plan.before.kv_bytes * 2
    others = [f"{first},{second}" for first, second in ((1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 5)) if f"{first},{second}" != layers]
    for number, other in enumerate(others):
        run("model", ShareKv(layers=other), place=str(number))
    chosen, *rest = apart("chosen", *map(str, range(len(others))))
    assert chosen <= 1.2 * min(rest)
    assert chosen < 0.7 * max(rest)


def test_a_layer_without_keys_of_its_own_is_passed_over():
    put(Path("model"), num_hidden_layers=5)
    run("model", PruneLayers(layers="2", only="attention"), ShareKv(layers="3"), place="dropped")
    assert [read_config(Path("dropped")).cache_of(layer) for layer in range(5)] == [0, 1, 2, 1, 4]
    run("model", PruneLayers(layers="2", only="attention"), ShareKv(drop=1), place="chosen")
    run("model", Linear(layers="0"), ShareKv(layers="2"), Refit(), place="mixed", verify=True, text=Path("text.txt"), tokens=64, context=32)
    for folder in ("dropped", "chosen", "mixed"):
        logits(opened(folder))


def test_what_does_not_run_the_original_follows_in_a_command_of_its_own():
    put(Path("model"), num_hidden_layers=4)
    run("model", ShareKv(**PAIRS), place="shared")
    shared = opened("shared")
    run("shared", Narrow(ffn=47))
    ids = heldout()
    error = (opened("out")(ids).logits - shared(ids).logits).abs().mean() / shared(ids).logits.std()
    assert error < 0.1  # one neuron of 48, chosen on what layers with a shared cache compute


def test_the_plan_counts_the_memory_of_the_fit():
    put(Path("model"), num_hidden_layers=4)
    few, many = (run("model", ShareKv(layers=layers), dry_run=True).plan for layers in ("1", "1-3"))
    one = few.surgeries[0].fit_bytes(few.checkpoint.config)
    assert many.surgeries[0].fit_bytes(many.checkpoint.config) == 3 * one > 0
    assert calibration_bytes(replace(many, peak=0)) - calibration_bytes(replace(few, peak=0)) == 2 * one


def test_options_and_models_that_do_not_fit_are_refused():
    put(Path("model"), num_hidden_layers=4)
    refused = {
        "give one of --layers, which names the layers that read; --last, how many at the end; --drop": {},
        "give one of --layers, which": {"layers": "1", "last": 1},
        "--drop 3 is more than the 2 pairs of neighbours of this model": {"drop": 3},
        "--last 4 leaves none of the 4 layers": {"last": 4},
        "layer 0 has no layer before it": {"layers": "0"},
        "it has 4, from 0 to 3": {"layers": "4"},
    }
    for sentence, options in refused.items():
        with pytest.raises(OptionError, match=sentence):
            run("model", ShareKv(**options))
    with pytest.raises(OptionError, match="share-kv reads layers that gqa has not fitted by then; convert twice, gqa first"):
        run("model", Gqa(groups=2), ShareKv(**PAIRS))
    with pytest.raises(ModelError, match="pool heads first, and share the cache afterwards"):
        run("model", ShareKv(**PAIRS), Gqa(groups=2))
    assert not Path("out").exists()
    run("model", ShareKv(layers="1"))
    with pytest.raises(OptionError, match="layer 0 shares its cache with others already"):
        run("out", ShareKv(layers="1"), place="twice")
    with pytest.raises(
        ModelError,
        match="layer 1 of the model reads the keys and values of layer 0, so it cannot run by itself; give the options that prune-layers would choose",
    ):
        run("out", PruneLayers(drop=1), place="pruned")
    with pytest.raises(ModelError, match="layer 1 of the original reads the keys and values"):
        run("model", Refit(teacher="out"), place="refitted")
    with pytest.raises(OptionError, match="other layers read the keys and values of layer 0, so its attention must stay"):
        run("out", PruneLayers(layers="0", only="attention"), place="pruned")
    steps = (ShareKv(layers="2", pool="first"), Refit(), PruneLayers(layers="0"))
    with pytest.raises(
        OptionError, match="prune-layers changes the layers or heads of a shared cache, to which refit is fitted; put prune-layers before refit"
    ):
        run("model", *steps, place="pruned")
    allowed, refusals = applicable(read_config(Path("out")))
    assert not allowed.keys() & {"share-kv", "gqa", "mqa"}
    assert "already; begin from the original" in refusals["share-kv"]
    put(Path("bert"), "bert")
    with pytest.raises(ModelError, match="bert has no keys and values of their own that layers could share"):
        run("bert", ShareKv(layers="1"), place="encoder")
