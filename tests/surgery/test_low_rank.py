"""Two thin matrices in place of a projection: exact at full rank, and at any rank those with the least error on the text."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.cli import main
from effconvert.convert.in_words import differences
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.heal._forward import Forward
from effconvert.heal.refit import Refit, _without_attention
from effconvert.options import RunOptions
from effconvert.surgery.projections._factors import factors, losses
from effconvert.surgery.projections._parts import thin_size
from effconvert.surgery.projections._ranks import fill
from effconvert.surgery.projections.low_rank import LowRank
from tests.heal.healing import apart, goes_on_after_a_kill, opened, prose, put, run, tensors
from tests.mixers.mixing import in_pieces
from tests.models import logits, save, tiny
from tests.surgery.test_shared import Share

FULL = 32  # of each projection of a tiny model whose keys have as many heads as queries
SAME = 1e-5  # of the largest logit, in float32


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def planned(kind="llama", /, changes=None, **options):
    return plan(open_checkpoint(save(tiny(kind, **(changes or {})), Path("planned"))), (LowRank(**options),))


@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [
        ("llama", {}, {"parts": "all"}),  # with biases
        ("gpt2", {}, {}),  # Conv1D
        ("qwen3", {"num_key_value_heads": 2}, {"parts": "attention"}),
        ("gemma2", {"num_key_value_heads": 1}, {"parts": "k,v", "rank": 16}),
        ("qwen2_moe", {}, {}),  # only layer 1 has an FFN
        ("opt", {}, {"parts": "q,down", "layers": "1"}),
        ("bert", {}, {"parts": "all"}),
        ("bert", {}, {"form": "plain"}),
    ],
)
def test_full_rank_changes_no_logit(kind, changes, options):
    model = tiny(kind, **changes)
    outcome = convert(str(save(model, Path("source"))), (LowRank(**{"rank": FULL, **options}),), RunOptions(output=Path("out"), verify=False))
    assert (logits(opened("out")) - logits(model)).abs().max() <= SAME * logits(model).abs().max()
    assert outcome.plan.is_exact
    assert not outcome.plan.needs_calibration
    assert "nothing is saved" in outcome.plan.notes[-1]


def test_one_rank_less_than_full_is_not_exact():
    assert not planned(rank=FULL - 1).is_exact
    assert not planned(rank=",".join([str(FULL)] * 5 + ["31"])).is_exact


def test_the_bias_stays_and_is_added():
    model = tiny("llama")
    convert(str(save(model, Path("source"))), (LowRank(rank=FULL),), RunOptions(output=Path("out"), verify=False))
    bias = model.model.layers[0].mlp.down_proj.bias
    assert bias.any()
    assert torch.equal(opened("out").model.layers[0].mlp.down_proj.bias, bias)


@pytest.mark.parametrize("outputs", [20, 50])
def test_no_other_matrix_of_that_rank_has_a_smaller_error_on_the_inputs(outputs):
    draw = torch.Generator().manual_seed(0)
    weight, mixing = (torch.randn(rows, 30, generator=draw, dtype=torch.float64) for rows in (outputs, 30))
    inputs = torch.randn(500, 30, generator=draw, dtype=torch.float64) @ (mixing * torch.logspace(0, -2, 30, dtype=torch.float64))
    left, right = factors(weight.float(), inputs.T @ inputs / len(inputs), 8)
    assert (left.shape, right.shape) == ((outputs, 8), (8, 30))
    least = torch.linalg.svdvals(inputs @ weight.T)[8:].square().sum()  # Eckart and Young, on the outputs
    error = (inputs @ (weight - left @ right).T).square().sum()
    assert least <= error * (1 + 1e-9)
    assert error <= 1.001 * least
    torch.testing.assert_close(losses(weight, inputs.T @ inputs / len(inputs))[8], error / len(inputs), rtol=1e-3, atol=0)


def test_calibrated_factors_are_better_than_a_plain_svd(monkeypatch):
    put(Path("source"))
    run("source", LowRank(rank=12), place="whitened")
    monkeypatch.setattr("effconvert.surgery.projections._factors.factors", lambda weight, moment, rank: factors(weight, None, rank))
    run("source", LowRank(rank=12), place="plain")
    whitened, plain = apart("source", "whitened", "plain")
    assert whitened < 0.9 * plain


def test_each_projection_is_fitted_to_what_the_truncated_ones_before_it_leave():
    """The result of layer 1 depends on layer 0, and that of down on gate and up."""
    put(Path("source"))
    for place, options in {"all": {}, "second": {"layers": "1"}, "down": {"parts": "down", "layers": "1"}}.items():
        run("source", LowRank(rank=6, **options), place=place)
    every, second, down = (tensors(Path(place)) for place in ("all", "second", "down"))
    name = "model.layers.1.mlp.{}_proj.effconvert.right"
    assert not torch.equal(every[name.format("gate")], second[name.format("gate")])
    assert not torch.equal(second[name.format("down")], down[name.format("down")])


@pytest.mark.parametrize(("parts", "expected"), [("all", 4), ("k,down", 2), ("up,gate", 1)])
def test_projections_with_one_input_are_captured_once(parts, expected, monkeypatch):
    from effconvert.heal._activations import Activations

    real, captured = Activations.capture, []
    monkeypatch.setattr(Activations, "capture", lambda *given, **more: captured.append(given) or real(*given, **more))
    run(put(Path("source")), LowRank(rank=6, parts=parts, layers="0"))
    assert len(captured) == expected


def test_the_factors_have_the_type_of_the_checkpoint():
    put(Path("source"))
    save(opened("source").bfloat16(), Path("source"))
    run("source", LowRank(rank=6))
    own = {tensor.dtype for name, tensor in tensors(Path("out")).items() if ".effconvert." in name}
    assert own == {torch.bfloat16, torch.int64}


@pytest.mark.parametrize(("kind", "parts"), [("llama", "all"), ("gpt2", "mlp"), ("gptj", "attention")])
def test_a_token_at_a_time_gives_the_same_logits_and_saving_changes_nothing(kind, parts):
    put(Path("source"), kind)
    run("source", LowRank(rank=6, parts=parts))
    model = opened("out")
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        whole, (steps, _) = model(ids).logits, in_pieces(model, ids, [1] * ids.shape[1])
    assert (steps - whole).abs().max() <= SAME * whole.abs().max()
    model.save_pretrained("again")
    assert torch.equal(logits(opened("again")), logits(model))
    assert json.loads(Path("again/config.json").read_text())["effconvert"] == json.loads(Path("out/config.json").read_text())["effconvert"]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(monkeypatch):
    put(Path("source"))
    steps = (LowRank(rank=6, parts="all"), Refit())
    goes_on_after_a_kill(monkeypatch, *steps)


def test_config_json_has_the_rank_of_each_replaced_projection():
    config = planned(rank="6,0,5,4,6,5", parts="mlp").config
    assert {(record.place, record.options["rank"]): record.layers for record in config.replaced} == {
        ("gate", 6): (0,),
        ("gate", 4): (1,),
        ("up", 6): (1,),
        ("down", 5): (0, 1),
    }


def test_the_plan_shows_ranks_as_a_range():
    assert list(differences(planned(rank="6,0,5,4,6,5").config)) == [
        "2 of 2 layers have low-rank --parts gate --rank 4-6 --form pivoted in place of gate",
        "2 of 2 layers have low-rank --parts down --rank 5 --form pivoted in place of down",
        "1 of 2 layers have low-rank --parts up --rank 6 --form pivoted in place of up",
    ]


def test_a_projection_of_rank_0_stays_as_it_is():
    put(Path("source"))
    run("source", LowRank(rank="6,0,5,0,0,0", parts="mlp"))
    before, after = tensors(Path("source")), tensors(Path("out"))
    gone = {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "down")}
    assert before.keys() - after.keys() == {f"{name}.weight" for name in gone}
    assert after.keys() - before.keys() == {f"{name}.effconvert.{factor}" for name in gone for factor in ("left", "right", "order")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --ratio, .* or --rank"),
        ({"ratio": 0.5, "rank": 4}, "give either --ratio, .* or --rank"),
        ({"ratio": 0}, "--ratio is 0, and it should be greater than 0"),
        ({"ratio": 1.1}, "--ratio is 1.1, and it should be less than or equal to 1"),
        ({"rank": 0}, "--rank is '0'"),
        ({"rank": 33}, "--rank 33 is more than the full rank of gate; give at most 32"),
        ({"rank": "4,4"}, "--rank has 2 ranks, and 6 projections are chosen"),
        ({"rank": 4, "parts": "gate,ffn"}, "--parts ffn is no projection; there are q, k"),
        ({"rank": 4, "parts": ""}, "--parts  is no projection"),
        ({"rank": 4, "layers": "7"}, "names what is no layer"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        planned(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gpt2", {"parts": "attention"}, "gpt2 holds q, k, v in one module"),
        ("phi3", {}, "phi3 holds gate, up in one module"),
        ("gpt2", {"parts": "gate"}, "a layer of gpt2 has no module of its own for gate"),
        ("mixtral", {}, "a layer of mixtral has no module of its own for down"),
        ("fnet", {"parts": "attention"}, "a layer of fnet has no module of its own for o"),
    ],
)
def test_a_family_without_the_place_is_refused(kind, options, message):
    with pytest.raises(ModelError, match=message):
        planned(kind, rank=4, **options)


def test_layers_without_the_projection_are_refused_where_they_are_named_and_else_left_alone():
    assert {record.layers for record in planned("qwen2_moe", rank=4).config.replaced} == {(1,)}
    with pytest.raises(OptionError, match="layer 0 has experts and no gate; leave it out of --layers"):
        planned("qwen2_moe", rank=4, layers="0")
    with pytest.raises(ModelError, match="qwen2_moe has experts in each layer, and no gate, up, down"):
        planned("qwen2_moe", {"mlp_only_layers": []}, rank=4)


def test_a_replaced_projection_is_not_replaced_again():
    put(Path("source"))
    run("source", LowRank(rank=6, parts="gate", layers="1"))
    with pytest.raises(OptionError, match="layer 1 has low-rank in place of its gate already; leave it out of --layers"):
        run("out", LowRank(rank=5), place="twice")
    run("out", LowRank(rank=5, layers="0"), place="other")
    assert read_config(Path("other")).replaced_at(0, "up").options == {"parts": "up", "rank": 5, "form": "pivoted"}


@pytest.mark.parametrize(
    ("kind", "changes", "note"),
    [
        ("llama", {}, "from the first low-rank projection on, the outputs"),
        ("olmo2", {}, "a norm follows its"),
        ("opt", {"do_layer_norm_before": False}, "a norm follows its"),
    ],
)
def test_the_plan_says_what_refit_does(kind, changes, note):
    notes = plan(open_checkpoint(save(tiny(kind, **changes), Path("planned"))), (LowRank(rank=6), Refit())).notes
    assert [text for text in notes if text.startswith("refit") and note in text]


def test_shared_projections_are_refused():
    put(Path("source"), num_hidden_layers=3)
    run("source", Share(what="ffn"), place="shared")
    with pytest.raises(OptionError, match="layers 1, 2 share their gate, which cannot be replaced; leave them out of --layers"):
        run("shared", LowRank(rank=6), place="thin")
    run("shared", LowRank(rank=6, layers="0"), place="thin")


def test_attention_of_low_rank_keeps_its_cache_and_its_refit():
    """It is still attention: what replaces all of it has no keys and values to cache, and only the MLP behind it is refitted."""
    model = planned(rank=6, parts="k,o")
    assert model.after.kv_bytes == model.before.kv_bytes
    assert _without_attention(model.models("meta")[-1].layers[0]) is False


def test_list_and_help_say_what_it_is():
    listed = CliRunner().invoke(main, ["list"]).output
    assert "low-rank" in listed
    line = listed.split("low-rank", 1)[1].splitlines()[1]
    assert "needs effconvert; exact with --rank at full rank" in line
    assert LowRank(ratio=0.9).label == "low-rank-0.9"
    assert LowRank(rank=64).label == "low-rank-64"
    assert LowRank(rank="4,5").label == "low-rank"
    assert LowRank.allowed_options(planned(rank=4).checkpoint.config) == "--ratio R, or --rank 1 to 32"


@pytest.mark.few(4)
@pytest.mark.parametrize(("kind", "parts"), [("llama", "all"), ("granite", "gate"), ("opt", "down")])
def test_refit_brings_part_of_it_back(kind, parts):
    put(Path("source"), kind, noise=1.0, only="weight", num_hidden_layers=3)
    run("source", LowRank(rank=12, parts=parts), place="plain")
    run("source", LowRank(rank=12, parts=parts), Refit(), place="fitted")
    plain, fitted = apart("source", "plain", "fitted")
    assert fitted < 0.95 * plain
    before, after = tensors(Path("plain")), tensors(Path("fitted"))
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)


def parameters(ranks, shapes, pivoted):
    return sum(thin_size(*shape, rank, pivoted) if rank else shape[0] * shape[1] for rank, shape in zip(ranks, shapes, strict=True))


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.85])
def test_no_other_ranks_of_that_size_lose_less(ratio, pivoted):
    draw = torch.Generator().manual_seed(0)
    shapes = [(9, 6), (6, 9), (12, 5)]
    curves = [losses(torch.randn(*shape, generator=draw) * scale, None) for shape, scale in zip(shapes, (1, 2, 0.5), strict=True)]
    ranks = fill(curves, shapes, ratio, pivoted)
    budget = ratio * parameters((0, 0, 0), shapes, pivoted)
    used = parameters(ranks, shapes, pivoted)
    assert 0.7 * budget < used <= budget

    def loss(ranks):
        return sum(float(curve[rank]) for rank, curve in zip(ranks, curves, strict=True) if rank)

    smaller = [ranks for ranks in product(range(7), range(7), range(6)) if parameters(ranks, shapes, pivoted) <= used]
    assert loss(ranks) <= min(map(loss, smaller)) + 1e-9


def test_all_stay_whole_at_ratio_1_and_none_vanishes_at_0():
    shapes = [(40, 60), (60, 40)]
    curves = [losses(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), None) for shape in shapes]
    assert fill(curves, shapes, 1.0, pivoted=True) == [0, 0]
    assert fill(curves, shapes, 1e-6, pivoted=True) == [2, 2]  # a twentieth of the full rank


def test_ratio_gives_most_to_the_projections_that_lose_most():
    """The down projection of layer 0 hardly adds to the stream, and gate of layer 1 has rank 3."""
    put(Path("source"), intermediate_size=64)
    model = opened("source")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1e-4
        gate = model.model.layers[1].mlp.gate_proj.weight
        gate.copy_(gate[:, :3] @ gate[:3])
    save(model, Path("source"))
    outcome = run("source", LowRank(ratio=0.3))
    given = outcome.plan.recipe[0]["low-rank"]
    assert given["ratio"] is None
    ranks = dict(zip([(index, part) for index in range(2) for part in ("gate", "up", "down")], map(int, given["rank"].split(",")), strict=True))
    assert all(ranks[0, part] == 2 for part in ("gate", "up", "down"))
    assert 2 <= ranks[1, "gate"] <= 3
    assert ranks[1, "down"] > 10 or not ranks[1, "down"]
    own = [tensor for name, tensor in tensors(Path("out")).items() if ".mlp." in name and tensor.is_floating_point()]
    assert 0.27 * 6 * 32 * 64 < sum(tensor.numel() for tensor in own if tensor.ndim == 2) <= 0.3 * 6 * 32 * 64


def test_a_projection_that_is_zero_gets_the_least_rank():
    put(Path("source"))
    model = opened("source")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    save(model, Path("source"))
    ranks = run("source", LowRank(ratio=0.5)).plan.recipe[0]["low-rank"]["rank"].split(",")
    assert ranks[1] == "2"
    assert logits(opened("out")).isfinite().all()


def test_the_loss_is_measured_behind_the_layer():
    """The attention of layer 0 hardly adds to the stream, whatever its queries and values are."""
    put(Path("source"))
    model = opened("source")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight *= 1e-4
    save(model, Path("source"))
    ranks = [int(rank) for rank in run("source", LowRank(ratio=0.5, parts="q,v")).plan.recipe[0]["low-rank"]["rank"].split(",")]
    assert ranks[:2] == [2, 2]
    assert all(rank > 8 or rank == 0 for rank in ranks[2:])


def test_layers_that_predictions_depend_on_keep_most(monkeypatch):
    put(Path("source"))
    divergences = iter([1e-9, 1.0])  # of the predictions, with layer 0 truncated and with layer 1
    monkeypatch.setattr(Forward, "divergence", lambda self, reference, states: next(divergences))
    ranks = [int(rank) for rank in run("source", LowRank(ratio=0.5)).plan.recipe[0]["low-rank"]["rank"].split(",")]
    assert ranks[:3] == [2, 2, 2]
    assert all(rank > 8 or rank == 0 for rank in ranks[3:])


def test_the_recipe_beside_the_weights_gives_the_same_bytes_again():
    put(Path("source"))
    outcome = run("source", LowRank(ratio=0.6, parts="all"))
    run("source", LowRank(**{key: value for key, value in outcome.plan.recipe[0]["low-rank"].items() if value is not None}), place="again")
    first, second = tensors(Path("out")), tensors(Path("again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ratio_1_gives_the_same_model():
    put(Path("source"))
    outcome = run("source", LowRank(ratio=1))
    assert outcome.plan.is_exact
    assert outcome.plan.config == outcome.plan.checkpoint.config
    assert all(torch.equal(tensor, tensors(Path("out"))[name]) for name, tensor in tensors(Path("source")).items())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_ranks_are_chosen_in_other_families_too(kind):
    run(put(Path("source"), kind), LowRank(ratio=0.5))
    assert logits(opened("out")).isfinite().all()
