"""Layers that share their matrices and have low-rank differences: the decomposition, its error by rank, training, refit, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.heal._tensors import zero_sublayer
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.surgery._placed import open_checked
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth._deltas import decompose
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.depth.recursive import Recursive
from effconvert.surgery.depth.share_layers import ShareLayers
from effconvert.surgery.projections._factors import factors, product_of
from effconvert.surgery.projections.low_rank import LowRank
from tests.heal.healing import goes_on_after_a_kill, prose, put, run, tensors
from tests.mixers.mixing import in_pieces
from tests.models import logits, save, tiny
from tests.surgery.test_share_layers import error_of, stored
from tests.surgery.test_shared import opened

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def moments(count, width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 60, width, generator=draw, **DOUBLE)
    return list(rows.mT @ rows)


def test_the_shared_matrix_has_less_error_on_the_inputs_of_all_than_the_mean():
    draw = torch.Generator().manual_seed(0)
    weights, grams = list(torch.randn(3, 7, 9, generator=draw, **DOUBLE)), moments(3, 9)

    def error(shared, thin):
        rest = [weight - shared - left @ right for weight, (left, right) in zip(weights, thin, strict=True)]
        return sum(float((matrix @ gram * matrix).sum()) for matrix, gram in zip(rest, grams, strict=True))

    for rank in (1, 3):
        mean = torch.stack(weights).mean(0)
        assert error(*decompose(weights, grams, rank)) < 0.9 * error(
            mean, [factors(weight - mean, gram, rank) for weight, gram in zip(weights, grams, strict=True)]
        )


def test_a_matrix_that_all_layers_have_is_shared_and_their_thin_differences_are_found():
    draw = torch.Generator().manual_seed(0)
    common, thin = torch.randn(7, 9, generator=draw, **DOUBLE), torch.randn(2, 7, 2, generator=draw, **DOUBLE) @ torch.randn(2, 2, 9, generator=draw, **DOUBLE)
    weights = list(common + thin)
    shared, deltas = decompose(weights, moments(2, 9), 4)  # the difference of two such matrices has rank 4
    for weight, (left, right) in zip(weights, deltas, strict=True):
        torch.testing.assert_close(shared + left @ right, weight, rtol=1e-3, atol=1e-3)


def test_shared_matrix_and_differences_of_full_rank_are_the_weights():
    weights, grams = list(torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(0), **DOUBLE)), moments(3, 9)
    shared, thin = decompose(weights, grams, 7)
    for weight, (left, right) in zip(weights, thin, strict=True):
        torch.testing.assert_close(shared + left @ right, weight)


@pytest.mark.slow
def test_the_error_falls_with_the_rank_and_is_below_that_without_differences():
    put(Path("source"), num_hidden_layers=4)
    errors = []
    for rank in (2, 8, 16, 28):
        run("source", Recursive(groups=2, lora_rank=rank), place=f"rank{rank}")
        errors.append(error_of(f"rank{rank}"))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize(("pattern", "first"), [("contiguous", {0, 2}), ("cyclic", {0, 1})])
def test_matrices_are_stored_once_and_differences_norms_and_biases_by_each_layer(pattern, first):
    put(Path("source"), num_hidden_layers=4)
    outcome = run("source", Recursive(groups=2, lora_rank=4, pattern=pattern))
    before, after = tensors(Path("source")), tensors(Path("out"))
    matrices = {name for name in before if "_proj.weight" in name}
    assert {int(name.split(".")[2]) for name in matrices & after.keys()} == first
    assert before.keys() - after.keys() < matrices
    own = [name for name in after if ".effconvert." in name]
    assert len(own) == 4 * 7 * 2
    assert len([name for name in after if name.endswith(".bias")]) == len([name for name in before if name.endswith(".bias")])
    assert (
        outcome.plan.after.parameters == sum(tensor.numel() for tensor in after.values()) == sum(parameter.numel() for parameter in opened("out").parameters())
    )


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_token_at_a_time_gives_the_same_and_copies_and_saving_change_nothing(kind):
    put(Path("source"), kind, num_hidden_layers=4)
    run("source", Recursive(groups=2, lora_rank=4))
    model = opened("out")
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        whole, (steps, _) = model(ids).logits, in_pieces(model, ids, [1] * ids.shape[1])
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)
    model.save_pretrained("again")
    assert tensors(Path("again")).keys() == tensors(Path("out")).keys()
    assert torch.equal(logits(opened("again")), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert json.loads(Path("again/config.json").read_text())["effconvert"] == json.loads(Path("out/config.json").read_text())["effconvert"]


def test_a_step_of_training_moves_shared_matrices_and_differences_and_survives_saving():
    put(Path("source"), num_hidden_layers=4)
    run("source", Recursive(groups=2, lora_rank=4))
    model = opened("out").train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids = torch.arange(3, 19)[None]
    first = model(ids, labels=ids).loss
    first.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if "q_proj" in name} <= moved
    assert model(ids, labels=ids).loss < first
    model.eval().save_pretrained("again")
    assert torch.equal(logits(opened("again")), logits(model))
    layers = opened("again").model.layers
    assert layers[0].self_attn.q_proj.weight is layers[1].self_attn.q_proj.weight


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for the older name
def test_an_adapter_on_top_trains_and_is_merged_with_its_own_layer_only():
    peft = pytest.importorskip("peft")
    put(Path("source"), num_hidden_layers=4)
    run("source", Recursive(groups=2, lora_rank=4))
    model = opened("out")
    expected = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    adapted.eval()
    torch.testing.assert_close(logits(adapted), expected)
    ids = torch.arange(3, 19)[None]
    adapted(ids, labels=ids).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)


def test_refit_changes_the_differences_of_outputs_and_nothing_that_is_shared():
    put(Path("source"), noise=1.0, only="weight", num_hidden_layers=4)
    run("source", Recursive(groups=1, lora_rank=8, layers="2-3"), place="plain")
    outcome = run("source", Recursive(groups=1, lora_rank=8, layers="2-3"), Refit(), place="fitted")
    plain, fitted = tensors(Path("plain")), tensors(Path("fitted"))
    changed = {name for name in plain if not torch.equal(plain[name], fitted[name])}
    assert changed
    assert all(".effconvert." in name and ("o_proj" in name or "down_proj" in name) for name in changed)
    assert error_of("fitted") < error_of("plain")
    assert any("differences of the outputs" in note for note in outcome.plan.notes)


@pytest.mark.slow
def test_transfer_trains_the_differences_and_nothing_that_is_shared():
    put(Path("source"), num_hidden_layers=4)
    run("source", Recursive(groups=1, lora_rank=4, layers="2-3"), place="plain")
    run("source", Recursive(groups=1, lora_rank=4, layers="2-3"), Transfer(), place="taught")
    plain, taught = tensors(Path("plain")), tensors(Path("taught"))
    changed = {name for name in plain if not torch.equal(plain[name], taught[name])}
    assert any(".effconvert." in name for name in changed)
    assert not [name for name in changed if name.endswith("_proj.weight")]
    assert error_of("taught") < error_of("plain")


def test_a_sublayer_without_its_output_adds_nothing():
    put(Path("source"), num_hidden_layers=4)
    run("source", Recursive(groups=2, lora_rank=4))
    layer = open_checked(Path("out")).layer(3, "cpu")
    assert product_of(layer, "down").shape == layer["down"].shape
    assert not torch.equal(product_of(layer, "down"), layer["down"])
    assert product_of(layer, "down").abs().sum() > 0
    assert not product_of(zero_sublayer(layer, "ffn"), "down").any()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(monkeypatch):
    put(Path("source"), num_hidden_layers=4)
    steps = (Recursive(groups=2, lora_rank=4), Refit())
    goes_on_after_a_kill(monkeypatch, *steps)


def test_layers_can_be_dropped_afterwards_and_heads_not():
    put(Path("source"), num_hidden_layers=4)
    run("source", Recursive(groups=2, lora_rank=4))
    run("out", PruneLayers(layers="0"), place="fewer")
    assert stored("fewer") == {0, 1, 2}  # with differences, each layer has something
    assert logits(opened("fewer")).isfinite().all()
    with pytest.raises(ModelError, match="its recursive fits 4 KV heads; change their number first, and do recursive afterwards"):
        run("out", Gqa(groups=2, pool="mean"), place="grouped")
    with pytest.raises(OptionError, match="layers 0, 1 share their gate, which cannot be replaced"):
        run("out", LowRank(rank=4), place="thin")
    with pytest.raises(OptionError, match="layer 0 has recursive in place of its q"):
        run("out", ShareLayers(groups=1), place="shared")


def test_config_json_names_the_rank_of_the_chosen_layers():
    put(Path("source"), num_hidden_layers=4)
    run("source", Recursive(groups=1, lora_rank=4, layers="1-2"))
    config = read_config(Path("out"))
    assert [(record.what, record.layers) for record in config.shared] == [("weights", (1, 2))]
    assert {record.place for record in config.replaced} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(record.options == {"lora_rank": 4} and record.layers == (1, 2) for record in config.replaced)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("llama", {"groups": 3, "lora_rank": 4}, OptionError, "--groups 3 is more than the 2 layers"),
        ("llama", {"groups": 1, "lora_rank": 33}, OptionError, "--lora-rank 33 is more than the full rank of every projection; give at most 32"),
        ("llama", {"groups": 1, "lora_rank": 0}, OptionError, "--lora-rank is 0"),
        ("gemma2", {"groups": 1, "lora_rank": 4}, OptionError, "differ in their window"),
        ("phi3", {"groups": 1, "lora_rank": 4}, ModelError, "phi3 holds q, k, v in one module"),
        ("mixtral", {"groups": 1, "lora_rank": 4}, ModelError, "mixtral has experts"),
    ],
)
def test_what_makes_no_sense_is_refused(kind, options, error, message):
    source = save(tiny(kind), Path("model"))
    with pytest.raises(error, match=message):
        plan(open_checkpoint(source), (Recursive(**options),))


def test_the_plan_says_when_nothing_is_saved():
    source = save(tiny("llama", num_hidden_layers=4), Path("model"))
    assert "nothing is saved" in plan(open_checkpoint(source), (Recursive(groups=2, lora_rank=16),)).notes[0]
    assert "keep 72.8% of their parameters" in plan(open_checkpoint(source), (Recursive(groups=2, lora_rank=4),)).notes[0]
    assert "nothing changes" in plan(open_checkpoint(source), (Recursive(groups=4, lora_rank=4),)).notes[0]
