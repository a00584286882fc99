"""Sparse attention is one softmax over the keys of its pattern, in whatever parts it is computed, at a cost that is not quadratic."""

from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effconvert.errors import OptionError
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
SPLITS = [None, [7, 1, 20, 22], [1] * TEXT]
LLAMA = config("llama", num_key_value_heads=GROUPS, max_position_embeddings=64)
SHAPES = [
    {"pattern": pattern, "block": block, "sinks": sinks, **more}
    for pattern, more in (("strided", {}), ("fixed", {"summaries": 1}), ("fixed", {}), ("log", {}))
    for block, sinks in ((1, 0), (5, 9), (20, 4))
]


def named(options):
    return "-".join(map(str, options.values()))


def seen(count, pattern, block, sinks, summaries=None, causal=True):
    """Which tokens a token sees, by the definition, [T, T]."""
    query, key = torch.arange(count)[:, None], torch.arange(count)
    of, at = query // block, key // block
    found = {
        "strided": ((query - key).abs() < block) | ((query - key) % block == 0),
        "fixed": (of == at) | (key % block >= block - min(summaries or 8, block)),
        "log": torch.isin((of - at).abs(), torch.tensor([0, *(2**power for power in range(10))])),
    }[pattern] | (key < sinks)
    return found & (key <= query) if causal else found


def reference(options, query, key, value, causal=True, softcap=None):
    """Attention in float64 by its explicit matrix."""
    query, key, value = (tensor.double().repeat_interleave(HEADS // tensor.shape[1], 1) for tensor in (query, key, value))
    scores = query @ key.mT * WIDTH**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    return scores.masked_fill(~seen(query.shape[2], **options, causal=causal), -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_mixing_is_one_softmax_over_the_pattern_in_any_number_of_calls(options):
    expected = reference(options, *rows(TEXT))
    for split in SPLITS:
        assert close(mixed(Sparse(**options), *rows(TEXT), split=split), expected), split


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_encoders_see_as_much_to_the_other_side(options):
    assert close(mixed(Sparse(**options), *rows(TEXT), causal=False), reference(options, *rows(TEXT), causal=False))


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_padding_changes_nothing_and_takes_no_place_in_the_pattern(options):
    padding_changes_nothing(Sparse(**options), partial(reference, options), TEXT)


@pytest.mark.parametrize("options", [{"pattern": "strided"}, {"pattern": "fixed"}, {"pattern": "log"}], ids=named)
def test_a_block_as_long_as_the_text_is_softmax(options):
    for causal in (True, False):
        expected = scaled_dot_product_attention(*rows(TEXT), is_causal=causal, enable_gqa=True)
        assert close(mixed(Sparse(**options, block=TEXT), *rows(TEXT), causal=causal), expected, 2e-6)
        assert close(mixed(Sparse(**options, block=1000), *rows(TEXT), causal=causal), expected, 2e-6)
        assert not close(mixed(Sparse(**options, block=10), *rows(TEXT), causal=causal), expected, 1e-2)
    assert Sparse(**options, block=64).is_exact(LLAMA)
    assert not Sparse(**options, block=63).is_exact(LLAMA)
    assert not Sparse(**options, block=1000).is_exact(config("llama"))  # of a model that says no longest text


def test_patterns_that_leave_nothing_out_are_softmax():
    expected = scaled_dot_product_attention(*rows(TEXT), is_causal=True, enable_gqa=True)
    for technique in (Sparse(pattern="strided", block=1), Sparse(pattern="fixed", block=7, sinks=0), Sparse(pattern="fixed", block=12, summaries=12)):
        assert technique.is_exact(config("llama"))
        assert close(mixed(technique, *rows(TEXT)), expected, 2e-6)
    assert not Sparse(pattern="log", block=1).is_exact(LLAMA)


@pytest.mark.parametrize("options", [{"pattern": "strided"}, {"pattern": "fixed", "summaries": 1}], ids=named)
def test_two_layers_reach_every_token(options):
    once = seen(TEXT, **options, block=9, sinks=0).float()
    assert torch.equal(once @ once > 0, torch.ones(TEXT, TEXT).tril() > 0)


@pytest.mark.parametrize("options", SHAPES[1::3], ids=named)
def test_what_comes_later_changes_nothing(options):
    query, key, value = rows(TEXT)
    for at in (1, 5, 21, 49):
        later = (torch.arange(TEXT) >= at).float()[:, None] * 1e3
        other = mixed(Sparse(**options), query + later, key - later, value + later)
        assert close(other[:, :, :at], mixed(Sparse(**options), query, key, value)[:, :, :at], 1e-6)


@pytest.mark.parametrize("options", SHAPES[1::3], ids=named)
def test_capped_scores_are_capped_before_their_softmax(options):
    capped_scores_are_capped_first(Sparse(**options), partial(reference, options), TEXT)


@pytest.mark.parametrize("options", SHAPES[1::3], ids=named)
def test_gradients_are_those_of_the_explicit_matrix(options):
    gradients_are_those_of(Sparse(**options), partial(reference, options), TEXT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("pattern", "more"), [("strided", {}), ("fixed", {"summaries": 1}), ("log", {})])
def test_neither_time_nor_memory_is_quadratic(pattern, more, causal):
    """Scores of a token, each in two products, and the numbers of the largest tensor, beside those that softmax would have."""
    for tokens, block in ((256, 16), (2304, 48)):
        count, numbers = cost(Sparse(pattern=pattern, block=8 if pattern == "log" else block, **more), tokens, causal=causal)
        sides, far = 2 - causal, (tokens // 8).bit_length()
        assert count <= (8 * (2 + sides * far) if pattern == "log" else (2 + 2 * sides) * block) + 4
        assert numbers <= 2 * max(count, 2 * WIDTH)
    assert count < tokens / 10


def test_what_is_remembered():
    """All tokens; or of fixed the unfinished block, the first tokens, and the summaries of finished blocks."""
    row = 2 * GROUPS * WIDTH
    for pattern in ("strided", "log"):
        technique = Sparse(pattern=pattern, block=8)
        assert [technique.cache_bytes(LLAMA, 2, count) for count in (0, 1, 50)] == [8, 8 + 2 * row, 8 + 100 * row]
        assert technique.token_bytes(LLAMA, 2) == 2 * row
        assert f"with --pattern {pattern} the KV cache keeps all tokens" in technique.notes(LLAMA)
    technique = Sparse(pattern="fixed", block=8, summaries=2, sinks=3)
    assert [technique.cache_bytes(LLAMA, 2, count) for count in (0, 7, 8, 50)] == [8 + 7 + 2 * row * (7 + 3 + kept) for kept in (0, 0, 2, 12)]
    assert technique.token_bytes(LLAMA, 2) == 2 * row / 4
    assert technique.notes(LLAMA) == ""
    assert Sparse(pattern="log", block=8).notes(config("bert")) == ""
    assert Sparse(pattern="log", block=8).cache_bytes(config("bert"), 2, 50) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block": 8}, "--pattern is needed"),
        ({"pattern": "random", "block": 8}, "--pattern is 'random'"),
        ({"pattern": "log"}, "--block is needed"),
        ({"pattern": "log", "block": 0}, "--block is 0"),
        ({"pattern": "log", "block": 8, "sinks": -1}, "--sinks is -1"),
        ({"pattern": "strided", "block": 8, "summaries": 2}, "--summaries belongs to --pattern fixed; --pattern strided has none"),
        ({"pattern": "fixed", "block": 8, "summaries": 9}, "--summaries 9 are more than the 8 tokens of a block; give at most 8, which is exact"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(OptionError, match=said):
        Sparse(**options)


def test_layers_with_a_window_are_left_alone():
    alternating = config("gemma2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    assert Sparse(pattern="log", block=8).chosen(alternating) == {1, 3}
