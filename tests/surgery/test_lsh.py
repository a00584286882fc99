"""Attention within buckets is one softmax over the tokens of these buckets' chunks, however it is computed, at a cost that is not quadratic."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effconvert.errors import OptionError
from effconvert.surgery.mixing.lsh import Lsh, balance
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
    random,
    rows,
)

TEXT = 50
SPLITS = [None, [7, 1, 20, 22], [4] * 12 + [2], [1] * TEXT]
LLAMA = config("llama", num_key_value_heads=GROUPS, max_position_embeddings=64)
SHAPES = [
    {"buckets": buckets, "rounds": rounds, "chunk": chunk, "sinks": sinks} for buckets, rounds, chunk, sinks in ((4, 2, 5, 0), (4, 3, 3, 2), (64, 2, 1, 9))
]


def named(options):
    return "-".join(map(str, options.values()))


def buckets(technique, rows, kind):
    """The bucket of rows [B, G, n, D] in each round, by the definition: the nearest of the directions, in float64."""
    drawn = technique.initial_values(LLAMA, 0)[f"{kind}_directions"].double()  # [G, J, D, N / 2]
    every = torch.cat([drawn, -drawn], -1)
    return torch.stack([(rows.double() @ every[:, round_]).argmax(-1) for round_ in range(technique.rounds)])  # [J, B, G, n]


def seen(technique, query, key, causal=True):
    """Which keys a query sees, token by token, [B, G, n, T]; queries are those of one head of each group."""
    count = key.shape[2]
    found = torch.zeros(*query.shape[:3], count, dtype=torch.bool)
    found[..., : technique.sinks] = True
    one, other = (torch.cat([torch.zeros_like(each[:1]), each]) for each in (buckets(technique, query, "query"), buckets(technique, key, "key")))
    for text, group, at in ((text, group, at) for text in range(len(key)) for group in range(GROUPS) for at in range(count)):
        for asked, have in zip(one[:, text, group, at], other[:, text, group], strict=True):
            members = (have == asked).nonzero()[:, 0]
            own = max(int((members <= at).sum()) - 1, 0) // technique.chunk
            near = members[max(own - 1, 0) * technique.chunk : (own + (1 if causal else 2)) * technique.chunk]
            found[text, group, at, near] = True
    return found & torch.ones(count, count, dtype=torch.bool).tril() if causal else found


def reference(options, query, key, value, causal=True, softcap=None):
    """Attention in float64 by its explicit matrix."""
    technique, by_group = Lsh(**options), query.unflatten(1, (GROUPS, -1))
    visible = torch.stack([seen(technique, by_group[:, :, head], key, causal) for head in range(by_group.shape[2])], 2).flatten(1, 2)
    query, key, value = (tensor.double().repeat_interleave(HEADS // tensor.shape[1], 1) for tensor in (query, key, value))
    scores = query @ key.mT * WIDTH**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


@pytest.fixture(scope="module")
def expected():
    """What each shape gives a decoder, computed once."""
    return {named(options): reference(options, *rows(TEXT)) for options in SHAPES}


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_mixing_is_one_softmax_over_the_buckets_in_any_number_of_calls(options, expected):
    for split in SPLITS:
        assert close(mixed(Lsh(**options), *rows(TEXT), split=split), expected[named(options)]), split


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_encoders_see_both_neighbours_of_a_chunk(options):
    assert close(mixed(Lsh(**options), *rows(TEXT), causal=False), reference(options, *rows(TEXT), causal=False))


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_padding_changes_nothing_and_takes_no_place_in_a_chunk(options):
    padding_changes_nothing(Lsh(**options), partial(reference, options), TEXT)


def test_a_chunk_as_long_as_the_text_is_softmax():
    for causal in (True, False):
        expected = scaled_dot_product_attention(*rows(TEXT), is_causal=causal, enable_gqa=True)
        for chunk in (TEXT, 1000):
            assert close(mixed(Lsh(buckets=4, chunk=chunk), *rows(TEXT), causal=causal), expected, 2e-6)
        assert not close(mixed(Lsh(buckets=64, rounds=1, chunk=8), *rows(TEXT), causal=causal), expected, 1e-2)
    assert Lsh(buckets=2, chunk=64).is_exact(LLAMA)
    assert not Lsh(buckets=2, chunk=63).is_exact(LLAMA)
    assert not Lsh(buckets=2, chunk=1000).is_exact(config("llama"))  # of a model that says no longest text


def test_rounds_find_more_of_softmax():
    query, key, value = rows(400)
    exact = scaled_dot_product_attention(5 * query, key, value, is_causal=True, enable_gqa=True)
    errors = [float((mixed(Lsh(buckets=16, rounds=rounds, chunk=8), 5 * query, key, value) - exact).norm()) for rounds in (1, 4, 16)]
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2]


def test_other_seeds_and_layers_have_other_buckets():
    first, again, other, layer = (Lsh(buckets=8, seed=seed).initial_values(LLAMA, index) for seed, index in ((0, 0), (0, 0), (1, 0), (0, 1)))
    assert torch.equal(first["key_directions"], again["key_directions"])
    assert not any(close(first["key_directions"], each["key_directions"]) for each in (other, layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_directions_are_the_same_in_every_type(dtype):
    for value in Lsh(buckets=64, rounds=8).initial_values(LLAMA, 3).values():
        assert torch.equal(value.to(dtype).float(), value)


def test_what_comes_later_changes_nothing():
    query, key, value = rows(TEXT)
    technique = Lsh(**SHAPES[1])
    for at in (1, 5, 21, 49):
        later = (torch.arange(TEXT) >= at).float()[:, None] * 1e3
        assert close(mixed(technique, query + later, key - later, value + later)[:, :, :at], mixed(technique, query, key, value)[:, :, :at], 1e-6)


def test_capped_scores_are_capped_before_their_softmax():
    capped_scores_are_capped_first(Lsh(**SHAPES[1]), partial(reference, SHAPES[1]), TEXT)


def test_gradients_are_those_of_the_explicit_matrix():
    gradients_are_those_of(Lsh(**SHAPES[1]), partial(reference, SHAPES[1]), TEXT)


@pytest.mark.parametrize("causal", [True, False])
def test_neither_time_nor_memory_is_quadratic(causal):
    """Scores of a token, each in two products, and the numbers of the largest tensor, however the tokens are spread over the buckets."""
    technique, found = Lsh(buckets=8, rounds=2, chunk=8), []
    for tokens in (256, 2304):
        text = rows(tokens, 1)
        found += [cost(technique, tokens, each, causal=causal) for each in (text, [row[:, :, :1].expand_as(row) for row in text])]
    own = 3 * 8 * (2 if causal else 3)  # keys of a chunk and its neighbours, in three rounds
    for count, numbers in found:
        assert count <= 2 * own
        assert numbers <= own


def test_the_cache_keeps_all_tokens_and_their_buckets():
    row = GROUPS * (2 * WIDTH * 2 + 8 * 3)
    technique = Lsh(buckets=8, rounds=3)
    assert [technique.cache_bytes(LLAMA, 2, count) for count in (0, 1, 50)] == [8, 8 + row, 8 + 50 * row]
    assert technique.token_bytes(LLAMA, 2) == row
    assert "the KV cache keeps all tokens" in technique.notes(LLAMA)
    assert technique.notes(config("bert")) == ""
    assert technique.cache_bytes(config("bert"), 2, 50) == 0


def test_balance_gives_both_the_same_second_moments_and_keeps_products():
    keys, queries = (random(3, 40, WIDTH, seed=seed, dtype=torch.float64) * torch.linspace(seed + 1, 4, WIDTH) for seed in (0, 1))
    stretch, shrink = balance(keys.mT @ keys, queries.mT @ queries)
    one, other = keys @ stretch, queries @ shrink
    assert close(one.mT @ one, other.mT @ other, 1e-8)
    assert close(other @ one.mT, queries @ keys.mT, 1e-8)


class _Activations:
    """What a layer computed: queries and keys of some texts."""

    def __init__(self, query, key):
        self.query, self.key = query, key

    def capture(self, *_, **__):
        yield from (SimpleNamespace(query=query[None], key=key[None]) for query, key in zip(self.query, self.key, strict=True))


def test_what_all_keys_have_in_common_changes_no_bucket_and_sinks_do_not_count():
    query, key, _ = rows(TEXT)
    technique = Lsh(buckets=8, rounds=2, sinks=3)
    initial, found = technique.initial_values(LLAMA, 0), []
    for shift, sink in ((0, 0), (5, 0), (5, 100)):
        moved = key + shift
        moved[:, :, :3] += sink
        fitted = technique.fit(SimpleNamespace(activations=_Activations(query, moved)), initial)
        assert {name: value.shape for name, value in fitted.items()} == {name: value.shape for name, value in initial.items()}
        found.append(buckets_of(technique, fitted, query, moved[:, :, 3:]))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    assert not torch.equal(buckets_of(technique, initial, query, key[:, :, 3:] + 5), found[0])


def buckets_of(technique, weights, query, key):
    """The buckets of queries and keys in one tensor."""
    query = query.unflatten(1, (GROUPS, -1)).flatten(2, 3)
    return torch.cat([technique._hash(weights, query, "query"), technique._hash(weights, key, "key")], -1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--buckets is needed"),
        ({"buckets": 1}, "--buckets is 1"),
        ({"buckets": 7}, "--buckets 7 is odd, and buckets come in pairs of opposite directions; give 8"),
        ({"buckets": 8, "rounds": 0}, "--rounds is 0"),
        ({"buckets": 8, "chunk": 0}, "--chunk is 0"),
        ({"buckets": 8, "sinks": -1}, "--sinks is -1"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(OptionError, match=said):
        Lsh(**options)


def test_layers_with_a_window_are_left_alone():
    alternating = config("gemma2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    assert Lsh(buckets=8).chosen(alternating) == {1, 3}
