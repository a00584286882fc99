"""Fewer neurons in each FFN: which of them stay, and what they give."""

from pathlib import Path

import pytest
import torch

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal import _layer
from effconvert.heal.refit import Refit
from effconvert.modeling.loading import class_of
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.ffn.moe_split import MoeSplit
from effconvert.surgery.width._fewer import surviving_blocks, survivors
from effconvert.surgery.width.narrow import Narrow
from tests.heal.healing import apart, heldout, killed_saving, letters, opened, prose, put, run, tensors
from tests.models import GROUPING, save, tiny


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def redundant(kind):
    """A model of which every second neuron computes what its neighbour does, or nothing that is read: half of them are enough."""
    model = tiny(kind)
    checkpoint = open_checkpoint(save(model, Path("plain")))
    config, parts = checkpoint.config, checkpoint.config.parts
    with torch.no_grad():
        for layer in model.base_model.get_submodule(config.family.layers):
            for part in ("gate", "up"):
                if part in parts and parts[part] != parts.get("gate" if part == "up" else "up"):
                    for parameter in layer.get_submodule(parts[part]).parameters():
                        rows = parameter.T if config.family.transposed and parameter.ndim == 2 else parameter
                        rows[1::2] = rows[::2]
    save(model, Path("model"))
    letters().save_pretrained("model")
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "starcoder2", "gemma2", "bert", "falcon"])
def test_neurons_that_compute_what_others_do_go_and_nothing_is_lost(kind):
    model = redundant(kind)
    outcome = run("model", Narrow(ffn=24))
    ids = heldout()
    with torch.no_grad():
        expected, found = (each(ids).logits for each in (model, opened("out")))
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert read_config(Path("out")).kind == kind
    assert opened("out").num_parameters() == outcome.plan.after.parameters < outcome.plan.before.parameters


def test_survivors_are_those_that_one_by_one_removal_leaves():
    draw = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(200, 12, generator=draw).double(), torch.randn(5, 12, generator=draw).double()
    hidden[:, 3] = hidden[:, 7] + 0.05 * hidden[:, 1]  # which its others make up for
    gram = hidden.T @ hidden
    alive, scale = list(range(12)), 1e-3 * gram.diagonal().mean() * torch.eye(12, dtype=gram.dtype)

    def error(kept):
        damped = gram + scale
        best = torch.linalg.solve(damped[kept][:, kept], damped[kept]).T  # [12, kept]: what each neuron is, from those that stay
        missing = weights @ (torch.eye(12, dtype=gram.dtype) - torch.zeros(12, 12, dtype=gram.dtype).index_copy(1, torch.tensor(kept), best))
        return float(((missing @ damped) * missing).sum())

    for count in (11, 10, 9, 8):
        alive.remove(min(alive, key=lambda neuron: error([other for other in alive if other != neuron])))
        assert survivors(weights, gram, count).tolist() == alive
    assert survivors(weights, gram, 12).tolist() == list(range(12))


def test_it_is_better_than_the_first_neurons_and_refit_is_better_still():
    put(Path("model"), num_hidden_layers=3)
    run("model", Narrow(ffn=24), place="narrow")
    run("model", Narrow(ffn=24), Refit(), place="healed")
    model = opened("model")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 24:] = 0
    save(model, Path("first"))
    narrow, healed, first = apart("model", "narrow", "healed", "first")
    assert narrow < 0.5 * first
    assert healed < narrow
    run("narrow", Refit(teacher="model"), place="later")
    assert apart("model", "later")[0] < narrow


def test_a_killed_run_goes_on_to_the_same_bytes(monkeypatch):
    put(Path("model"))
    steps = (Narrow(ffn=24), Refit())
    run("model", *steps, place="whole")
    killed_saving(monkeypatch, 1, lambda: run("model", *steps))
    run("model", *steps)
    whole, out = tensors(Path("whole")), tensors(Path("out"))
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_neurons_that_are_silent_on_the_text_stop_nothing():
    model = tiny("llama", mlp_bias=False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    save(model, Path("model"))
    letters().save_pretrained("model")
    run("model", Narrow(ffn=24), Refit())
    assert read_config(Path("out")).ffn == 24


def test_after_dropped_layers_outputs_are_fitted_once_to_what_follows_the_gap(monkeypatch):
    put(Path("model"), num_hidden_layers=5)
    fitted = []
    monkeypatch.setattr(_layer, "refit_stream", lambda layer, part, step: fitted.append((layer.index, part, step)))
    run("model", PruneLayers(layers="2,3"), Narrow(ffn=40), Refit())
    assert fitted == [(0, "down", 2), (1, "down", 8), (2, "o", 9), (2, "down", 10)]


def test_other_steps_follow():
    put(Path("model"), mlp_bias=False, attention_bias=False)
    run("model", Narrow(ffn=32), MoeSplit(experts=4, active=2), Refit())
    assert read_config(Path("out")).kind == "qwen2_moe"
    with pytest.raises(ModelError, match="qwen2_moe has experts in place of an FFN"):
        run("out", Narrow(ffn=12), place="none")


def twins(kind, **changes):
    """A model of which every second query head, with its KV head if that is its own, computes what its neighbour does."""
    model = tiny(kind, **changes)
    config = open_checkpoint(save(model, Path("plain"))).config
    with torch.no_grad():
        for layer in model.base_model.get_submodule(config.family.layers):
            for part in ("q", "k", "v"):
                module, count = layer.get_submodule(config.parts[part]), config.heads if part == "q" else config.kv_heads
                for parameter in module.parameters() if count == 4 else ():
                    heads = parameter.unflatten(0, (4, -1))
                    heads[1::2] = heads[::2]
    save(model, Path("model"))
    letters().save_pretrained("model")
    return model


@pytest.mark.parametrize(
    ("kind", "kv_heads", "left"), [("llama", 2, 2), ("llama", 4, 2), ("qwen2", 1, 1), ("gemma2", 2, 2), ("cohere2", 4, 2), ("qwen3", 2, 2)]
)
def test_heads_that_compute_what_others_do_go_and_nothing_is_lost(kind, kv_heads, left):
    model = twins(kind, num_key_value_heads=kv_heads)
    outcome = run("model", Narrow(heads=2))
    config = read_config(Path("out"))
    assert (config.heads, config.kv_heads, config.head_dim, config.kind) == (2, left, outcome.plan.checkpoint.config.head_dim, kind)
    ids = heldout()
    with torch.no_grad():
        expected, found = (each(ids).logits for each in (model, opened("out")))
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
    assert opened("out").num_parameters() == outcome.plan.after.parameters < outcome.plan.before.parameters


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", [kind for kind in GROUPING if "k_norm" not in FAMILIES[kind].per_kv_head and not FAMILIES[kind].fixed_head_width])
def test_every_family_that_knows_the_width_of_its_heads_opens_with_fewer(kind):
    put(Path("model"), kind, num_key_value_heads=4)
    run("model", Narrow(heads=2, ffn=None if FAMILIES[kind].experts_key else 40), place="out")
    model, info = class_of(read_config(Path("out"))).from_pretrained("out", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert read_config(Path("out")).heads == read_config(Path("out")).kv_heads == 2
    with torch.no_grad():
        assert model.eval()(heldout()).logits.isfinite().all() if FAMILIES[kind].decoder else True


def test_the_head_goes_whose_output_the_others_best_make_up_for():
    draw = torch.Generator().manual_seed(0)
    values, weights = torch.randn(300, 12, generator=draw).double(), torch.randn(5, 12, generator=draw).double()
    values[:, 3:6] = values[:, 6:9] @ torch.randn(3, 3, generator=draw).double() + 0.05 * values[:, :3]
    gram, columns = values.T @ values, torch.arange(12).view(4, 3)
    scale = 1e-3 * gram.diagonal().mean() * torch.eye(12, dtype=gram.dtype)

    def error(kept):
        inputs = columns[kept].flatten()
        best = torch.linalg.solve((gram + scale)[inputs][:, inputs], (gram + scale)[inputs]).T
        missing = weights @ (torch.eye(12, dtype=gram.dtype) - torch.zeros(12, 12, dtype=gram.dtype).index_copy(1, inputs, best))
        return float(((missing @ (gram + scale)) * missing).sum())

    left = surviving_blocks(weights, gram, columns, 3, lambda alive: alive)
    assert left == min(([other for other in range(4) if other != head] for head in range(4)), key=error)
    two = surviving_blocks(weights, gram, columns, 2, lambda alive: alive)
    assert two == min(([other for other in left if other != head] for head in left), key=error)
    assert 0 not in surviving_blocks(weights, gram, columns, 3, lambda alive: [0])


def test_heads_and_neurons_together_and_refit_brings_part_of_it_back():
    put(Path("model"), num_hidden_layers=3, num_key_value_heads=2)
    run("model", Narrow(heads=2, ffn=32), place="narrow")
    run("model", Narrow(heads=2, ffn=32), Refit(), place="healed")
    narrow, healed = apart("model", "narrow", "healed")
    assert healed < 0.95 * narrow
    config = read_config(Path("healed"))
    assert (config.heads, config.kv_heads, config.ffn) == (2, 2, 32)


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("llama", {"num_key_value_heads": 2}, {"heads": 3}, "3 heads do not fit 4 query heads, 2 KV heads and a stream 32 wide; give 2, 4"),
        ("llama", {}, {"heads": 5}, "5 heads do not fit"),
        ("stablelm", {}, {"heads": 2}, "stablelm makes a head as wide as its stream divided"),
        ("gpt2", {}, {"heads": 2}, "gpt2 makes a head as wide"),
        ("olmo2", {}, {"heads": 2}, "a norm goes over all heads of olmo2"),
        ("llama", {}, {}, "give --ffn, .* or --heads"),
    ],
)
def test_heads_that_do_not_fit_are_refused(kind, changes, options, message):
    put(Path("model"), kind, **changes)
    with pytest.raises((OptionError, ModelError), match=message):
        run("model", Narrow(**options))
    assert not Path("out").exists()


def test_what_does_not_fit_is_refused():
    put(Path("model"))
    with pytest.raises(OptionError, match="--ffn 49 is more than the 48 neurons of this model's FFNs; give at most 48"):
        run("model", Narrow(ffn=49))
    put(Path("bloom"), "bloom")
    with pytest.raises(ModelError, match="bloom has 128 neurons in an FFN by definition"):
        run("bloom", Narrow(ffn=64))
    with pytest.raises(OptionError, match="--ffn is 0"):
        Narrow(ffn=0)
    assert not Path("out").exists()


def test_a_narrower_stream_is_refused_with_the_reason(command):
    put(Path("source"))
    told = command("narrow", "source", "--hidden", "16")
    assert told.exit_code == 2
    assert "a head that is tied to the embedding cannot follow its rotation" in told.output
    with pytest.raises(OptionError, match="the width of the stream stays"):
        Narrow(hidden=16)
