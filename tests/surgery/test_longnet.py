"""Dilated attention is one softmax over the keys of all pairs, a key as often as there are pairs that have it, in whatever parts it is computed."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effconvert.errors import OptionError
from effconvert.steps import arguments
from effconvert.surgery.mixing.longnet import Longnet
from effconvert.surgery.mixing.sparse import Sparse
from tests.surgery.rows import (
    GROUPS,
    HEADS,
    WIDTH,
    capped_scores_are_capped_first,
    close,
    config,
    cost,
    gradients_are_those_of,
    mixed,
    padding_changes_nothing,
    rows,
)

TEXT = 50
LLAMA = config("llama", num_key_value_heads=GROUPS, max_position_embeddings=64)
SHAPES = [
    {"segments": segments, "dilations": dilations, "sinks": sinks}
    for segments, dilations, sinks in (
        ((1,), (1,), 0),
        ((4, 12, 24), (1, 2, 4), 2),
        ((3, 100), (1, 5), 0),  # more remainders than heads: nobody has the fifth
        ((7, 21), (1, 7), 9),
        ((6, 6), (1, 3), 4),
    )
]


def named(options):
    return "-".join("+".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in options.values())


def counts(count, segments, dilations, sinks, causal=True):
    """How often a token sees another in each head, by the paper: a head has each r-th token of a segment, [H, T, T]."""
    found = torch.zeros(HEADS, count, count)
    for width, dilation in zip(segments, dilations, strict=True):
        for head in range(HEADS):
            for begin in range(0, count, width):
                own = torch.arange(begin, min(begin + width, count))[head % dilation :: dilation]
                found[head, own[:, None], own] += 1
    found = torch.where((found == 0) & (torch.arange(count) < sinks), 1, found)
    return found.tril() if causal else found


def reference(options, query, key, value, causal=True, softcap=None):
    """Attention in float64 over the multiset: the logarithm of how often a key is there is added to its score."""
    query, key, value = (tensor.double().repeat_interleave(HEADS // tensor.shape[1], 1) for tensor in (query, key, value))
    scores = query @ key.mT * WIDTH**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    return (scores + counts(query.shape[2], **options, causal=causal).double().log()).softmax(-1) @ value


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_mixing_is_one_softmax_over_the_multiset_in_any_number_of_calls(options):
    expected = reference(options, *rows(TEXT))
    for split in (None, [7, 1, 20, 22], [1] * TEXT):
        assert close(mixed(Longnet(**options), *rows(TEXT), split=split), expected), split


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_encoders_see_both_sides_of_a_segment(options):
    assert close(mixed(Longnet(**options), *rows(TEXT), causal=False), reference(options, *rows(TEXT), causal=False))


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_padding_changes_nothing_and_takes_no_place_in_a_segment(options):
    padding_changes_nothing(Longnet(**options), partial(reference, options), TEXT)


@pytest.mark.parametrize("segments", [(TEXT,), (1000,), (64, 64)])  # a pair that is there twice counts all keys twice
def test_segments_as_long_as_the_text_are_softmax(segments):
    dilations = (1,) * len(segments)
    for causal in (True, False):
        expected = scaled_dot_product_attention(*rows(TEXT), is_causal=causal, enable_gqa=True)
        assert close(mixed(Longnet(segments=segments, dilations=dilations), *rows(TEXT), causal=causal), expected, 2e-6)
    assert Longnet(segments=segments, dilations=dilations).is_exact(LLAMA) == (min(segments) >= 64)
    assert not Longnet(segments=segments, dilations=dilations).is_exact(config("llama"))  # of a model that says no longest text


def test_other_segments_are_not():
    for segments, dilations in (((25,), (1,)), ((4, 64), (1, 1)), ((1, 64), (1, 2))):
        technique = Longnet(segments=segments, dilations=dilations)
        assert not technique.is_exact(LLAMA)
        assert not close(mixed(technique, *rows(TEXT)), scaled_dot_product_attention(*rows(TEXT), is_causal=True, enable_gqa=True), 1e-2)


def test_heads_have_all_tokens_between_them():
    found = counts(TEXT, (1, 48), (1, 4), 0)
    assert torch.equal(found[:, :48, :48].sum(0).diagonal(), torch.full((48,), HEADS + 1.0))
    assert (counts(TEXT, **SHAPES[1]).sum(-1) > 0).all()  # each token sees itself


@pytest.mark.parametrize("options", SHAPES[1:3], ids=named)
def test_what_comes_later_changes_nothing(options):
    query, key, value = rows(TEXT)
    for at in (1, 5, 24, 49):
        later = (torch.arange(TEXT) >= at).float()[:, None] * 1e3
        other = mixed(Longnet(**options), query + later, key - later, value + later)
        assert close(other[:, :, :at], mixed(Longnet(**options), query, key, value)[:, :, :at], 1e-6)


def test_capped_scores_are_capped_before_their_softmax():
    capped_scores_are_capped_first(Longnet(**SHAPES[1]), partial(reference, SHAPES[1]), TEXT)


def test_gradients_are_those_of_the_multiset():
    gradients_are_those_of(Longnet(**SHAPES[1]), partial(reference, SHAPES[1]), TEXT)


@pytest.mark.parametrize("causal", [True, False])
def test_time_and_memory_are_linear(causal):
    """Scores of a token, each in two products, and the numbers of the largest tensor: the sum of W / r^2, as a head has each r-th query too."""
    technique = Longnet(segments=(16, 64, 256), dilations=(1, 4, 16))
    for tokens in (256, 2048):
        count, numbers = cost(technique, tokens, causal=causal)
        assert count <= 16 + 4 + 1 + 2 * technique.sinks  # one of the two for finding the sinks
        assert numbers <= 4 * WIDTH


def test_what_is_remembered_is_what_the_longest_segment_may_still_see():
    row = 2 * GROUPS * WIDTH
    technique = Longnet(segments=(4, 24), dilations=(1, 4), sinks=3)
    assert [technique.cache_bytes(LLAMA, 2, count) for count in (0, 1000)] == [8 + 23 + 2 * row * (23 + 3)] * 2
    assert technique.cache_bytes(config("bert"), 2, 50) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dilations": 1}, "--segments is needed"),
        ({"segments": 8}, "--dilations is needed"),
        ({"segments": "8,16", "dilations": 1}, "--segments has 2 numbers and --dilations 1; give as many of both"),
        ({"segments": "8,16", "dilations": "2,4"}, "--dilations 2,4 leave tokens that see no key, not even their own"),
        ({"segments": "8,18", "dilations": "1,4"}, "--segments 18 is no multiple of its dilation, 4; give 20"),
        ({"segments": "8,x", "dilations": "1,2"}, "--segments is 'x', and it should be a whole number"),
        ({"segments": "0", "dilations": "1"}, "--segments is '0', and it should be greater"),
        ({"segments": "", "dilations": ""}, "--segments is "),
        ({"segments": 8, "dilations": 1, "sinks": -1}, "--sinks is -1"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(OptionError, match=said):
        Longnet(**options)


def test_it_is_told_as_it_is_typed():
    technique = Longnet(segments="64,512", dilations="1,4")
    assert technique.label == "longnet-64x1-512x4"
    assert " ".join(arguments("longnet", technique.recipe["longnet"])) == "--segments 64,512 --dilations 1,4 --sinks 4"
    assert Longnet.allowed_options(LLAMA) == "--segments W,... --dilations R,..."
    assert Sparse.allowed_options(LLAMA) == "--pattern strided or fixed or log --block L"


def test_layers_with_a_window_are_left_alone():
    alternating = config("gemma2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    assert Longnet(segments=8, dilations=1).chosen(alternating) == {1, 3}
