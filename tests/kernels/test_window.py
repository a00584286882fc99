"""Attention in bands is dense attention with a mask, for any window, any number of tokens, and padding anywhere."""

import pytest
import torch

from effconvert.kernels.window import window_scores, window_values

BATCH, GROUPS, SHARED, WIDTH = 2, 2, 3, 4
WINDOWS = [1, 2, 17, 63, 64, 65, 133, 300, 1000]  # narrower and wider than a chunk, and than all tokens
TOKENS = [1, 5, 64, 65, 182, 260]  # a multiple of the chunk, and not


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(tokens, before):
    """Queries, keys, values, and which keys are alive: some in the middle are not, nor the first ones of one text."""
    query, known = random(BATCH, GROUPS, SHARED, tokens, WIDTH), before + tokens
    live = torch.rand(BATCH, known, generator=torch.Generator().manual_seed(9)) > 0.2
    live[0, : known // 3] = False
    live[:, -tokens:][:, ::2] = True
    return query, random(BATCH, GROUPS, known, WIDTH, seed=1), random(BATCH, GROUPS, known, WIDTH, seed=2), live


def banded(query, key, value, live, window):
    scores, counted = window_scores(query, key, live, window)
    weights = scores.masked_fill(~counted, -1e30).softmax(-1) * counted
    return window_values(weights, value)


def dense(query, key, value, live, window):
    tokens, known = query.shape[-2], key.shape[-2]
    distance = known - tokens + torch.arange(tokens)[:, None] - torch.arange(known)
    seen = ((distance >= 0) & (distance < window))[None] & live[:, None]
    seen = seen[:, None, None]
    weights = (query @ key[:, :, None].mT).masked_fill(~seen, -1e30).softmax(-1) * seen
    return weights @ value[:, :, None]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("window", WINDOWS)
def test_bands_are_dense_attention_with_a_mask(window, tokens):
    """As a mixer asks: with W - 1 tokens before the first query."""
    rows = given(tokens, window - 1)
    assert torch.allclose(banded(*rows, window), dense(*rows, window), rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_longer_past_than_the_window_is_not_seen(window):
    rows = given(70, window + 3)
    assert torch.allclose(banded(*rows, window), dense(*rows, window), rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", [5, 65, 1000])
def test_a_shorter_past_than_the_window(window):
    """Without a state there is nothing further back than as many tokens as came, and none of that is alive."""
    *rows, live = given(100, min(window - 1, 100))
    live[:, :-100] = False
    rows.append(live)
    assert torch.allclose(banded(*rows, window), dense(*rows, window), rtol=0, atol=1e-13)


def test_each_query_counts_its_window():
    query, key, _, live = given(150, 9)
    _, counted = window_scores(query, key, torch.ones_like(live), 10)
    assert (counted.sum(-1) == 10).all()


def test_what_is_dead_does_not_count():
    query, key, value, live = given(100, 9)
    wild = torch.where(live[:, None, :, None], value, 1e6)
    assert torch.equal(banded(query, key, wild, live, 10), banded(query, key, value, live, 10))


def test_a_query_that_sees_nothing_mixes_nothing():
    query, key, value, live = given(100, 9)
    assert not banded(query, key, value, torch.zeros_like(live), 10).any()


@pytest.mark.parametrize("window", [7, 73])
def test_gradients_are_those_of_dense_attention(window):
    found = []
    for form in (banded, dense):
        *rows, live = given(100, window - 1)
        rows = [tensor.requires_grad_() for tensor in rows]
        form(*rows, live, window).square().sum().backward()
        found.append([tensor.grad for tensor in rows])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
