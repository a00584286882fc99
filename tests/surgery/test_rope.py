"""RoPE: pairs of a head's dimensions, and models that get it in place of a position table: what is exact, the fits, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.surgery._rope import join_pairs, split_pairs
from effconvert.surgery.attention._turned import turning
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.rope import Rope
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.projections.low_rank import LowRank
from tests.heal.healing import letters, opened, prose, run
from tests.models import logits, save, tiny

PAIRS = {"halves": [(0, 3), (1, 4), (2, 5)], "interleaved": [(0, 1), (2, 3), (4, 5)]}  # of the first six of eight dimensions


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("dim", [-1, -2])
def test_pairs_are_those_of_the_layout(layout, dim):
    rows = torch.arange(8.0).expand(2, 3, 8)
    rows = rows if dim == -1 else rows.mT
    parts = split_pairs(rows, 6, layout, dim)
    first, second, still = (part.movedim(dim, -1)[0, 0].tolist() for part in parts)
    assert list(zip(first, second, strict=True)) == PAIRS[layout]
    assert still == [6, 7]
    assert torch.equal(join_pairs(*parts, layout, dim), rows)


@pytest.mark.parametrize("layout", ["", *PAIRS])
def test_a_head_that_is_not_turned_stands_still(layout):
    rows = torch.arange(8.0).expand(2, 8)
    first, second, still = split_pairs(rows, 0, layout)
    assert (first.shape, second.shape) == ((2, 0), (2, 0))
    assert torch.equal(still, rows)
    assert torch.equal(join_pairs(first, second, still, layout), rows)


TARGETS = [("bert", "roformer"), ("bert", "jina_embeddings_v3"), ("roberta", "jina_embeddings_v3"), ("gpt2", "gpt_neox")]
TABLE = {"bert": "bert.embeddings.position_embeddings", "roberta": "roberta.embeddings.position_embeddings", "gpt2": "transformer.wpe"}


def put(model, folder="source"):
    """Write a model with a tokenizer, and a text for all fits."""
    Path("text.txt").write_text(prose())
    save(model, Path(folder))
    letters().save_pretrained(folder)
    return model


def queries(model):
    """The queries and keys of each layer, [heads, D, M], as views that can be written through."""
    for layer in model.base_model.get_submodule(FAMILIES[model.config.model_type].layers):
        if hasattr(layer, "attn"):
            q, k, _ = layer.attn.c_attn.weight.data.T.split(32)
        else:
            q, k = layer.attention.self.query.weight.data, layer.attention.self.key.weight.data
        yield q.unflatten(0, (4, -1)), k.unflatten(0, (4, -1))


def by_place(kind="bert"):
    """A model whose attention goes by distances, of which a table of sines and cosines tells it: the same in all heads, at the angles of RoPE."""
    model = tiny(kind)
    turns = torch.arange(64)[:, None] * 1e4 ** (-torch.arange(0, 8, 2) / 8)
    with torch.no_grad():
        rows = torch.cat([turns.cos(), turns.sin()], 1)
        model.get_submodule(TABLE[kind]).weight[:, :8] = 3 * rows
        model.get_submodule(TABLE[kind]).weight[:, 8:] = 0
        model.get_input_embeddings().weight[:, :8] = 0
        for q, k in queries(model):
            q[:], k[:] = 0, 0
            q[:, range(8), range(8)] = k[:, range(8), range(8)] = 0.7
    return model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize(("kind", "to"), TARGETS)
def test_a_table_that_says_nothing_can_go(kind, to):
    """All of its rows are the same, queries have nothing in the pair that turns fastest, and the others turn by next to nothing."""
    model = tiny(kind)
    with torch.no_grad():
        table = model.get_submodule(TABLE[kind]).weight
        table[:] = table[5].clone()
        for q, _ in queries(model):
            q[:, [0, 1, 4]] = 0  # of both layouts
        for name, parameter in model.named_parameters():
            if name.endswith(("query.bias", "c_attn.bias")):
                parameter[:32].unflatten(0, (4, -1))[:, [0, 1, 4]] = 0
    put(model)
    run("source", Rope(to=to, theta=1e30, fit="none"))
    assert opened().config.model_type == to
    torch.testing.assert_close(logits(opened()).log_softmax(-1), logits(model).log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_both_layouts_compute_the_same():
    """Pairs that lie side by side in roformer lie half a head apart in jina_embeddings_v3."""
    model = put(tiny("bert"))
    run("source", Rope(to="jina_embeddings_v3", theta=500.0, fit="none"), place="halves")
    for layer in model.bert.encoder.layer:
        for part in (layer.attention.self.query, layer.attention.self.key):
            for tensor in (part.weight.data, part.bias.data[:, None]):
                heads = tensor.unflatten(0, (4, 8))
                heads.copy_(join_pairs(*split_pairs(heads.clone(), 8, "halves", -2), "interleaved", -2))
    put(model, "permuted")
    run("permuted", Rope(to="roformer", theta=500.0, fit="none"), place="interleaved")
    torch.testing.assert_close(logits(opened("interleaved")), logits(opened("halves")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_scores_depend_on_the_distance_alone(layout):
    rotation, query, key = turning(20, 8, 1e4, layout), random(1, 8, seed=1), random(1, 8, seed=2)
    scores = rotation(query.expand(20, 8)) @ rotation(key.expand(20, 8)).mT
    for distance in range(-19, 20):
        row = scores.diagonal(distance)
        torch.testing.assert_close(row, row[:1].expand_as(row), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.diagonal(), (query @ key.T).expand(1, 20)[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def off(*folders):
    """How far the attention weights of the first layer are from the original's, for each model: their mean difference."""
    ids = torch.tensor(letters()(prose(16 * 60, seed=1)).input_ids).view(16, 60)
    original, *found = (opened(name, attn_implementation="eager").base_model(ids, output_attentions=True).attentions[0] for name in ("source", *folders))
    return [float((weights - original).abs().sum(-1).mean()) for weights in found]


@pytest.mark.few(4)
@pytest.mark.parametrize(("kind", "to"), [TARGETS[0], TARGETS[1], TARGETS[3]])
def test_a_fit_finds_what_positions_did(kind, to):
    put(by_place(kind))
    for name, steps in {"turned": [Rope(fit="none", to=to)], "fitted": [Rope(to=to)]}.items():
        run("source", *steps, place=name)
    turned, fitted = off("turned", "fitted")
    assert fitted < 0.4 * turned
    if FAMILIES[to].own_attention:  # refit leaves queries alone
        return
    for name in ("turned", "fitted"):
        run(name, Refit(teacher="source"), place=f"{name}-refitted")
    turned_later, fitted_later = off("turned-refitted", "fitted-refitted")
    assert turned_later < 0.5 * turned  # towards the original on its own inputs: on those here it does not know where a token stands
    assert fitted_later < 1.2 * fitted


@pytest.mark.usefixtures("one_window_a_batch")
def test_attention_is_trained_where_the_table_is_gone():
    put(by_place())
    run("source", Rope(fit="none"), place="turned")
    outcome = run("turned", Transfer(teacher="source", epochs=2), place="trained")
    assert {*outcome.layer_errors} == {"0", "1"}
    assert all(said["after"] < 0.8 * said["before"] for said in outcome.layer_errors.values())


def test_techniques_apply_to_what_comes_of_it():
    put(by_place())
    run("source", Rope(to="jina_embeddings_v3"), Gqa(groups=2), Linear(layers="1"))
    assert logits(opened()).isfinite().all()
    put(tiny("gpt2", n_layer=3))
    run("source", PruneLayers(layers="1"), Rope(), LowRank(rank=16, layers="0"), place="thin")
    assert opened("thin").config.num_hidden_layers == 2


@pytest.mark.parametrize(("kind", "to"), TARGETS)
def test_padding_changes_nothing(kind, to):
    put(by_place(kind) if kind != "roberta" else tiny(kind))
    run("source", Rope(to=to), place="out")
    ids = torch.arange(10, 30)[None]
    model = opened().base_model
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
        for left, right in ((5, 0), (0, 5), (2, 3)):
            padded = torch.nn.functional.pad(ids, (left, right))
            found = model(padded, attention_mask=torch.nn.functional.pad(torch.ones_like(ids), (left, right))).last_hidden_state
            torch.testing.assert_close(found[:, left : left + 20], expected, rtol=1e-4, atol=1e-4)


def test_what_a_config_leaves_out_is_said_for_the_other_class():
    put(tiny("gpt2"))
    said = json.loads(Path("source/config.json").read_text())
    left_out = ("activation_function", "layer_norm_epsilon", "attn_pdrop", "n_inner", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    Path("source/config.json").write_text(json.dumps({key: value for key, value in said.items() if key not in left_out} | {"n_inner": 48}))
    run("source", Rope(fit="none"))
    found, usual = transformers.AutoConfig.from_pretrained("out"), transformers.GPT2Config()
    assert (found.hidden_act, found.layer_norm_eps, found.attention_dropout) == (usual.activation_function, usual.layer_norm_epsilon, usual.attn_pdrop)
    assert (found.bos_token_id, found.eos_token_id, found.tie_word_embeddings) == (usual.bos_token_id, usual.eos_token_id, True)
    assert found.rope_parameters == {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert not {"n_embd", "n_head", "n_layer", "n_positions"} & json.loads(Path("out/config.json").read_text()).keys()


@pytest.mark.parametrize("pooled", [True, False])
def test_a_pooler_is_kept_where_there_is_a_place_for_it(pooled):
    body = tiny("bert")
    model = transformers.BertModel(body.config, add_pooling_layer=pooled).eval()
    model.load_state_dict(body.bert.state_dict(), strict=False)
    put(model)
    kept, left_out = (run("source", Rope(to=to, fit="none"), place=str(to)) for to in ("jina_embeddings_v3", "roformer"))
    weight = opened("jina_embeddings_v3").pooler.dense.weight
    assert torch.equal(weight, model.pooler.dense.weight if pooled else torch.zeros(32, 32))
    assert not hasattr(opened("roformer"), "pooler")
    assert "has no pooler" in " ".join(left_out.plan.notes)
    assert "has no pooler" not in " ".join(kept.plan.notes)


def test_a_bfloat16_model_stays_one():
    put(tiny("gpt2").bfloat16())
    run("source", Rope())
    model = opened()
    assert model.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "changes", "step", "error", "reason"),
    [
        ("bert", {}, Rope(to="gpt_neox"), OptionError, "give roformer or jina_embeddings_v3"),
        ("gpt2", {}, Rope(to="roformer"), OptionError, "give gpt_neox"),
        ("bert", {"hidden_size": 36}, Rope(), ModelError, "9 numbers, and RoPE turns pairs"),
        ("bert", {"hidden_act": "relu"}, Rope(to="jina_embeddings_v3"), ModelError, "has gelu where this bert has relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, Rope(), ModelError, "scale_attn_by_inverse_layer_idx"),
        ("opt", {}, Rope(), ModelError, "no family of transformers is the same with RoPE; give a bert"),
        ("llama", {}, Rope(), ModelError, "llama has RoPE already"),
        ("bloom", {}, Rope(), ModelError, "adds distances to its scores"),
        ("fnet", {}, Rope(), ModelError, "does not attend"),
    ],
)
def test_what_cannot_be_turned_is_refused_with_the_reason(kind, changes, step, error, reason):
    put(tiny(kind, **changes))
    with pytest.raises(error, match=reason):
        run("source", step)
    assert not Path("out").exists()


def test_a_model_that_does_not_say_how_long_a_text_may_be_is_refused():
    put(tiny("gpt2"))
    path = Path("source/config.json")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "n_positions"}))
    with pytest.raises(ModelError, match=r"does not say how long a text may be \(n_positions\); write it there"):
        run("source", Rope())


def test_a_base_is_a_number():
    with pytest.raises(OptionError, match="--theta is inf"):
        Rope(theta=float("inf"))


def test_a_model_with_a_technique_in_it_is_refused():
    put(tiny("bert"))
    run("source", Linear(feature="elu"), place="mixed")
    with pytest.raises(ModelError, match="parts of effconvert in it"):
        run("mixed", Rope())
