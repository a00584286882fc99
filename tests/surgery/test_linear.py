"""Linear attention by feature maps is what its papers write down, beside a softmax window or alone, in whatever parts it is computed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from effconvert.errors import ModelError, OptionError
from effconvert.modeling.state import State
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing.linear import SHARE, Linear
from tests.surgery.rows import GROUPS, HEADS, WIDTH, config, random, rows

TOKENS = 150  # more than two chunks
SPLITS = [[TOKENS], [64, 86], [7, 1, 100, 42], [1] * TOKENS]
LLAMA = config("llama", num_key_value_heads=GROUPS, max_position_embeddings=64)
OPTIONS = [{"feature": "hedgehog"}, {"feature": "t2r", "features": 12}, {"feature": "elu"}]
WINDOWS = [0, 1, 6, 70]
EACH = [{**options, "window": window} for options in OPTIONS for window in WINDOWS]
EXACT = 1e-5  # of float32 values of about 1


def trained(technique):
    """Parameters as training might leave them."""
    begun = technique.initial_values(LLAMA, 0)
    return {name: value + 0.3 * random(*value.shape, seed=seed) for seed, (name, value) in enumerate(begun.items())}


def mixed(technique, weights, query, key, value, live=None, split=None, causal=True, padded=False):
    """What a mixer gives of all tokens, called once, or in parts with a state."""
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    state, made = State(technique.cache_slots(LLAMA)) if split else None, []
    cuts = ((query, 2), (key, 2), (value, 2), (live, 1))
    for q, k, v, alive in zip(*(tensor.split(split or key.shape[2], dim) for tensor, dim in cuts), strict=True):
        if state:
            state.update(k, v)
        made.append(technique.mix(weights, Call(q, k, v, WIDTH**-0.5, alive, causal, state, q, None, padded=padded)))
    return torch.cat(made, 2)


def features(technique, weights, x, which):
    """phi(x) of each token, one head after the other, in float64."""
    made = []
    for head in range(x.shape[1]):
        row = x[:, head]
        if technique.feature == "elu":
            made.append(torch.where(row > 0, row + 1, row.exp()))
            continue
        mapped = row @ weights[f"{which}_map"][head].T
        if technique.feature == "t2r":
            made.append((mapped + weights[f"{which}_bias"][head]).relu())
        else:
            made.append(torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1))
    return torch.stack(made, 1)


def reference(technique, weights, query, key, value, causal=True):
    """LoLCATs' equation 6 in float64, by the explicit matrix: one normaliser for softmax in the window and for features of what is older."""
    weights = {name: weight.double() for name, weight in weights.items()}
    query, key, value = (tensor.double() for tensor in (query, key, value))
    shared, tokens = HEADS // key.shape[1], query.shape[2]
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    kernel = features(technique, weights, query, "query") @ features(technique, weights, key, "key").repeat_interleave(shared, 1).mT
    kernel = kernel * (age >= technique.window) if causal else kernel
    if technique.window:
        scores = (query @ key.repeat_interleave(shared, 1).mT * WIDTH**-0.5).masked_fill((age < 0) | (age >= technique.window), -torch.inf)
        near = (scores - scores.amax(-1, keepdim=True)).exp()
        kernel = kernel + weights["share"].sigmoid()[:, None, None] * near
    return kernel @ value.repeat_interleave(shared, 1) / kernel.sum(-1, keepdim=True).clamp_min(1e-30)


@pytest.mark.parametrize("options", EACH, ids=lambda options: f"{options['feature']}-{options['window']}")
def test_mixing_is_the_papers_equation(options):
    technique = Linear(**options)
    weights = trained(technique)
    assert torch.allclose(mixed(technique, weights, *rows(TOKENS)), reference(technique, weights, *rows(TOKENS)).float(), atol=EXACT)


@pytest.mark.few(4)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("options", EACH, ids=lambda options: f"{options['feature']}-{options['window']}")
def test_any_number_of_calls_gives_the_same(options, split):
    technique = Linear(**options)
    weights = trained(technique)
    expected = reference(technique, weights, *rows(TOKENS)).float()
    assert torch.allclose(mixed(technique, weights, *rows(TOKENS), split=split), expected, atol=EXACT)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["feature"])
def test_an_encoder_sees_all_of_its_text(options):
    technique = Linear(**options)
    weights = trained(technique)
    made = mixed(technique, weights, *rows(TOKENS), causal=False)
    assert torch.allclose(made, reference(technique, weights, *rows(TOKENS), causal=False).float(), atol=EXACT)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    shuffled = mixed(technique, weights, *(tensor[:, :, order] for tensor in rows(TOKENS)), causal=False)
    assert torch.allclose(shuffled, made[:, :, order], atol=EXACT)  # keys are a set


def test_a_window_as_long_as_the_text_is_softmax():
    technique = Linear(window=TOKENS)
    made = mixed(technique, trained(technique), *rows(TOKENS))
    softmax = torch.nn.functional.scaled_dot_product_attention(*rows(TOKENS), is_causal=True, enable_gqa=True)
    assert torch.allclose(made, softmax, atol=EXACT)


@pytest.mark.parametrize("split", [None, [5, 60, 85], [1] * TOKENS])
@pytest.mark.parametrize("window", [0, 6])
def test_padding_changes_nothing(split, window):
    """Where a call puts its live tokens last, as it does wherever there is padding; and one text is nothing else."""
    technique, left = Linear(window=window), 40
    weights, live = trained(technique), torch.ones(2, TOKENS, dtype=torch.bool)
    live[0, :left] = live[1] = False
    wild = [torch.where(live[:, None, :, None], tensor, 100.0) for tensor in rows(TOKENS)]
    made = mixed(technique, weights, *wild, live, split, padded=True)
    kept = [tensor[:1, :, left:] for tensor in rows(TOKENS)]
    assert torch.allclose(made[:1, :, left:], mixed(technique, weights, *kept), atol=EXACT)
    assert made.isfinite().all()


@pytest.mark.parametrize("options", EACH[1::2], ids=lambda options: f"{options['feature']}-{options['window']}")
def test_gradients_are_those_of_the_equation(options):
    technique, found = Linear(**options), []
    for form in (mixed, reference):
        weights = {name: weight.clone().requires_grad_() for name, weight in trained(technique).items()}
        given = [tensor.clone().requires_grad_() for tensor in rows(90)]
        (form(technique, weights, *given) * random(2, HEADS, 90, WIDTH, seed=7)).sum().backward()
        found.append([tensor.grad for tensor in (*weights.values(), *given)])
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize("window", [0, 6])
def test_bfloat16_models_are_mixed_in_float32(window):
    """But for the products of the window, which are the model's own, and round scores of about 3 to 2^-7."""
    technique = Linear(window=window)
    weights = {name: weight.bfloat16() for name, weight in trained(technique).items()}
    given = [tensor.bfloat16() for tensor in rows(TOKENS)]
    made, expected = mixed(technique, weights, *given), reference(technique, weights, *given).float()
    assert made.dtype == torch.float32
    assert float((made - expected).norm() / expected.norm()) < (2**-7 if window else 1e-5)


def test_it_begins_as_its_papers_do():
    """Hedgehog's maps are the identity, a window counts a tenth of its softmax, and rows of t2r are random and of length 1."""
    begun = Linear(window=6).initial_values(LLAMA, 0)
    assert torch.equal(begun["query_map"], torch.eye(WIDTH).expand(HEADS, WIDTH, WIDTH))
    assert torch.equal(begun["key_map"], torch.eye(WIDTH).expand(GROUPS, WIDTH, WIDTH))
    assert torch.allclose(torch.tensor(SHARE).sigmoid(), torch.tensor(0.1), atol=1e-4)
    assert (begun["share"] == SHARE).all()
    begun = Linear(feature="t2r").initial_values(LLAMA, 0)
    assert begun["key_map"].shape == (GROUPS, 32, WIDTH)
    assert torch.allclose(begun["query_map"].norm(dim=-1), torch.ones(HEADS, 32))
    assert not begun["query_bias"].any()
    assert not torch.equal(begun["query_map"], Linear(feature="t2r").initial_values(LLAMA, 1)["query_map"])
    assert Linear(feature="elu").initial_values(LLAMA, 0) == {}


def test_what_is_remembered_is_a_matrix_a_head_and_the_window():
    state = {"state": ((GROUPS, 1, 2 * WIDTH, WIDTH + 1), "float32")}
    assert Linear().cache_slots(LLAMA) == state
    assert Linear(feature="elu").cache_slots(LLAMA)["state"][0] == (GROUPS, 1, WIDTH, WIDTH + 1)
    assert Linear(feature="t2r", features=5).cache_slots(LLAMA)["state"][0] == (GROUPS, 1, 5, WIDTH + 1)
    windowed = Linear(window=6).cache_slots(LLAMA)
    assert windowed["past_key"] == ((GROUPS, 6, WIDTH), "model")
    assert Linear().cache_slots(config("bert")) == {}
    technique = Linear(feature="elu")
    query, key, value = rows(TOKENS)
    held = State(technique.cache_slots(LLAMA))
    held.update(key, value)
    technique.mix({}, Call(query, key, value, 1.0, torch.ones(2, TOKENS, dtype=torch.bool), True, held, query, None))
    mapped = torch.nn.functional.elu(key) + 1
    assert torch.allclose(held.tensors["state"][:, :, 0, :, :-1], mapped.mT @ value, atol=1e-4)
    assert torch.allclose(held.tensors["state"][:, :, 0, :, -1], mapped.sum(2), atol=1e-4)


def test_it_is_exact_where_no_text_is_longer_than_the_window():
    assert Linear(window=64).is_exact(LLAMA)
    assert not Linear(window=63).is_exact(LLAMA)
    assert not Linear(window=1000).is_exact(config("llama"))


def test_features_are_for_t2r_and_windows_for_decoders():
    with pytest.raises(OptionError, match="--features belongs to --feature t2r; --feature hedgehog has as many as the heads' width gives"):
        Linear(features=8)
    with pytest.raises(OptionError, match="--window 6 is for decoders"):
        Linear(window=6).check(config("bert"))
    Linear().check(config("bert"))


def test_capped_scores_are_refused():
    with pytest.raises(ModelError, match="gemma2 caps its scores"):
        Linear().check(config("gemma2", attn_logit_softcapping=50.0))


def test_a_conversion_puts_the_maps_beside_the_projections(model, command):
    done = command("linear", "--window", 6, "--layers", "1-2", model, "-o", "out", "--no-verify")
    assert done.exit_code == 0, done.output
    before, after = (
        {name: tensor for file in folder for name, tensor in load_file(file).items()}
        for folder in (sorted(model.glob("*.safetensors")), sorted(model.parent.glob("out/*.safetensors")))
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    begun = Linear(window=6).initial_values(config("llama"), 0)
    added = {f"model.layers.{index}.self_attn.effconvert.{name}": value.bfloat16() for index in (1, 2) for name, value in begun.items()}
    assert after.keys() - before.keys() == added.keys()
    assert all(torch.equal(after[name], added[name]) for name in added)
    said = json.loads((model.parent / "out/config.json").read_text())
    options = {"feature": "hedgehog", "window": 6, "features": None}
    assert said["effconvert"]["replaced"] == [{"technique": "linear", "options": options, "place": "scores", "layers": [1, 2], "drops": []}]
