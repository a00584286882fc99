"""A bert as transformers' own albert: layers stored once, a narrow embedding, the fits behind norms, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import layer_norm

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth._fitted import fit_layer
from effconvert.surgery.depth._normed import follow_normed
from effconvert.surgery.depth.albert import NORMS, Albert
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.depth.share_layers import ShareLayers
from effconvert.surgery.embedding._mapped import basis_of, fit
from effconvert.surgery.embedding.factor_embed import FactorEmbed
from tests.heal.healing import goes_on_after_a_kill, letters, prose, put, run, tensors
from tests.models import logits, save, tiny

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def ids():
    return torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))


def bare(folder="source", pooled=True, **changes):
    """Write a bert without its head, and return it."""
    body = tiny("bert", **changes)
    model = transformers.BertModel(body.config, add_pooling_layer=pooled).eval()
    model.load_state_dict(body.bert.state_dict(), strict=False)
    save(model, Path(folder))
    letters().save_pretrained(folder)
    return model


def stock(folder="out", kind=transformers.AlbertModel):
    """The result in transformers' own class, with nothing missing and nothing left over."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.inference_mode()
def error_of(original, folder="out"):
    """The mean squared error of the last hidden states, in shares of the original's variance."""
    expected, found = (model(ids()).last_hidden_state for model in (original, stock(folder)))
    return float((found - expected).square().mean() / expected.var())


@pytest.mark.parametrize("pooled", [True, False])
def test_a_bare_bert_keeps_its_pooler_or_gets_one_of_zeros(pooled):
    model = bare(pooled=pooled)
    run("source", Albert())
    with torch.inference_mode():
        found = stock()(ids())
        assert torch.equal(found.last_hidden_state, model(ids()).last_hidden_state)
        first = found.last_hidden_state[:, 0]
        torch.testing.assert_close(found.pooler_output, model.pooler.dense(first).tanh() if pooled else torch.zeros_like(first), **CLOSE)


@pytest.mark.parametrize(("layers", "groups"), [(4, 2), (4, 1), (5, 2), (6, 4)])
def test_albert_runs_a_stored_layer_in_place_of_its_group(layers, groups):
    """Written as a bert, each layer of a group is a copy of the first."""
    model = bare(num_hidden_layers=layers)
    outcome = run("source", Albert(groups=groups, pool="first"))
    numbers = [int(layer / (layers / groups)) for layer in range(layers)]
    for layer, number in enumerate(numbers):
        model.encoder.layer[layer].load_state_dict(model.encoder.layer[numbers.index(number)].state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(stock()(ids()).last_hidden_state, model(ids()).last_hidden_state, **CLOSE)
    assert outcome.plan.after.parameters == sum(parameter.numel() for parameter in stock().parameters())
    assert outcome.plan.config.content["num_hidden_groups"] == groups


def test_what_a_berts_config_leaves_out_is_said_for_albert():
    source = put(Path("source"), "bert")
    said = json.loads((source / "config.json").read_text())
    left_out = ("hidden_act", "type_vocab_size", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_dropout_prob")
    left_out += ("attention_probs_dropout_prob",)
    (source / "config.json").write_text(json.dumps({key: value for key, value in said.items() if key not in left_out}))
    run(source, Albert())
    bert, albert = transformers.BertConfig(), transformers.AutoConfig.from_pretrained("out")
    assert [getattr(albert, key) for key in left_out] == [getattr(bert, key) for key in left_out]


def test_the_rest_of_a_berts_pretraining_head_is_left_out():
    model = tiny("bert")
    model.cls.seq_relationship = torch.nn.Linear(32, 2)
    source = save(model, Path("source"))
    run(source, Albert())
    assert torch.equal(logits(stock(kind=transformers.AlbertForMaskedLM)), logits(model))


def test_what_transformers_saves_is_read_with_every_parameter_in_its_place():
    bare(num_hidden_layers=4)
    run("source", Albert(groups=2))
    save(stock(), Path("again"))
    checkpoint = open_checkpoint(Path("again"))
    assert checkpoint.config.shared == open_checkpoint(Path("out")).config.shared
    assert [record.layers for record in checkpoint.config.shared] == [(0, 1), (2, 3)]
    assert checkpoint.layers[1] == checkpoint.layers[0] != checkpoint.layers[2]
    assert {*checkpoint.layer(3, "meta")} == {*open_checkpoint(Path("source")).layer(3, "meta")}
    assert not [part for part in checkpoint.model("meta").outer if part.startswith("other:")]


def test_a_group_that_is_the_same_layer_twice_is_fitted_well():
    model = tiny("bert", num_hidden_layers=4)
    model = transformers.BertModel(model.config).eval()
    model.load_state_dict(tiny("bert", num_hidden_layers=4).bert.state_dict(), strict=False)
    for index in (0, 2):
        model.encoder.layer[index + 1].load_state_dict(model.encoder.layer[index].state_dict())
    save(model, Path("source"))
    letters().save_pretrained("source")
    run("source", Albert(groups=2))
    assert error_of(model) < 1e-3


@pytest.mark.slow
def test_fitted_layers_are_nearer_than_the_first_of_each_group():
    model = bare(num_hidden_layers=4)
    run("source", Albert(groups=2))
    run("source", Albert(groups=2, pool="first"), place="first")
    assert error_of(model) < 0.5 * error_of(model, "first")


def fitting(found):
    """Convert with `found` in place of the fit."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("effconvert.surgery.depth._fitted.fit_layer", found)
        run("source", Albert(groups=1), place="tried")


def test_a_projection_behind_which_a_norm_stands_comes_back():
    """A group of one layer, whose output was made smaller: what comes out of its norm goes back to what it was."""
    bare(num_hidden_layers=2)
    errors = []

    def found(layer, path, group, norms):
        member = path[0].unchanged
        for part in ("down", "down.bias"):
            layer[part] = 0.7 * member[part]
        for _ in range(5):
            pairs = zip(layer.activations.capture(layer), layer.activations.capture(member), strict=True)
            errors.append(sum(float((one.out - other.out).square().mean()) for one, other in pairs))
            follow_normed(layer, [member], "down", ["down", "down.bias"])

    fitting(found)
    assert errors[1] < 0.2 * errors[0]
    assert errors[4] < 0.1 * errors[0]


def test_the_norm_of_a_group_is_the_least_squares_fit_of_each_channel():
    bare(num_hidden_layers=2)
    seen = {}

    def found(layer, path, group, norms):
        fit_layer(layer, path, group, norms)
        members = [member.unchanged for member in path]
        trial = {part: layer[part] for part in layer}
        states, rows, wanted = layer.activations.states, [], []
        for member in members:
            copy = member.on_top(member.index, member.config)
            for part, tensor in trial.items():
                copy[part] = tensor
            captures = list(layer.activations.capture(copy, ("mlp_post_norm",), states=states))
            rows += [layer_norm(capture.inputs["mlp_post_norm"], (32,)).flatten(0, 1).double() for capture in captures]
            wanted += [state.flatten(0, 1).double() for state in layer.activations.original_stream(2 * member.index + 2)]
            states = [capture.out for capture in captures]
        z, y = torch.cat(rows), torch.cat(wanted)
        both = torch.stack([torch.linalg.lstsq(torch.stack([z[:, c], torch.ones(len(z)).double()], 1), y[:, c]).solution for c in range(32)])
        seen["gain"], seen["bias"], seen["layer"] = both[:, 0], both[:, 1], trial

    fitting(found)
    # The last norm of a group is fitted on its own path: behind its first layer the path depends on it, so it is near to what this path would want. (Bounds are
    # a little above what this text gives.)
    assert set(NORMS) <= set(seen["layer"])
    assert (seen["layer"]["mlp_post_norm"] - seen["gain"]).abs().max() < 0.05 * seen["gain"].abs().max()
    assert (seen["layer"]["mlp_post_norm.bias"] - seen["bias"]).abs().max() < 0.08 * seen["gain"].abs().max()


@pytest.mark.slow
def test_share_layers_fits_behind_norms_too():
    put(Path("source"), "bert", num_hidden_layers=4)
    run("source", ShareLayers(groups=2))
    fitted = tensors(Path("out"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("effconvert.surgery.depth._fitted.follow_normed", lambda *_: None)
        run("source", ShareLayers(groups=2), place="before")
    assert any(not torch.equal(tensor, tensors(Path("before"))[name]) for name, tensor in fitted.items())


def test_columns_of_the_basis_sum_to_zero_and_keep_the_most_energy():
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 13)
    rows -= rows.mean(1, keepdim=True)
    basis = basis_of(rows.T @ rows, 5)
    assert basis.sum(0).abs().max() < 1e-12  # what all numbers of a row have in common is lost, as in the norm
    assert (rows @ basis).sum(1).abs().max() < 1e-10  # the norm over E numbers takes no mean away
    energy = torch.linalg.eigvalsh(rows.T @ rows)[-4:].sum()
    assert (rows @ basis).square().sum() == pytest.approx(float(energy))


def test_an_embedding_of_low_rank_is_written_as_it_is():
    model = bare()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        common = torch.randn(11, 32, generator=draw)
        for table in (model.embeddings.word_embeddings, model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
            table.weight.copy_(torch.randn(len(table.weight), 11, generator=draw) @ common)
    save(model, Path("source"))
    outcome = run("source", Albert(embedding=12))  # 11 directions, and one that the norm takes away
    assert error_of(model) < 1e-4
    assert outcome.plan.config.embed_width == 12
    run("source", Albert(embedding=8), place="less")
    assert error_of(model, "less") > 1e-2


def test_the_matrix_behind_the_norm_is_the_weighted_least_squares_fit():
    bare()
    from effconvert.convert.calibration import prepare
    from effconvert.convert.survey import forward_of
    from effconvert.options import RunOptions
    from effconvert.progress import NoProgress
    from effconvert.surgery.embedding._mapped import UNIFORM

    planned = plan(open_checkpoint(Path("source")), (Albert(embedding=8),))
    from dataclasses import replace

    planned = replace(planned, calibration=prepare(planned, RunOptions(calibrate="text.txt", calibration_tokens=512)))
    forward = forward_of(planned, 0, NoProgress(), "")
    found = fit(forward, 8)
    stored = tensors(Path("source"))
    word, positions, types = (stored[f"embeddings.{name}_embeddings.weight"].double() for name in ("word", "position", "token_type"))
    gain, bias = (stored[f"embeddings.LayerNorm.{name}"].double() for name in ("weight", "bias"))
    text = torch.cat([(word[batch] + positions[: batch.shape[1]] + types[0]).flatten(0, 1) for batch in planned.calibration.batches])
    rows = torch.cat([text, word + positions.mean(0) + types[0]])
    weights = torch.cat([torch.full((len(text),), (1 - UNIFORM) / len(text)), torch.full((128,), UNIFORM / 128)]).double().sqrt()[:, None]
    inner = layer_norm(rows @ found.basis.double(), (8,))
    inputs = torch.cat([inner, torch.ones_like(inner[:, :1])], 1)
    both = torch.linalg.lstsq(inputs * weights, (layer_norm(rows, (32,)) * gain + bias) * weights, driver="gelsd").solution.T
    predicted, best = inputs @ torch.cat([found.matrix, found.bias[:, None]], 1).double().T, inputs @ both.T
    assert (predicted - best).abs().max() < 1e-3 * best.abs().max()


@pytest.mark.slow
def test_a_killed_run_goes_on(monkeypatch):
    bare(num_hidden_layers=4)
    goes_on_after_a_kill(monkeypatch, Albert(groups=2, embedding=12))


def test_layers_are_dropped_before_the_others_are_stored_once():
    bare(num_hidden_layers=4)
    outcome = run("source", PruneLayers(layers="1"), Albert(groups=1, embedding=16), verify=True, text="text.txt", tokens=64, context=32)
    assert outcome.plan.config.layers == 3
    assert stock().config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("bert", {"groups": 3}, OptionError, "--groups 3 is more than the 2 layers of this model; give at most 2"),
        ("bert", {"groups": 0}, OptionError, "--groups is 0"),
        ("bert", {"embedding": 33}, OptionError, "--embedding 33 is more than the width of the layers; give at most 32"),
        ("bert", {"embedding": 16}, OptionError, r"the head of BertForMaskedLM multiplies by the embedding .* save the encoder alone \(BertModel\)"),
        ("roberta", {}, ModelError, "roberta computes what transformers' albert does not"),
        ("llama", {}, ModelError, "llama computes what"),
    ],
)
def test_what_cannot_be_an_albert_is_refused(kind, options, error, message):
    source = save(tiny(kind), Path("source"))
    with pytest.raises(error, match=message):
        plan(open_checkpoint(source), (Albert(**options),))


def test_a_bert_with_parts_of_effconvert_or_with_another_head_is_refused():
    put(Path("source"), "bert")
    run("source", Gqa(groups=2), place="shared")
    with pytest.raises(ModelError, match="has parts of effconvert in it, for which albert has no place"):
        run("shared", Albert())
    save(transformers.BertForSequenceClassification(tiny("bert").config), Path("classifier"))
    with pytest.raises(ModelError, match="BertForSequenceClassification has no counterpart in albert"):
        run("classifier", Albert())
    raw = json.loads(Path("source/config.json").read_text())
    Path("source/config.json").write_text(json.dumps({**raw, "position_embedding_type": "relative_key"}))
    with pytest.raises(ModelError, match="position_embedding_type = 'relative_key' has no counterpart in albert"):
        run("source", Albert())


@pytest.mark.parametrize("step", [Gqa(groups=2), FactorEmbed(rank="4"), ShareLayers(groups=1), Albert()], ids=lambda step: step.name)
def test_no_step_changes_an_albert(step, command):
    put(Path("source"), "bert")
    reason = r"albert runs a layer that is stored once many times \(num_hidden_groups = 1\).* let `albert` be the last step"
    with pytest.raises(ModelError, match=reason):
        run("source", Albert(groups=1, pool="first"), step)
    run("source", Albert(groups=1, pool="first"), place="once")
    with pytest.raises(ModelError, match=reason):
        run("once", step)
    assert not Path("out").exists()
    assert "layers 0, 1 share all that they have" in command("inspect", "once").output
