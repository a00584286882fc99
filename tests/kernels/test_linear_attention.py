"""Linear attention is the sum that it is said to be, however many tokens are taken at a time."""

import pytest
import torch

from effconvert.kernels.linear_attention import linear_attention

BATCH, GROUPS, SHARED, TOKENS, FEATURES, WIDTH = 2, 3, 2, 70, 5, 4
CHUNKS = [1, 2, 7, 64, TOKENS, 1000]
GAMMA = torch.tensor([[0.5, 0.9], [0.99, 1.0], [1e-6, 0.9999]], dtype=torch.float64)
DECAYS = pytest.mark.parametrize("decay", [None, GAMMA], ids=["lasting", "decaying"])


def attend(query, key, value, state, decay=None, chunk=64):
    fall = None if decay is None else decay.log()[None, ..., None].expand(1, -1, -1, query.shape[-2])
    return linear_attention(query, key, value, state, fall, chunk)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(decay, tokens=TOKENS, keys=1):
    """Queries, keys, values and a state: without decay one for the heads that share keys, with decay one for each."""
    query, key = random(BATCH, GROUPS, SHARED, tokens, FEATURES), random(BATCH, GROUPS, keys, tokens, FEATURES, seed=1)
    state = random(BATCH, GROUPS, keys if decay is None else SHARED, FEATURES, WIDTH, seed=3)
    return query, key, random(BATCH, GROUPS, tokens, WIDTH, seed=2), state


def explicit(query, key, value, state, decay):
    """The masked matrix of all tokens, and what an earlier state adds."""
    tokens = query.shape[-2]
    gamma = torch.ones(GROUPS, SHARED, dtype=torch.float64) if decay is None else decay
    gamma = gamma[..., None, None]
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = torch.where(age >= 0, gamma ** age.clamp_min(0), 0)
    rows = torch.arange(1, tokens + 1)[:, None]
    made = (query @ key.mT * mask) @ value[:, :, None] + (query * gamma**rows) @ state
    left = (key * gamma ** (tokens - rows)).mT @ value[:, :, None] + gamma**tokens * state
    return made, left[:, :, : state.shape[2]]


def close(ours, theirs):
    """Equal but for rounding in float64: sums of 70 terms of size 1 that logarithms of gamma went into."""
    return torch.allclose(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


@DECAYS
@pytest.mark.parametrize("keys", [1, SHARED])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_it_is_the_explicit_sum(chunk, keys, decay):
    made, state = attend(*given(decay, keys=keys), decay, chunk)
    wanted, left = explicit(*given(decay, keys=keys), decay)
    assert close(made, wanted)
    assert close(state, left)
    assert state.shape == given(decay, keys=keys)[3].shape


@DECAYS
@pytest.mark.parametrize("split", [[1] * TOKENS, [64, 6], [3, 1, 66]])
def test_split_calls_are_one_call(split, decay):
    query, key, value, state = given(decay)
    wanted, left = attend(query, key, value, state, decay)
    parts = []
    for q, k, v in zip(query.split(split, -2), key.split(split, -2), value.split(split, -2), strict=True):
        made, state = attend(q, k, v, state, decay)
        parts.append(made)
    assert close(torch.cat(parts, -2), wanted)
    assert close(state, left)


@DECAYS
def test_no_token_sees_a_later_one(decay):
    query, key, value, state = given(decay)
    wanted, _ = attend(query[..., :40, :], key[..., :40, :], value[..., :40, :], state, decay)
    key[..., 40:, :], value[..., 40:, :] = 1e9, -1e9
    assert close(attend(query, key, value, state, decay)[0][..., :40, :], wanted)


@DECAYS
def test_gradients(decay):
    inputs = [tensor.requires_grad_() for tensor in given(decay, tokens=5)]
    if decay is None:
        assert torch.autograd.gradcheck(lambda *rows: attend(*rows, chunk=2), inputs)
    else:
        gamma = GAMMA.clamp(0.3, 0.9).requires_grad_()
        assert torch.autograd.gradcheck(lambda *rows: attend(*rows, chunk=2), [*inputs, gamma])


@DECAYS
def test_a_column_of_ones_gives_the_normaliser(decay):
    """With features that are not negative, what is divided is a mean of the values."""
    query, key, value, state = given(decay)
    known = torch.nn.functional.pad(value, (0, 1), value=1.0)
    start = torch.zeros(*state.shape[:-1], WIDTH + 1, dtype=torch.float64)
    made, _ = attend(query.exp(), key.exp(), known, start, decay)
    mean = made[..., :-1] / made[..., -1:]
    least, most = (values[0] for values in (value[:, :, None].cummin(-2), value[:, :, None].cummax(-2)))
    assert ((mean >= least - 1e-9) & (mean <= most + 1e-9)).all()
