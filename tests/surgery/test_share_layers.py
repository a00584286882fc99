"""Layers that share their parameters: groups, the fit of the shared layer, what steps after it do, and what is refused."""

import copy
import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.convert.inspection import applicable
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.heal.refit import Refit
from effconvert.surgery._ridge import Moments
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth._fitted import _solution
from effconvert.surgery.depth._groups import groups_of
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.depth.share_layers import ShareLayers
from effconvert.surgery.embedding.factor_embed import FactorEmbed
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.width._fewer import surviving_blocks
from tests.heal.healing import goes_on_after_a_kill, prose, put, run, tensors
from tests.mixers.mixing import in_pieces
from tests.models import logits, save, tiny
from tests.surgery.test_shared import changes_of, opened


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def error_of(folder, original="source"):
    """The mean squared error of the logits, in shares of the original's."""
    expected = logits(opened(original))
    return float((logits(opened(folder)) - expected).square().sum() / expected.square().sum())


def stored(folder):
    """The layers that have matrices on disk."""
    return {int(name.split(".")[2]) for name in tensors(Path(folder)) if ".layers." in name and ("self_attn" in name or "mlp" in name)}


def test_groups_are_neighbours_or_every_nth():
    assert groups_of(range(6), 3, "contiguous") == [(0, 1), (2, 3), (4, 5)]
    assert groups_of(range(5), 2, "contiguous") == [(0, 1, 2), (3, 4)]
    assert groups_of([7, 3, 5, 9], 2, "cyclic") == [(3, 7), (5, 9)]
    assert groups_of(range(3), 3, "contiguous") == groups_of(range(3), 3, "cyclic") == [(0,), (1,), (2,)]
    albert = [int(layer / (12 / 5)) for layer in range(12)]  # the group of a layer in transformers' albert
    assert [number for number, group in enumerate(groups_of(range(12), 5, "contiguous")) for _ in group] == albert


@pytest.mark.parametrize(("pattern", "first"), [("contiguous", {0, 2}), ("cyclic", {0, 1})])
@pytest.mark.parametrize("pool", ["fitted", "first"])
def test_matrices_are_stored_once_and_norms_by_each_layer(pattern, first, pool):
    put(Path("source"), num_hidden_layers=4)
    outcome = run("source", ShareLayers(groups=2, pattern=pattern, pool=pool))
    before, after = tensors(Path("source")), tensors(Path("out"))
    assert stored("out") == first
    assert {name for name in before if "norm" in name} <= after.keys()
    assert all(torch.equal(after[name], before[name]) for name in after if "norm" in name or (pool == "first" and name in after))
    model = opened("out")
    assert sum(parameter.numel() for parameter in model.parameters()) == outcome.plan.after.parameters == sum(tensor.numel() for tensor in after.values())
    assert outcome.plan.after.bytes == sum(tensor.nbytes for tensor in after.values())
    assert outcome.plan.after.kv_bytes == outcome.plan.before.kv_bytes


def test_layers_that_compute_the_same_are_fitted_well():
    """Each pair is one layer twice, the second time with other norms and neurons in another order."""
    model = tiny("llama", num_hidden_layers=4)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index in (0, 2):
            first, second = model.model.layers[index], model.model.layers[index + 1]
            second.self_attn.load_state_dict(first.self_attn.state_dict())
            second.mlp.load_state_dict(first.mlp.state_dict())
            for part in (second.mlp.gate_proj, second.mlp.up_proj):
                part.weight.copy_(part.weight[order])
                part.bias.copy_(part.bias[order])
            second.mlp.down_proj.weight.copy_(second.mlp.down_proj.weight[:, order])
    put(Path("source"), num_hidden_layers=4)
    save(model, Path("source"))
    run("source", ShareLayers(groups=2))
    run("source", ShareLayers(groups=2, pool="first"), place="first")
    assert error_of("first") < 1e-6
    assert error_of("out") < 0.02


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_fitted_layer_is_better_than_the_first(kind):
    put(Path("source"), kind, noise=1.0, only="weight", **({"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}))
    run("source", ShareLayers(groups=1, layers="1-2"), place="fitted")
    run("source", ShareLayers(groups=1, layers="1-2", pool="first"), place="first")
    assert error_of("fitted") < 0.9 * error_of("first")


def test_blocks_go_as_exhaustive_least_squares_would_let_them_go():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(400, 12, generator=draw, dtype=torch.float64) @ torch.randn(12, 12, generator=draw, dtype=torch.float64)
    targets = features @ torch.randn(12, 5, generator=draw, dtype=torch.float64)
    moments = (Moments(), Moments())
    moments[0].add(features, targets)

    def loss(blocks):
        columns = [3 * block + place for block in blocks for place in range(3)]
        return float((targets - features[:, columns] @ torch.linalg.lstsq(features[:, columns], targets).solution).square().sum())

    weights, gram = _solution(moments)
    heads = torch.arange(12).view(4, 3)
    kept = surviving_blocks(weights, gram, heads, 3)
    assert loss(kept) <= min(loss(blocks) for blocks in combinations(range(4), 3)) * (1 + 1e-9)
    assert len(surviving_blocks(weights, gram, heads, 2)) == 2


def test_a_token_at_a_time_gives_the_same_and_copies_and_saving_change_nothing():
    put(Path("source"), num_hidden_layers=4)
    run("source", ShareLayers(groups=2))
    model = opened("out")
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        whole, (steps, _) = model(ids).logits, in_pieces(model, ids, [1] * ids.shape[1])
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)
    model.save_pretrained("again")
    assert tensors(Path("again")).keys() == tensors(Path("out")).keys()
    assert torch.equal(logits(opened("again")), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(monkeypatch):
    put(Path("source"), num_hidden_layers=4)
    steps = (ShareLayers(groups=2), Refit())
    goes_on_after_a_kill(monkeypatch, *steps)


def test_refit_leaves_shared_layers_alone_and_mends_those_after_them():
    put(Path("source"), noise=1.0, only="weight", num_hidden_layers=4)
    run("source", ShareLayers(groups=1, layers="0-1"), place="plain")
    outcome = run("source", ShareLayers(groups=1, layers="0-1"), Refit(), place="fitted")
    plain, fitted = tensors(Path("plain")), tensors(Path("fitted"))
    changed = {int(name.split(".")[2]) for name in plain if not torch.equal(plain[name], fitted[name])}
    assert changed == {2, 3}
    assert error_of("fitted") < error_of("plain")
    assert any("layers that share parameters stay as they are" in note for note in outcome.plan.notes)


def test_heads_can_be_shared_and_layers_dropped_afterwards():
    put(Path("source"), num_hidden_layers=4)
    run("source", ShareLayers(groups=2), place="shared")
    run("shared", Gqa(groups=2, pool="mean"), place="grouped")
    assert stored("grouped") == {0, 2}
    assert tensors(Path("grouped"))["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    with pytest.raises(OptionError, match="layers 0, 1 share their attention, and gqa would give each of them another"):
        run("shared", Gqa(groups=2), place="refused")
    run("shared", PruneLayers(layers="0"), place="fewer")
    assert stored("fewer") == {0, 1}
    content = json.loads(Path("fewer/config.json").read_text())
    assert [entry["layers"] for entry in content["effconvert"]["shared"]] == [[1, 2], [1, 2]]
    assert logits(opened("fewer")).isfinite().all()


def test_inspect_counts_what_is_shared_once(command):
    put(Path("source"), num_hidden_layers=4)
    outcome = run("source", ShareLayers(groups=2))
    told = command("inspect", "out").output
    assert "layers 0, 1 share their attention" in told
    assert outcome.plan.after.parameters < outcome.plan.before.parameters
    assert f"{outcome.plan.after.parameters / 1e3:.4g} k" in told


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("llama", {"groups": 5}, OptionError, "--groups 5 is more than the 4 layers that are to share; give at most 4"),
        ("llama", {"groups": 3, "layers": "1-2"}, OptionError, "--groups 3 is more than the 2 layers"),
        ("llama", {"groups": 0}, OptionError, "--groups is 0"),
        ("llama", {"groups": 2, "pattern": "zigzag"}, OptionError, "--pattern is 'zigzag'"),
        ("llama", {"groups": 2, "layers": "7"}, OptionError, "names what is no layer"),
        ("gemma2", {"groups": 2}, OptionError, "layers 0 and 1 would share their parameters, and differ in their window"),
        ("gpt_neo", {"groups": 1}, OptionError, "layers 0 and 1 would share their parameters, and differ in their kind of attention"),
        ("mixtral", {"groups": 1}, ModelError, "mixtral has experts"),
        ("fnet", {"groups": 1}, ModelError, "fnet does not attend"),
    ],
)
def test_what_makes_no_sense_is_refused(kind, options, error, message):
    changes = {"num_layers": 2} if kind == "gpt_neo" else changes_of(kind)
    source = save(tiny(kind, **changes), Path("model"))
    with pytest.raises(error, match=message):
        plan(open_checkpoint(source), (ShareLayers(**options),))


def test_alternating_windows_are_shared_within_their_kind():
    save(tiny("gemma2", **changes_of("gemma2")), Path("model"))
    run("model", ShareLayers(groups=2, pattern="cyclic", pool="first"))
    assert stored("out") == {0, 1}


def test_layers_with_techniques_or_shared_already_are_refused():
    put(Path("source"), num_hidden_layers=4)
    run("source", Linear(layers="1"), place="mixed")
    with pytest.raises(OptionError, match="layer 1 has linear in place of its scores; leave it out of --layers"):
        run("mixed", ShareLayers(groups=2))
    run("mixed", ShareLayers(groups=1, layers="2-3"), place="others")
    assert stored("others") == {0, 1, 2}
    run("source", ShareLayers(groups=2, pool="first"), place="shared")
    with pytest.raises(OptionError, match="layer 0 shares its attention with others already; leave it out of --layers"):
        run("shared", ShareLayers(groups=1))
    run("source", PruneLayers(layers="2", only="attention"), place="skips")
    with pytest.raises(OptionError, match="layer 2 has no attention, so it is not like others; leave it out of --layers"):
        run("skips", ShareLayers(groups=2))


def test_inspect_lists_what_shared_layers_allow():
    put(Path("source"), num_hidden_layers=4)
    run("source", ShareLayers(groups=2, pool="first"))
    allowed, refusals = applicable(read_config(Path("out")))
    assert allowed["gqa"] == "--groups 1, 2, 4 --pool mean or first"
    assert allowed["mqa"] == "--pool mean or first"
    assert refusals["narrow"] == "layer 0 shares its down with others, and narrow would fit it to each of them; narrow first, and share afterwards"
    run("out", Gqa(groups=2, pool="mean"), place="pooled")  # as it says
    with pytest.raises(OptionError, match="would give each of them another"):
        run("out", Gqa(groups=2), place="refused")


def test_refit_says_where_nothing_is_left_to_make_up_for_the_embedding():
    put(Path("source"), num_hidden_layers=4)
    outcome = run("source", FactorEmbed(rank="6", blocks=1), ShareLayers(groups=1, pool="first"), Refit())
    assert any("all layers share the parameters that would make up for factor-embed, so nothing is refitted" in note for note in outcome.plan.notes)
    run("source", FactorEmbed(rank="6", blocks=1), ShareLayers(groups=1, pool="first"), place="plain")
    before, after = tensors(Path("plain")), tensors(Path("out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
