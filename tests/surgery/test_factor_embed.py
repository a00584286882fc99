"""Two thin factors in place of the embedding and the head, in blocks of tokens: exact at full rank, and at any rank those that lose least."""

import copy
import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.shards import StoredTensor
from effconvert.checkpoint.wrappers import Wrapper
from effconvert.cli import main
from effconvert.convert.in_words import differences
from effconvert.convert.inspection import inspect
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.heal._forward import Forward
from effconvert.heal._tensors import outer_tensors
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.surgery._placed import open_checked, table_rows
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.embedding._blocks import HEAD_SHARE, analyse, fill, parameters, sizes, weights_of
from effconvert.surgery.embedding.factor_embed import FactorEmbed
from effconvert.surgery.ffn.moe import Moe
from effconvert.surgery.projections.low_rank import LowRank
from tests.heal.healing import goes_on_after_a_kill, heldout, opened, prose, put, run, tensors
from tests.mixers.mixing import in_pieces
from tests.models import logits, save, tiny

SAME = 1e-5  # of the largest logit, in float32
TIED = {"tie_word_embeddings": True}
RANKS = "32,20,12,8,6,6"
VOCABULARY, WIDTH = 128, 32


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def planned(kind="llama", changes=None, *later, **options):
    return plan(open_checkpoint(save(tiny(kind, **(changes or {})), Path("planned"))), (FactorEmbed(**options), *later))


def table_of(folder, place="embed"):
    """The table at a place, as calibration sees it."""
    return table_rows(open_checkpoint(Path(folder)).model("cpu").outer, place, torch.arange(VOCABULARY))


# The algebra.


def test_each_block_has_twice_the_tokens_of_those_before():
    assert sizes(128, 6) == [4, 4, 8, 16, 32, 64]
    assert sizes(49152, 6) == [1536, 1536, 3072, 6144, 12288, 24576]
    assert sizes(5, 1) == [5]
    assert sizes(5, 3) == [1, 1, 3]


def table_and_weights(tokens=40, width=9):
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(tokens, width, generator=draw, dtype=torch.float64) * torch.rand(width, generator=draw, dtype=torch.float64)
    counts = torch.randint(0, 30, (tokens,), generator=draw)
    states = torch.randn(200, width, generator=draw, dtype=torch.float64) * torch.linspace(3, 0.1, width, dtype=torch.float64)
    return table, weights_of(counts), states.T @ states / len(states)


def test_half_of_the_weights_is_the_frequency_and_half_the_same_for_all():
    weights = weights_of(torch.tensor([3, 0, 1, 0]))
    assert torch.allclose(weights, torch.tensor([0.5 * 0.75 + 0.125, 0.125, 0.25, 0.125], dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.2, 0.8)])
def test_the_factors_lose_least_of_what_the_layers_and_the_head_read(rank, shares):
    """By the SVD of sqrt(f) E A, in float64; the loss that a block tells is the one that its factors have."""
    table, weights, second = table_and_weights()
    group = torch.arange(5, 30)
    [block] = analyse(lambda tokens: table[tokens], [group], weights, shares, second)
    rows, own = table[group], weights[group]
    plain, seen = (own @ rows.square().sum(1)), (own @ ((rows @ second) * rows).sum(1))
    metric = shares[0] * torch.eye(9, dtype=torch.float64) / plain + shares[1] * second / seen
    scaled = own.sqrt()[:, None] * rows @ torch.linalg.cholesky(metric)
    least = torch.linalg.svdvals(scaled)[rank:].square().sum()
    left, right = block.factors(rank)
    error = rows - rows @ left @ right
    lost = (own @ ((error @ metric) * error).sum(1)).item()
    assert lost == pytest.approx(least.item(), rel=1e-4)  # the second moment is damped by a millionth
    assert lost == pytest.approx(block.losses[rank].item(), rel=1e-4)


def test_at_full_rank_nothing_is_lost():
    table, weights, second = table_and_weights()
    [block] = analyse(lambda tokens: table[tokens], [torch.arange(40)], weights, (0.2, 0.8), second)
    left, right = block.factors(9)
    assert torch.allclose(table @ left @ right, table)
    assert block.losses[9] == 0
    assert block.losses[0].item() == pytest.approx(1, rel=1e-5)  # shares of what is there


@pytest.mark.parametrize("share", [0.3, 0.4, 0.6, 0.8])
def test_no_other_ranks_of_that_size_lose_less(share):
    table, weights, second = table_and_weights(40, 6)
    tokens = [8, 12, 20]
    curves = [block.losses for block in analyse(lambda rows: table[rows], torch.arange(40).split(tokens), weights, (0.5, 0.5), second)]

    def size(ranks):
        return sum(parameters(count, 6, rank) for count, rank in zip(tokens, ranks, strict=True))

    def loss(ranks):
        return sum(float(curve[rank]) for curve, rank in zip(curves, ranks, strict=True))

    ranks = fill(curves, tokens, share * 240)
    assert size(ranks) <= share * 240
    assert loss(ranks) <= min(loss(other) for other in product(range(1, 7), repeat=3) if size(other) <= size(ranks)) + 1e-12


def test_the_least_rank_is_1_and_what_fits_whole_stays_whole():
    curves = [torch.linspace(1, 0, 7, dtype=torch.float64)] * 2
    assert fill(curves, [10, 10], 1) == [1, 1]
    assert fill(curves, [10, 10], 120) == [6, 6]


# What runs.


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("options", [{"rank": 32, "blocks": 1}, {"rank": 32}, {"ratio": 1}, {"rank": "32,32", "blocks": 2}])
def test_full_rank_changes_not_even_a_bit_in_bfloat16(kind, options):
    source = put(Path("source"), kind, **TIED)
    save(opened(source).bfloat16(), source)
    assert run(source, FactorEmbed(**options)).plan.is_exact
    before, after = (opened(folder, dtype=torch.bfloat16) for folder in ("source", "out"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(after.base_model(ids).last_hidden_state, before.base_model(ids).last_hidden_state)
        if kind == "llama":  # bert's own head rounds only after it has added a bias
            assert torch.equal(after(ids).logits, before(ids).logits)


def test_full_rank_needs_no_text():
    conversion = planned("llama", TIED, rank="32,32", blocks=2)
    assert conversion.is_exact
    assert not conversion.needs_text
    assert "nothing is saved" in conversion.notes[-1]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", TIED), ("llama", {}), ("gemma3_text", {}), ("gpt2", {}), ("opt", {}), ("phi", {}), ("cohere", {}), ("bert", {}), ("electra", {})],
)
def test_it_computes_what_a_plain_model_with_the_product_as_its_table_would(kind, changes):
    """Scales, biases, projections around the table, and what stands behind the head stay as they are."""
    source = put(Path("source"), kind, **changes)
    run(source, FactorEmbed(rank=8))
    model, plain = opened("out"), tiny(kind, **changes)
    with torch.no_grad():
        embedding = table_of("out")
        plain.get_input_embeddings().weight.copy_(embedding)
        if not plain.config.tie_word_embeddings:
            plain.get_output_embeddings().weight.copy_(table_of("out", "head"))
    assert (logits(model) - logits(plain)).abs().max() <= SAME * logits(plain).abs().max()
    assert (logits(model) - logits(tiny(kind, **changes))).abs().max() > 1e-3
    assert torch.allclose(model.get_input_embeddings().weight, embedding, atol=1e-6)


def test_a_tied_head_has_the_same_factors_and_nothing_of_its_own_on_disk():
    source = put(Path("source"), **TIED)
    stored = load_file(source / "model.safetensors")
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, source / "model.safetensors", {"format": "pt"})
    outcome = run(source, FactorEmbed(rank=RANKS))
    assert {name for name in tensors(Path("out")) if "layers" not in name} == {
        "model.norm.weight",
        "model.embed_tokens.effconvert.order",
        *(f"model.embed_tokens.effconvert.left_{block}" for block in range(6)),
        *(f"model.embed_tokens.effconvert.right_{block}" for block in range(1, 6)),
    }
    model = opened("out")
    assert model.num_parameters() == outcome.plan.after.parameters
    model.tie_weights()
    trained = copy.deepcopy(model)
    ids = torch.arange(3, 20)[None]
    trained(ids, labels=ids).loss.backward()
    assert {name for name, parameter in trained.named_parameters() if parameter.grad is None} == set()
    with torch.no_grad():
        trained.get_input_embeddings().effconvert.left_0 *= 2
    assert not torch.equal(logits(trained), logits(model))  # of its own factors, and not of the model that it is a copy of
    assert torch.equal(trained.get_output_embeddings().weight, trained.get_input_embeddings().weight)


@pytest.mark.parametrize(("where", "places"), [("embed", ("embed",)), ("head", ("head",)), ("both", ("embed", "head"))])
@pytest.mark.parametrize("kind", ["llama", "phi", "gpt_neox"])
def test_of_an_untied_model_one_or_both_are_replaced(kind, where, places):
    source = put(Path("source"), kind)
    outcome = run(source, FactorEmbed(rank=8, where=where))
    config = open_checked(Path("out")).config
    assert tuple(record.place for record in config.replaced) == places
    model, plain = opened("out"), tiny(kind)
    for place, kept, new in zip(("embed", "head"), *([m.get_input_embeddings(), m.get_output_embeddings()] for m in (plain, model)), strict=True):
        assert torch.equal(kept.weight, new.weight) == (place not in places)
    assert outcome.plan.after.parameters == model.num_parameters()
    save(model, Path("again"))
    assert torch.equal(logits(opened("again")), logits(model))
    if where == "embed":
        outcome = run("out", FactorEmbed(rank=8, where="head"), place="second")
        assert [record.place for record in outcome.plan.config.replaced] == ["embed", "head"]


def test_ranks_of_embedding_and_head_are_chosen_together():
    outcome = run(put(Path("source")), FactorEmbed(ratio=0.5))
    own = [tensor.numel() for name, tensor in tensors(Path("out")).items() if ".left_" in name or ".right_" in name]
    assert 0.45 * 2 * VOCABULARY * WIDTH < sum(own) <= 0.5 * 2 * VOCABULARY * WIDTH
    assert len(outcome.plan.recipe[0]["factor-embed"]["rank"].split(",")) == 12


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "phi"])
def test_a_token_at_a_time_gives_the_same_logits(kind):
    run(put(Path("source"), kind), FactorEmbed(rank=8))
    model = opened("out")
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        whole, (steps, _) = model(ids).logits, in_pieces(model, ids, [1] * ids.shape[1])
    assert (steps - whole).abs().max() <= SAME * whole.abs().max()
    assert model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False).shape[1] <= 27


def test_the_table_cannot_be_resized_and_is_there_for_whoever_reads_it():
    run(put(Path("source"), **TIED), FactorEmbed(rank=8))
    model = opened("out")
    with pytest.raises(ValueError, match="no table that could be resized; resize the original"):
        model.resize_token_embeddings(130)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    first, second = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert first is second  # so that PEFT finds them tied
    with torch.no_grad():
        model.get_input_embeddings().effconvert.left_5.zero_()
    assert not torch.equal(model.get_input_embeddings().weight, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_another_type_the_order_of_tokens_stays_whole_numbers(dtype):
    run(put(Path("source"), **TIED), FactorEmbed(rank=8))
    model = opened("out", dtype=dtype)
    order = model.get_input_embeddings().effconvert.order
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(VOCABULARY))
    assert model.get_input_embeddings()(torch.arange(5)).dtype == dtype
    save(model, Path("again"))
    assert torch.equal(logits(opened("again", dtype=dtype)), logits(model))
    fresh = type(model)(model.config)  # without any checkpoint
    assert logits(fresh).isfinite().all()


def test_a_bare_model_and_one_with_a_classifier_have_their_embedding_replaced():
    import transformers

    base = tiny("bert").base_model
    put(Path("source"), "bert")
    (Path("source") / "model.safetensors").unlink()
    save(base, Path("source"))
    run("source", FactorEmbed(rank=8))
    assert {record.place for record in read_config(Path("out")).replaced} == {"embed"}
    whole = transformers.BertForSequenceClassification(base.config)
    put(Path("second"), "bert")
    (Path("second") / "model.safetensors").unlink()
    save(whole, Path("second"))
    run("second", FactorEmbed(rank=8), place="classifier")
    assert opened("classifier")(torch.arange(5)[None]).logits.shape == (1, 2)


# What tokens and hidden states are worth.


def test_tokens_of_the_text_keep_more_than_others():
    run(put(Path("source")), FactorEmbed(rank="16,16,8,4,2,1", where="embed"))
    error = (table_of("out") - table_of("source")).norm(dim=1) / table_of("source").norm(dim=1)
    counts = torch.tensor(json.loads(Path("source/tokenizer.json").read_text())["model"]["vocab"][" "])
    order = tensors(Path("out"))["model.embed_tokens.effconvert.order"]
    assert order[counts] == 0  # the space is the most frequent
    assert error[order < 8].max() < error[order >= 64].min()


def test_the_head_is_fitted_to_the_hidden_states_that_it_gets():
    """Where the layers give a head one direction alone, rank 1 is enough for its logits."""
    put(Path("source"))
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[5] = 3
    save(model, Path("source"))
    run("source", FactorEmbed(rank="1,1", blocks=2, where="head"))
    assert (logits(opened("out")) - logits(model)).abs().max() <= 1e-4 * logits(model).abs().max()


def test_layers_and_head_share_a_tied_table():
    """Both terms count: with more of the head's, its error is less and that of the rows more."""
    table, weights, second = table_and_weights()
    errors = []
    for shares in ((1 - HEAD_SHARE, HEAD_SHARE), (1.0, 0.0)):
        [block] = analyse(lambda tokens: table[tokens], [torch.arange(40)], weights, shares, second)
        left, right = block.factors(4)
        error = table - table @ left @ right
        errors.append((weights @ error.square().sum(1), weights @ ((error @ second) * error).sum(1)))
    (rows, seen), (plain_rows, plain_seen) = errors
    assert seen < plain_seen
    assert rows > plain_rows


# The whole conversion.


def test_the_recipe_beside_the_weights_gives_the_same_bytes_again():
    outcome = run(put(Path("source"), **TIED), FactorEmbed(rank=10))
    options = {key: value for key, value in outcome.plan.recipe[0]["factor-embed"].items() if value is not None}
    run("source", FactorEmbed(**options), place="again")
    first, second = tensors(Path("out")), tensors(Path("again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "factor-embed" in Path("out/effconvert.yaml").read_text()
    assert "calibrate" in Path("out/effconvert.yaml").read_text()


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(monkeypatch):
    put(Path("source"), **TIED)
    steps = (FactorEmbed(rank=RANKS), Gqa(groups=2), Refit())
    goes_on_after_a_kill(monkeypatch, *steps)


def test_nothing_reads_or_holds_the_table_whole(monkeypatch):
    """Of the table only rows are read, and of the factors only those rows are computed that a text needs."""
    put(Path("source"))
    real, read = StoredTensor.read, []
    monkeypatch.setattr(StoredTensor, "read", lambda self, device: read.append((self.name, device)) or real(self, device))
    run("source", FactorEmbed(rank=RANKS + "," + RANKS), Gqa(groups=2))
    assert not [name for name, device in read if device == "cpu" and ("embed_tokens" in name or "lm_head" in name)]
    outer = open_checked(Path("out")).model("cpu").outer
    table = outer_tensors(outer, [torch.tensor([[3, 7]])])["embed_tokens.weight"]
    assert table.abs().sum(1).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.few(2)
@pytest.mark.parametrize("later", [(Gqa(groups=2), Refit()), (PruneLayers(layers="1"),), (Moe(experts=4),), (LowRank(rank=8), Refit())])
def test_later_steps_work_on_what_it_leaves(later):
    put(Path("source"), num_hidden_layers=3, mlp_bias=False, **TIED)
    run("source", FactorEmbed(rank=RANKS), *later, place="together")
    run("source", FactorEmbed(rank=RANKS), place="first")
    run("first", *(step for step in later if not isinstance(step, Refit)), place="apart")
    for folder in ("together", "apart"):
        assert read_config(Path(folder)).replaced_outside("embed")
        assert logits(opened(folder)).isfinite().all()
    own = [name for name in tensors(Path("together")) if "embed_tokens.effconvert" in name]
    assert own
    assert all(torch.equal(tensors(Path("together"))[name], tensors(Path("first"))[name]) for name in own)


@pytest.mark.parametrize("changes", [TIED, {}])
def test_calibration_and_choices_run_what_the_model_computes(changes):
    put(Path("source"), **changes)
    run("source", FactorEmbed(rank=8))
    checkpoint, model = open_checked(Path("out")), opened("out")
    ids = torch.arange(3, 35)[None]
    forward = Forward(lambda: checkpoint.model("cpu"), [ids], lambda steps: None)
    states = forward.begin(32)
    with torch.no_grad():
        assert torch.allclose(states[0], model.get_input_embeddings()(ids), atol=1e-6)
        for index in range(2):
            states = forward.layer(index, states)
        assert (forward._logits(states[0], 0) - model(ids).logits).abs().max() < 1e-4
        assert forward.divergence(states, states) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_refit_brings_part_of_it_back(kind):
    put(Path("source"), kind, noise=1.0, only="weight", num_hidden_layers=3)
    outcome = run("source", FactorEmbed(rank=6, where="embed" if kind == "llama" else "both"), place="plain")
    decided = outcome.plan.surgeries[0]
    conversion = run("source", decided, Refit(), place="fitted").plan
    assert "the outputs of attention and MLP are fitted to the original's hidden states" in " ".join(conversion.notes)
    ids = heldout()
    with torch.no_grad():
        expected, *found = (opened(folder)(ids).logits.log_softmax(-1) for folder in ("source", "plain", "fitted"))
    plain, fitted = (float((expected.exp() * (expected - other)).sum(-1).mean()) for other in found)
    assert fitted < 0.999 * plain


def test_where_a_norm_follows_the_layers_refit_says_that_it_cannot_help():
    assert any("so nothing makes up for factor-embed" in note for note in planned("olmo2", TIED, Refit(), rank=RANKS).notes)


# What is told and refused.


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "give either --rank or --ratio"),
        ({}, {"rank": 4, "ratio": 0.5}, "give either --rank or --ratio"),
        ({}, {"rank": 0}, "--rank is '0'"),
        ({}, {"rank": "4,0"}, "--rank is '4,0'"),
        ({}, {"ratio": 0}, "--ratio is 0, and it should be greater than 0"),
        ({}, {"rank": 33}, "--rank 33 is more than the full rank of the table; give at most 32"),
        ({}, {"rank": "4,4,4"}, "--rank has 3 ranks, and there are 6 blocks each of the embedding and of the head"),
        (TIED, {"rank": "4,4,4"}, "--rank has 3 ranks, and there are 6 blocks; give one"),
        ({}, {"rank": 4, "blocks": 9}, "--blocks 9 is more than 128 tokens can be cut into, each twice as large; give at most 8"),
        (TIED, {"rank": 4, "where": "head"}, r"the head is the embedding \(tie_word_embeddings\), so both are replaced together; leave out --where"),
        (TIED, {"rank": 4, "where": "embed"}, "leave out --where"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, options, message):
    source = put(Path("source"), **changes)
    with pytest.raises(OptionError, match=message):
        run(source, FactorEmbed(**options))
    assert not Path("out").exists()


def test_a_model_without_a_head_has_none_to_replace():
    bare = open_checkpoint(save(tiny("llama").base_model, Path("planned")))
    with pytest.raises(OptionError, match="LlamaModel has no head that predicts tokens; leave out --where"):
        plan(bare, (FactorEmbed(rank=4, blocks=1, where="head"),))


def test_layers_are_refused_with_the_reason():
    with pytest.raises(OptionError, match="what is outside the layers; leave out --layers"):
        FactorEmbed(rank=4, layers="0")


def test_a_factorised_embedding_is_not_factorised_again():
    run(put(Path("source"), **TIED), FactorEmbed(rank=8))
    with pytest.raises(ModelError, match="this llama has factor-embed in place of the embed already; begin from the original"):
        run("out", FactorEmbed(rank=4), place="twice")
    assert "already" in inspect(open_checkpoint(Path("out"))).refusals["factor-embed"]
    with pytest.raises(ModelError, match="already"):
        run("source", FactorEmbed(rank=RANKS), FactorEmbed(rank=RANKS), place="twice")


def test_a_language_model_inside_another_model_is_refused():
    config = planned(rank=4, blocks=1).checkpoint.config
    with pytest.raises(ModelError, match="llama is inside a llava here, whose own class has no place for that"):
        FactorEmbed(rank=4).check(replace(config, wrapper=Wrapper({"model_type": "llava"}, "llama")))


def test_a_head_inside_a_larger_module_is_refused():
    source = put(Path("source"), "bert", tie_word_embeddings=False)
    with pytest.raises(ModelError, match="the head of this bert is no module of its own on disk, so it cannot be replaced; give --where embed"):
        run(source, FactorEmbed(rank=RANKS + "," + RANKS))
    run(source, FactorEmbed(rank=8, where="embed"))
    assert logits(opened("out")).isfinite().all()


def test_the_order_of_steps():
    put(Path("source"), **TIED)
    with pytest.raises(OptionError, match="factor-embed reads layers that gqa has not fitted by then; convert twice, gqa first"):
        run("source", Gqa(groups=2), FactorEmbed(rank=RANKS))
    with pytest.raises(OptionError, match="gqa before it is not fitted yet; convert twice, or put factor-embed first, where gqa can"):
        run("source", Gqa(groups=2), FactorEmbed(rank=8))
    with pytest.raises(OptionError, match="factor-embed before it is not fitted yet; convert twice, or put low-rank first"):
        run("source", FactorEmbed(rank=RANKS), LowRank(ratio=0.5))
    with pytest.raises(OptionError, match="its attention and FFNs have the shapes of the original's"):
        planned("llama", TIED, Transfer(), rank=RANKS)


def test_the_plan_says_what_is_saved_and_where_nothing_is():
    assert "embedding keeps 65.2% of 4096 parameters" in planned("llama", TIED, rank=RANKS).notes[-1]
    assert "embedding and head keep" in planned("llama", {}, rank=f"{RANKS},{RANKS}").notes[-1]
    assert "nothing is saved: at these ranks there are 4960 parameters, and the table has 4096" in planned("llama", TIED, rank=31, blocks=1).notes[-1]
    assert list(differences(planned("llama", TIED, rank=8, blocks=1).config)) == [
        "factor-embed --rank 8 --blocks 1 --where both in place of the embedding and of the head, which is the same"
    ]
    [head] = differences(planned("llama", {}, rank=8, blocks=1, where="head").config)
    assert head == "factor-embed --rank 8 --blocks 1 --where head in place of the head"


def test_list_and_help_say_what_it_is():
    listed = CliRunner().invoke(main, ["list"]).output
    assert "exact with --ratio 1" in listed.split("factor-embed", 1)[1].splitlines()[1]
    assert FactorEmbed(ratio=0.5).label == "factor-embed-0.5"
    assert FactorEmbed(rank=384).label == "factor-embed-384"
    assert FactorEmbed(rank="4,5").label == "factor-embed"
    assert FactorEmbed.allowed_options(planned(rank=4, blocks=1).checkpoint.config) == "--ratio R, or --rank 1 to 32"


def edited(change, **how):
    """Convert, change config.json and the tensors, and return what opening says."""
    run(put(Path("source"), **TIED), FactorEmbed(rank=RANKS))
    file, weights = Path("out/config.json"), tensors(Path("out"))
    config = json.loads(file.read_text())
    change(config["effconvert"]["replaced"], weights)
    file.write_text(json.dumps(config))
    save_file(weights, "out/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as error:
        open_checked(Path("out"))
    return str(error.value)


OWN = "model.embed_tokens.effconvert."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records, weights: weights.pop(OWN + "left_2"), f"no {OWN}left_2, which factor-embed needs"),
        (lambda records, weights: weights.update({OWN + "left_9": torch.ones(2)}), f"{OWN}left_9, for which factor-embed has no place"),
        (lambda records, weights: weights.update({OWN + "left_2": torch.ones(2, 3)}), f"{OWN}left_2 is 2 x 3, but config.json makes it 8 x 12"),
        (lambda records, weights: weights.update({OWN + "order": torch.ones(128)}), f"{OWN}order is stored as F32"),
        (lambda records, weights: weights.update({OWN + "left_5": torch.ones(64, 6, dtype=torch.int64)}), f"{OWN}left_5 is stored as I64"),
        (
            lambda records, weights: weights.update({"model.embed_tokens.weight": torch.ones(128, 32)}),
            "embed_tokens.weight, which its config.json says was",
        ),
        (lambda records, weights: weights.update({"lm_head.effconvert.left_0": torch.ones(2)}), "lm_head.effconvert.left_0, for which its config.json has no"),
        (lambda records, weights: records[0].update(layers=[0]), "embed is outside the layers, and factor-embed is in layers"),
        (lambda records, weights: records.append(records[0]), "there are two techniques for embed"),
        (lambda records, weights: records[0].update(place="ffn", layers=[0]), f"{OWN}order, for which its config.json has no place"),
        (lambda records, weights: records[0].update(technique="low-rank"), "low-rank .* replaces embed, and low-rank replaces nothing there"),
        (lambda records, weights: records[0].update(place="head"), f"{OWN}order, for which its config.json has no place"),
        (lambda records, weights: records[0]["options"].update(rank="99"), "config.json says that factor-embed is in this llama: --rank 99 is more"),
    ],
)
def test_what_contradicts_itself_is_refused(change, message):
    assert re.search(message, edited(change))
