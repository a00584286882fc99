"""Keys and values are mixed as the matrices say, whatever is padding; where nothing is mixed, attention is softmax; and F is fitted to attention."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effconvert.errors import ModelError, OptionError
from effconvert.heal._capture import Capture
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing.linformer import Linformer, columns, masked_attention
from tests.surgery.rows import GROUPS, HEADS, WIDTH, random
from tests.surgery.rows import config as shape
from tests.surgery.rows import rows as any_rows

LONGEST, RANK = 24, 6
SHARES = ["none", "headwise", "key-value"]
EXACT = 1e-6  # of float32 values of size 1


config = partial(shape, max_position_embeddings=LONGEST)
GROUPED = config(num_key_value_heads=GROUPS)


def rows(tokens=LONGEST, texts=2):
    return any_rows(tokens, texts)


def mixed(weights, query, key, value, live=None):
    """What the mixer gives; its parameters alone decide."""
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    return Linformer(rank=1).mix(weights, Call(query, key, value, WIDTH**-0.5, live, False, None, query, None))


def trained(share="none", rank=RANK):
    """Matrices as training might leave them: no row looks at one segment only."""
    begun = Linformer(rank=rank, share=share).initial_values(GROUPED, 0)
    return {name: values + 0.1 * random(*values.shape, seed=seed) for seed, (name, values) in enumerate(begun.items())}


def softmax(query, key, value, live=None):
    return scaled_dot_product_attention(query, key, value, None if live is None else live[:, None, None], enable_gqa=True)


def reference(weights, query, key, value):
    """The paper's equation 7 in float64 for texts of the greatest length, head by head."""
    made = []
    for head in range(HEADS):
        shared = head // (HEADS // GROUPS)
        e, f = (weights.get(name, weights["key_map"]).double() for name in ("key_map", "value_map"))
        e, f = (matrix[shared] if len(matrix) > 1 else matrix[0] for matrix in (e, f))
        scores = query[:, head].double() @ (e @ key[:, shared].double()).mT / WIDTH**0.5
        made.append(scores.softmax(-1) @ (f @ value[:, shared].double()))
    return torch.stack(made, 1)


@pytest.mark.parametrize("share", SHARES)
def test_mixing_is_the_papers(share):
    weights = trained(share)
    assert torch.allclose(mixed(weights, *rows()), reference(weights, *rows()).float(), atol=EXACT)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("tokens", [1, 7, LONGEST])
def test_as_many_mixtures_as_tokens_are_softmax(share, tokens):
    technique = Linformer(rank=LONGEST, share=share)
    assert technique.is_exact(GROUPED)
    assert torch.allclose(mixed(technique.initial_values(GROUPED, 0), *rows(tokens)), softmax(*rows(tokens)), atol=EXACT)


def test_fewer_mixtures_are_not():
    technique = Linformer(rank=LONGEST - 1)
    assert not technique.is_exact(GROUPED)
    assert (mixed(technique.initial_values(GROUPED, 0), *rows()) - softmax(*rows())).abs().max() > 1e-2


def test_the_order_of_mixtures_does_not_matter():
    order = torch.randperm(LONGEST, generator=torch.Generator().manual_seed(0))
    weights = {name: values[:, order] for name, values in Linformer(rank=LONGEST).initial_values(GROUPED, 0).items()}
    assert torch.allclose(mixed(weights, *rows()), softmax(*rows()), atol=EXACT)
    one = {**weights, "value_map": Linformer(rank=LONGEST).initial_values(GROUPED, 0)["value_map"]}  # only that of the keys
    assert (mixed(one, *rows()) - softmax(*rows())).abs().max() > 1e-1


@pytest.mark.parametrize("rank", [1, 5, 6, LONGEST])
def test_means_are_of_consecutive_tokens_each_counted_once(rank):
    matrix = Linformer(rank=rank).initial_values(config(), 0)["key_map"][0]
    assert torch.allclose(matrix.sum(-1), torch.ones(rank))
    assert torch.equal((matrix > 0).sum(0), torch.ones(LONGEST).long())
    sizes = (matrix > 0).sum(-1)
    assert sizes.max() - sizes.min() <= 1
    first = (matrix > 0).int().argmax(-1)
    assert torch.equal(first, sizes.cumsum(0) - sizes)


def test_what_begins_is_the_same_each_time_and_has_the_shapes():
    for share, units, names in (("none", GROUPS, 2), ("headwise", 1, 2), ("key-value", 1, 1)):
        technique = Linformer(rank=RANK, share=share)
        first, again = technique.initial_values(GROUPED, 0), technique.initial_values(GROUPED, 3)
        assert {name: tuple(value.shape) for name, value in first.items()} == technique.parameters(GROUPED)
        assert set(technique.parameters(GROUPED).values()) == {(units, RANK, LONGEST)}
        assert len(first) == names
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("tokens", [1, 5, 10, LONGEST])
def test_shorter_texts_have_fewer_mixtures(tokens):
    """Of each segment the mean of the tokens that are there: segments without any are not seen."""
    query, key, value = rows(tokens)
    each = LONGEST // RANK
    parts = [torch.stack([part.mean(2) for part in tensor.split(each, 2)], 2) for tensor in (key, value)]
    assert torch.allclose(mixed(Linformer(rank=RANK).initial_values(GROUPED, 0), query, key, value), softmax(query, *parts), atol=EXACT)


@pytest.mark.parametrize("rank", [1, 3, 5, LONGEST])
@pytest.mark.parametrize("tokens", [1, 7, 10, LONGEST])
def test_a_row_is_there_where_its_segment_is_and_counts_for_the_tokens_it_lacks(rank, tokens):
    matrix, means = random(1, rank, LONGEST), Linformer(rank=rank).initial_values(config(), 0)["key_map"][0]
    made, alive = columns(matrix, torch.ones(1, tokens, dtype=torch.bool))
    whole, here = (means > 0).sum(-1), (means[:, :tokens] > 0).sum(-1)
    assert torch.equal(alive[0, 0], here > 0)
    expected = matrix[0, :, :tokens] * (whole / here.clamp_min(1))[:, None] * (here > 0)[:, None]
    assert torch.allclose(made[0, 0], expected)


@pytest.mark.parametrize("share", SHARES)
def test_padding_changes_nothing_on_either_side_and_whatever_it_holds(share):
    weights, kept = trained(share), 13
    query, key, value = rows(kept)
    expected = mixed(weights, query, key, value)
    for left, right in ((0, 9), (9, 0), (4, 5)):
        live = torch.nn.functional.pad(torch.ones(2, kept, dtype=torch.bool), (left, right))
        for held in (0.0, 1e4):
            padded = [torch.nn.functional.pad(tensor, (0, 0, left, right), value=held) for tensor in (query, key, value)]
            out = mixed(weights, *padded, live)
            assert torch.allclose(out[:, :, live[0]], expected, atol=EXACT)
            assert out.isfinite().all()


@pytest.mark.parametrize("share", SHARES)
def test_a_batch_gives_what_its_texts_give_alone(share):
    """Of different lengths, one of them nothing but padding."""
    weights = trained(share)
    live = torch.arange(LONGEST) < torch.tensor([LONGEST, 11, 1, 0])[:, None]
    query, key, value = rows(texts=4)
    together = mixed(weights, query, key, value, live)
    assert together.isfinite().all()
    assert not together[3].any()
    for text in range(3):
        alone = [tensor[text : text + 1, :, live[text]] for tensor in (query, key, value)]
        assert torch.allclose(together[text : text + 1, :, live[text]].squeeze(1), mixed(weights, *alone).squeeze(1), atol=EXACT)


def test_a_text_that_is_too_long_is_refused():
    weights = trained()
    with pytest.raises(ValueError, match=f"a text has 25 tokens, and linformer's matrices are for {LONGEST} at most; cut it"):
        mixed(weights, *rows(25))
    live = torch.arange(30) >= 30 - LONGEST  # padded, it is no longer than the longest
    assert torch.allclose(mixed(weights, *rows(30), live.expand(2, -1))[:, :, live], mixed(weights, *[tensor[:, :, live] for tensor in rows(30)]), atol=EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_means_are_nearer_to_softmax_than_random_matrices(seed):
    query, key, value = (random(2, HEADS, LONGEST, WIDTH, seed=10 * seed + place) for place in range(3))
    drawn = {name: random(1, RANK, LONGEST, seed=100 + place) / RANK**0.5 for place, name in enumerate(("key_map", "value_map"))}
    wrong = [(mixed(weights, query, key, value) - softmax(query, key, value)).norm() for weights in (Linformer(rank=RANK).initial_values(config(), 0), drawn)]
    assert wrong[0] < wrong[1]


def test_bfloat16_is_finite_and_near():
    weights = {name: values.bfloat16() for name, values in trained().items()}
    query, key, value = (tensor.bfloat16() for tensor in rows())
    out = mixed(weights, query, key, value)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    exact = reference({name: values.float() for name, values in weights.items()}, query, key, value)
    assert (out.double() - exact).abs().max() < 4 * 2**-8 * value.abs().max()  # keys, values, weights and the sum are each rounded to 8 bits


def test_gradients_reach_both_matrices_and_are_finite_where_rows_see_nothing():
    weights = {name: values.requires_grad_() for name, values in Linformer(rank=RANK).initial_values(GROUPED, 0).items()}
    live = torch.arange(LONGEST) < torch.tensor([10, 0])[:, None]
    mixed(weights, *rows(), live).square().sum().backward()
    for values in weights.values():
        assert values.grad.isfinite().all()
        assert values.grad.abs().sum() > 0


def test_where_no_key_is_alive_all_are_seen():
    query, key, value = random(1, 1, 1, 2, WIDTH), random(1, 1, 3, WIDTH, seed=1), random(1, 1, 3, WIDTH, seed=2)
    out = masked_attention(query, key, value, torch.zeros(1, 1, 3, dtype=torch.bool), 1.0)
    assert torch.allclose(out, softmax(query[:, 0] * WIDTH**0.5, key, value), atol=EXACT)


# Fitting F


def looks(planted, tokens=LONGEST, scaling=WIDTH**-0.5):
    """What is seen of a layer whose attention is exactly that to the mixtures of the means, times matrices [Hk or 1, K, T] that are to be found."""
    means = Linformer(rank=RANK).initial_values(GROUPED, 0)["key_map"]
    made, alive = columns(means, torch.ones(2, tokens, dtype=torch.bool))
    for at in range(8):
        query, key = (3 * random(2, heads, tokens, WIDTH, seed=2 * at + place) for place, heads in enumerate((HEADS, GROUPS)))
        scores = query.unflatten(1, (GROUPS, -1)) @ (made @ key)[:, :, None].mT * scaling
        few = scores.masked_fill(~alive[:, :, None, None], -torch.inf).softmax(-1)  # [B, Hk, R, T, K]
        yield Capture(torch.zeros(2, tokens, 1), query=query, key=key, scaling=scaling, weights=(few @ planted[:, None]).flatten(1, 2))


def fitted(technique, planted, tokens=LONGEST, **given):
    activations = SimpleNamespace(capture=lambda *_, **__: looks(planted, tokens, **given), ids=[torch.zeros(2, tokens)])
    return technique.fit(SimpleNamespace(config=GROUPED, index=0, activations=activations), technique.initial_values(GROUPED, 0))


@pytest.mark.parametrize(("share", "units"), [("none", GROUPS), ("headwise", 1)])
def test_the_matrix_that_gives_the_attention_is_found(share, units):
    technique = Linformer(rank=RANK, share=share, projections="data")
    assert technique.needs_calibration(GROUPED)
    planted, begun = random(units, RANK, LONGEST).softmax(-1), technique.initial_values(GROUPED, 0)
    found = fitted(technique, planted)
    assert torch.equal(found["key_map"], begun["key_map"])
    # What is left is the bias of the weakest ridge, 1e-5 of the mean of the Gram matrix's diagonal, in its weakest direction.
    assert (found["value_map"] - planted).norm() < 1e-3 * (begun["value_map"] - planted).norm()


def test_scores_are_scaled_as_the_layer_scales_them():
    technique, planted = Linformer(rank=RANK), random(1, RANK, LONGEST).softmax(-1)
    begun = technique.initial_values(GROUPED, 0)["value_map"]
    assert (fitted(technique, planted, scaling=0.1)["value_map"] - planted).norm() < 1e-3 * (begun - planted).norm()


def test_one_matrix_for_all_heads_is_the_ridge_regression_on_all_of_them():
    """In float64, of attention that no single matrix gives; with all windows the same, those held out want the weakest ridge, of 1e-5."""
    planted = random(GROUPS, RANK, LONGEST).softmax(-1)
    look = next(looks(planted))
    look = Capture(look.state[:1], query=look.query[:1], key=look.key[:1], scaling=look.scaling, weights=look.weights[:1])
    layer = SimpleNamespace(config=GROUPED, index=0, activations=SimpleNamespace(capture=lambda *_, **__: iter([look] * 8), ids=[torch.zeros(1, LONGEST)]))
    technique = Linformer(rank=RANK, projections="data")
    found = technique.fit(layer, technique.initial_values(GROUPED, 0))["value_map"][0]
    means = technique.initial_values(GROUPED, 0)["key_map"][0].double()
    few = (look.query.unflatten(1, (GROUPS, -1)).double() @ (means @ look.key.double())[:, :, None].mT * WIDTH**-0.5).softmax(-1).reshape(-1, RANK)
    gram = few.T @ few
    damped = gram + 1e-5 * gram.diagonal().mean() * torch.eye(RANK)
    expected = means + torch.linalg.solve(damped, few.T @ (look.weights[0].flatten(0, 1).double() - few @ means))
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert (planted - expected).abs().amax((1, 2)).min() > 1e-2


def test_where_means_give_the_attention_they_stay():
    technique = Linformer(rank=RANK, projections="data")
    means = technique.initial_values(GROUPED, 0)["value_map"]
    assert torch.allclose(fitted(technique, means)["value_map"], means, atol=EXACT)


def test_long_and_short_texts_are_fitted_together():
    """Each column to the texts that have a token there; a short text sees the first mixtures alone."""
    technique, planted = Linformer(rank=RANK, projections="data"), random(1, RANK, LONGEST).softmax(-1)
    short = planted.clone()[..., :8]
    both = [look for pair in zip(looks(planted), looks(short, 8), strict=True) for look in pair]
    activations = SimpleNamespace(capture=lambda *_, **__: iter(both), ids=[torch.zeros(2, LONGEST), torch.zeros(2, 8)])
    begun = technique.initial_values(GROUPED, 0)
    found = technique.fit(SimpleNamespace(config=GROUPED, index=0, activations=activations), begun)["value_map"]
    assert (found - planted).norm() < 1e-3 * (begun["value_map"] - planted).norm()
    wrong = [look for pair in zip(looks(planted), looks(planted[..., 8:16], 8), strict=True) for look in pair]  # of other matrices on short texts
    activations = SimpleNamespace(capture=lambda *_, **__: iter(wrong), ids=[torch.zeros(2, LONGEST), torch.zeros(2, 8)])
    other = technique.fit(SimpleNamespace(config=GROUPED, index=0, activations=activations), begun)["value_map"]
    assert torch.equal(other[..., 8:], found[..., 8:])
    assert not torch.allclose(other[..., :8], found[..., :8], atol=1e-2)


@pytest.mark.parametrize("tokens", [5, 9, 10, 11])
def test_a_text_that_ends_within_a_segment_is_fitted_as_it_will_be_mixed(tokens):
    """There the row is multiplied by how many tokens it lacks, on calibration and later."""
    technique, planted = Linformer(rank=RANK), random(1, RANK, LONGEST).softmax(-1)
    short = columns(planted, torch.ones(1, tokens, dtype=torch.bool))[0][0]
    both = [look for pair in zip(looks(planted), looks(short, tokens), strict=True) for look in pair]
    activations = SimpleNamespace(capture=lambda *_, **__: iter(both), ids=[torch.zeros(2, LONGEST), torch.zeros(2, tokens)])
    begun = technique.initial_values(GROUPED, 0)
    found = technique.fit(SimpleNamespace(config=GROUPED, index=0, activations=activations), begun)["value_map"]
    assert (found - planted).norm() < 1e-3 * (begun["value_map"] - planted).norm()


def test_too_few_texts_to_hold_one_out_leave_the_means():
    planted = random(1, RANK, LONGEST).softmax(-1)
    look = next(looks(planted))
    one = Capture(look.state[:1], query=look.query[:1], key=look.key[:1], scaling=look.scaling, weights=look.weights[:1])
    activations = SimpleNamespace(capture=lambda *_, **__: iter([one]), ids=[torch.zeros(1, LONGEST)])
    technique = Linformer(rank=RANK)
    begun = technique.initial_values(GROUPED, 0)
    assert torch.equal(technique.fit(SimpleNamespace(config=GROUPED, index=0, activations=activations), begun)["value_map"], begun["value_map"])


def test_what_windows_are_too_short_for_stays_means():
    technique = Linformer(rank=RANK, projections="data")
    planted, means = random(1, RANK, 8).softmax(-1), technique.initial_values(GROUPED, 0)["value_map"]
    found = fitted(technique, planted, 8)["value_map"]  # two of the six segments
    assert (found[:, :2, :8] - planted[:, :2]).norm() < 1e-3 * (means[:, :2, :8] - planted[:, :2]).norm()
    assert torch.equal(found[:, 2:], means[:, 2:])
    assert torch.equal(found[..., 8:], means[..., 8:])


def test_nothing_is_looked_at_where_nothing_is_fitted():
    assert Linformer(rank=RANK).needs_calibration(GROUPED)
    assert not Linformer(rank=RANK, projections="means").needs_calibration(GROUPED)
    assert not Linformer(rank=RANK, share="key-value").needs_calibration(GROUPED)  # its one matrix is that of the keys too
    assert not Linformer(rank=LONGEST, projections="data").needs_calibration(GROUPED)
    assert Linformer(rank=LONGEST, projections="data").is_exact(GROUPED)


# Refusals


def test_options_that_cannot_be():
    with pytest.raises(OptionError, match="--rank is 0, and it should be greater than or equal to 1"):
        Linformer(rank=0)
    with pytest.raises(OptionError, match="--rank is needed"):
        Linformer()
    with pytest.raises(OptionError, match=f"--rank 25 is more than the {LONGEST} tokens .* give at most {LONGEST}, which is exact"):
        Linformer(rank=25).check(config())
    Linformer(rank=LONGEST).check(config())


def test_a_model_without_a_greatest_length_is_refused():
    with pytest.raises(ModelError, match=r"does not say how long a text may be \(max_position_embeddings\)"):
        Linformer(rank=4).check(config(max_position_embeddings=None))


def test_decoders_are_refused_with_what_fits_them():
    with pytest.raises(ModelError, match=r"^llama is a decoder, and linformer mixes a text's keys over all .* linformer-causal mixes .* retnet are for"):
        Linformer(rank=4).check(config("llama"))


@pytest.mark.parametrize(
    ("keys", "local"),
    [
        ({"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"], "local_attention": 8}, {1, 2}),
        ({"global_attn_every_n_layers": 2, "local_attention": 8}, {1, 3}),
        ({"local_attention": 8}, {1, 2}),
        ({}, {1, 2}),  # as transformers reads a config that does not say
        ({"local_attention": None}, set()),
    ],
)
def test_layers_with_a_window_are_left_alone(keys, local):
    own = config("modernbert", **keys)
    assert {index for index, window in enumerate(own.windows()) if window} == local
    assert Linformer(rank=4).chosen(own) == set(range(4)) - local
    if local:
        with pytest.raises(OptionError, match="no layer is left to change"):
            Linformer(rank=4, layers="1").check(config("modernbert", **{**keys, "layer_types": ["sliding_attention"] * 4}))


def test_rotated_keys_are_remarked_on():
    assert "after RoPE" in Linformer(rank=4).notes(config("modernbert"))
    assert Linformer(rank=4).notes(config()) == ""
