"""One FFN for several layers: which neurons it has, what it gives, and what each layer keeps of its own."""

from pathlib import Path

import pytest
import torch

import effconvert.modeling
from effconvert.checkpoint.reading import read_config
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.modeling.loading import class_of
from effconvert.surgery._ridge import Moments
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.ffn import _common
from effconvert.surgery.ffn.share_ffn import ShareFfn
from effconvert.surgery.projections.low_rank import LowRank
from effconvert.surgery.width.narrow import Narrow
from tests.heal.healing import heldout, killed_saving, letters, prose, put, run, tensors
from tests.mixers.mixing import with_cache
from tests.models import logits, save, tiny

DEPTH = {"gpt2": "n_layer", "distilbert": "n_layers"}


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def opened(folder):
    return class_of(read_config(Path(folder))).from_pretrained(folder).eval()


def build(kind="llama", layers=3, **changes):
    return tiny(kind, **{DEPTH.get(kind, "num_hidden_layers"): layers}, **changes)


def stored(model, folder="model"):
    save(model, Path(folder))
    letters().save_pretrained(folder)
    return folder


@torch.inference_mode()
def apart(*folders):
    """The mean KL(model || converted) on held-out text, in nats a token."""
    ids = heldout()
    expected = opened("model")(ids).logits.log_softmax(-1)
    return [float((expected.exp() * (expected - opened(folder)(ids).logits.log_softmax(-1))).sum(-1).mean()) for folder in folders]


def equal_ffns(kind, layers=3):
    """A model whose layers have the same FFN, and its neurons in another order in the last one."""
    model = build(kind, layers)
    family = FAMILIES[kind]
    blocks = model.base_model.get_submodule(family.layers)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for part in ("gate", "up", "down"):
            if part in family.parts:
                state = blocks[0].get_submodule(family.parts[part]).state_dict()
                for block in blocks[1:]:
                    block.get_submodule(family.parts[part]).load_state_dict(state)
        for part in {family.parts[part]: part for part in ("gate", "up", "down") if part in family.parts}.values():
            for name, parameter in blocks[-1].get_submodule(family.parts[part]).named_parameters():
                rows = parameter.T if family.transposed and parameter.ndim == 2 else parameter
                if part == "down":
                    rows.copy_(rows[:, order]) if name == "weight" else None
                else:
                    rows.copy_(torch.cat([half[order] for half in rows.split(48)]))
    return model


@pytest.mark.few(2)
@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gemma2", "bert", "opt", "falcon", "distilbert"])
def test_layers_that_have_the_same_ffn_lose_nothing(kind, gains):
    more = {"layer_types": ["full_attention"] * 2} if kind == "gemma2" else {}
    model = equal_ffns(kind, 2 if more else 3)
    stored(model)
    outcome = run("model", ShareFfn(gains=gains))
    found = logits(opened("out"))
    expected = logits(model)
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()
    assert opened("out").num_parameters() == outcome.plan.after.parameters < outcome.plan.before.parameters


def test_gains_and_shift_are_those_of_least_squares():
    draw = torch.Generator().manual_seed(0)
    hidden, wanted = torch.randn(400, 6, generator=draw).double(), torch.rand(6, generator=draw).double() + 0.5
    down, shift = torch.randn(4, 7, generator=draw).double(), torch.randn(4, generator=draw).double()
    one = torch.ones(400, 1).double()
    outputs = (hidden * wanted) @ down[:, :6].T + down[:, 6] + shift
    sums = Moments(), Moments()
    for moments, rows in zip(sums, (slice(0, 300), slice(300, 400)), strict=True):
        moments.add(torch.cat([hidden, one], 1)[rows], outputs[rows])
    gain, found = _common.fit_own(sums, down)
    torch.testing.assert_close(gain.double(), wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.double(), shift, atol=1e-3, rtol=0)
    nothing = torch.randn(400, 4, generator=draw).double()  # which no gain explains
    for moments, rows in zip(sums, (slice(0, 300), slice(300, 400)), strict=True):
        moments.cross = nothing[rows].T @ torch.cat([hidden, one], 1)[rows] * 0 + down @ moments.gram
    assert torch.equal(_common.fit_own(sums, down)[0], torch.ones(6))


@pytest.mark.parametrize("biased", [True, False])
def test_sums_for_the_common_projection_are_those_of_scaled_neurons_and_shifted_outputs(biased):
    draw = torch.Generator().manual_seed(0)
    hidden, outputs, shift = torch.randn(50, 6, generator=draw).double(), torch.randn(50, 4, generator=draw).double(), torch.randn(4, generator=draw).double()
    gain, down = torch.rand(6, generator=draw).double(), torch.randn(4, 6 + biased, generator=draw).double()
    sums, expected, found = Moments(), Moments(), Moments()
    one = torch.ones(50, 1).double()
    sums.add(torch.cat([hidden, one], 1), outputs)
    scaled = torch.cat([hidden * gain, one], 1)[:, : 6 + biased]
    for _ in range(2):
        expected.add(scaled, outputs - shift - scaled @ down.T)
        _common._add(found, sums, gain, shift, down)
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(found.cross, expected.cross)


@pytest.mark.slow
def test_gains_are_better_and_a_wide_ffn_and_refit_are_better_still():
    stored(build(layers=4))
    run("model", ShareFfn(gains=False), place="plain")
    run("model", ShareFfn(), place="gains")
    run("model", ShareFfn(width=144), place="wide")
    run("model", ShareFfn(), Refit(), place="healed")
    plain, gains, wide, healed = apart("plain", "gains", "wide", "healed")
    assert gains < 0.9 * plain
    assert wide < 0.9 * gains
    assert healed < 0.95 * gains
    assert read_config(Path("wide")).ffn == 144


def test_what_is_shared_is_stored_once_and_each_layer_keeps_its_gains():
    stored(build(layers=4))
    run("model", ShareFfn(layers="1-3"))
    before, after = tensors(Path("model")), tensors(Path("out"))
    assert {name.split(".")[2] for name in before.keys() - after.keys()} == {"2", "3"}
    own = {name: tensor for name, tensor in after.items() if ".effconvert." in name}
    assert {(name.split(".")[2], name.rpartition(".")[2]) for name in own} == {(layer, part) for layer in "123" for part in ("gain", "shift")}
    assert not any(torch.equal(own[f"model.layers.{layer}.mlp.down_proj.effconvert.gain"], torch.ones(48)) for layer in (1, 2, 3))
    assert torch.equal(before["model.layers.0.mlp.down_proj.weight"], after["model.layers.0.mlp.down_proj.weight"])
    model = opened("out")
    assert model.model.layers[3].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    model.save_pretrained("again")
    assert tensors(Path("again")).keys() == after.keys()
    assert torch.equal(logits(opened("again")), logits(model))
    model.train()
    model(torch.arange(3, 12)[None]).logits.square().mean().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad.abs().sum() > 0
    ids = torch.arange(3, 20)[None]
    model.eval()
    cache = effconvert.modeling.cache_for(model.config)
    parts = [model(piece, **with_cache(model, cache)).logits for piece in (ids[:, :9], ids[:, 9:])]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits)


def test_groups_share_one_by_one():
    stored(build(layers=5))
    run("model", ShareFfn(layers="1-4", group=2))
    assert [(record.what, record.layers) for record in read_config(Path("out")).shared] == [("ffn", (1, 2)), ("ffn", (3, 4))]
    pairs, all_four = (run("model", ShareFfn(layers="1-4", group=group), place=f"by{group}").plan.after.parameters for group in (2, 4))
    assert pairs > all_four
    assert apart("by2")[0] < apart("by4")[0]


def test_few_huge_tokens_do_not_decide():
    """A token that has a direction of its own and a thousand times the energy of the others."""
    model = build(layers=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[20] *= 1000
    stored(model)
    run("model", ShareFfn())
    huge = apart("out")[0]
    stored(build(layers=3))
    run("model", ShareFfn(), place="even")
    assert huge < 3 * apart("even")[0] + 0.05


@pytest.mark.few(4)
@pytest.mark.parametrize("saved", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(saved, monkeypatch):
    stored(build(layers=4))
    step = ShareFfn(layers="1-3")
    run("model", step, place="whole")
    killed_saving(monkeypatch, saved, lambda: run("model", step))
    run("model", step)
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_other_steps_come_before_and_after():
    stored(build(layers=4))
    run("model", PruneLayers(layers="1"), ShareFfn(layers="1,2"), Refit())
    assert read_config(Path("out")).layers == 3
    run("model", ShareFfn(layers="1,2"), PruneLayers(layers="0"), place="later")
    assert read_config(Path("later")).shared[0].layers == (0, 1)
    with pytest.raises(OptionError, match=r"share-ffn reads layers that narrow has not fitted by then; convert twice, narrow first"):
        run("model", Narrow(ffn=24), ShareFfn())


@pytest.mark.slow
def test_transfer_trains_the_gains_and_not_what_is_shared():
    stored(build(layers=4))
    run("model", ShareFfn(), place="shared")
    run("model", ShareFfn(), Transfer(epochs=2), place="trained")
    before, after = tensors(Path("shared")), tensors(Path("trained"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".effconvert." in name for name in changed)


def test_what_does_not_fit_is_refused():
    stored(build(layers=4))
    for step, told in {
        ShareFfn(layers="1"): "layer 1 shares with no other; name two layers or more for each FFN",
        ShareFfn(layers="0-2", group=2): "layer 2 shares with no other",
        ShareFfn(width=193): r"--width 193 is more than the 192 neurons that these layers have together; give at most that",
        ShareFfn(width=97, group=2): "more than the 96 neurons",
        ShareFfn(layers="0,1", width=64): "config.json has one width for all layers, and --layers leaves some out",
    }.items():
        with pytest.raises(OptionError, match=told):
            run("model", step)
    with pytest.raises(OptionError, match="--group is 1"):
        ShareFfn(group=1)
    run("model", LowRank(rank="6", layers="2", parts="up"), place="thin")
    with pytest.raises(OptionError, match="layer 2 has low-rank in place of its up already"):
        run("thin", ShareFfn())
    run("model", PruneLayers(layers="2", only="mlp"), place="gap")
    with pytest.raises(OptionError, match="layer 2 has no FFN to share"):
        run("gap", ShareFfn())
    run("model", ShareFfn(layers="0,1"), place="once")
    with pytest.raises(OptionError, match="layer 0 shares its ffn with others already"):
        run("once", ShareFfn())
    run("once", ShareFfn(layers="2,3"), place="twice")
    put(Path("sparse"), "mixtral", mlp_bias=False)
    with pytest.raises(ModelError, match="mixtral has experts in place of an FFN"):
        run("sparse", ShareFfn())
    put(Path("bloom"), "bloom")
    run("bloom", ShareFfn(), place="bloomed")
    with pytest.raises(ModelError, match="bloom has 128 neurons in an FFN by definition"):
        run("bloom", ShareFfn(width=64), place="none")
    put(Path("one"), num_hidden_layers=1)
    with pytest.raises(ModelError, match="this llama has a single layer"):
        run("one", ShareFfn())
    assert not Path("out").exists()
