"""Random features are what the paper says of them, and attention by them is what they say, however it is computed."""

import pytest
import torch

from effconvert.checkpoint.config import Config
from effconvert.families import FAMILIES
from effconvert.kernels.linear_attention import linear_attention
from effconvert.modeling.attention import Mixer
from effconvert.modeling.state import State
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing.performer import Performer, exponents, orthogonal

HEADS, GROUPS, WIDTH, FEATURES, TOKENS = 4, 2, 8, 24, 150  # more tokens than two chunks
SPLITS = [[TOKENS], [64, 86], [7, 1, 100, 42], [1] * TOKENS]


def config(width=WIDTH, kind="llama"):
    raw = {"model_type": kind, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": HEADS * width, "num_hidden_layers": 2}
    return Config(raw, FAMILIES[kind])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(width=WIDTH, tokens=TOKENS, size=1.0):
    """Queries, keys and values of two texts."""
    return [size * random(2, heads, tokens, width, seed=seed) for seed, heads in enumerate((HEADS, GROUPS))] + [random(2, GROUPS, tokens, width, seed=2)]


def mixed(technique, omega, query, key, value, live=None, causal=True, split=None, scaling=None):
    """What a mixer gives of all tokens, called once, or in parts with a state."""
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    state = State(technique.cache_slots(config(key.shape[-1]))) if split else None
    made = []
    for part in zip(*(tensor.split(split or key.shape[2], dim) for tensor, dim in ((query, 2), (key, 2), (value, 2), (live, 1))), strict=True):
        if state:
            state.update(part[1], part[2])
        scaling = scaling or key.shape[-1] ** -0.5
        made.append(technique.mix({"omega": omega}, Call(*part[:3], scaling, part[3], causal, state, part[0], None)))
    return torch.cat(made, 2)


def reference(omega, query, key, value, live=None, causal=True, scaling=None):
    """The paper's estimate of attention in float64, by the explicit matrix of log weights."""
    root = (scaling or key.shape[-1] ** -0.5) ** 0.5
    shared = query.shape[1] // key.shape[1]
    query, key, value = (tensor.double() for tensor in (query, key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)))
    q, k = (exponents(tensor * root, omega.double()) for tensor in (query, key))
    log = (q[:, :, :, None] + k[:, :, None]).logsumexp(-1)
    seen = torch.ones(log.shape[-2:], dtype=torch.bool)
    seen = (seen.tril() if causal else seen) & (True if live is None else live[:, None, None])
    return log.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def draws(count, width):
    """Independent draws of `width` features each, [count, width, width]."""
    return orthogonal(count * width, width, torch.Generator().manual_seed(0)).unflatten(0, (count, width))


def pairs(width, square):
    """Some q and k with |q|^2 = |k|^2 = `square` [pairs, width]: along an axis, along the diagonal, across, nearly opposite, the same."""
    q = torch.stack([torch.eye(width)[0], torch.ones(width), random(width), random(width, seed=1), random(width, seed=2)]).double()
    k = torch.stack(
        [torch.eye(width)[0], torch.ones(width), random(width, seed=3), random(width, seed=4) - random(width, seed=1), random(width, seed=2)]
    ).double()
    return tuple(square**0.5 * torch.nn.functional.normalize(made, dim=-1) for made in (q, k))


def products(omega, q, k):
    """phi(q) phi(k) of each pair by each draw, [pairs, draws]."""
    return (exponents(q[:, None, None], omega) + exponents(k[:, None, None], omega)).exp().mean(-1).squeeze(-1)


def test_the_estimate_is_unbiased():
    q, k = pairs(16, 1.0)
    made = products(draws(8192, 16), q, k)
    error = (made.mean(1) - (q * k).sum(-1).exp()).abs() / (made.std(1) / made.shape[1] ** 0.5)
    assert (error < 3).all()  # standard errors: five pairs of a sound estimate are all within with probability 0.987; the seed is fixed


def test_the_error_falls_with_the_square_root_of_the_features():
    """Means over n independent blocks have 1 / n of the variance. A bias would be a floor, and the slope less."""
    q, k = pairs(16, 0.5)
    wrong = products(draws(25600, 16), q, k) / (q * k).sum(-1, keepdim=True).exp() - 1
    sizes = torch.tensor([1, 4, 16, 64])
    size = torch.stack([wrong.unflatten(1, (-1, int(n))).mean(-1).square().mean().sqrt() for n in sizes]).log()
    x = sizes.log() - sizes.log().mean()
    slope = float((x * size).sum() / x.square().sum())
    # The 400 means of 64 blocks decide: their log size has a standard error of sqrt(2 / (4 * 400)) = 0.035, the slope 0.22 of that. 0.03 is four of those.
    assert slope == pytest.approx(-0.5, abs=0.03)


def test_rotations_are_uniform():
    """QR alone prefers some: no entry of a uniformly random rotation has a mean other than 0, or a mean square other than 1 / D."""
    count, width = 8192, 8
    turned = torch.nn.functional.normalize(draws(count, width), dim=-1)
    assert (turned @ turned.mT - torch.eye(width)).abs().max() < 1e-12
    error = (count * width) ** 0.5
    assert (turned.mean(0) * error).abs().max() < 4.5  # standard errors; that all 64 are within has probability 0.9996
    assert ((turned.square().mean(0) - 1 / width) * error * (width / 2) ** 0.5).abs().max() < 4.5  # the variance of a square is below 2 / D^2


def test_lengths_are_those_of_gaussian_vectors():
    count, width = 8192, 8
    square = draws(count, width).square().sum(-1)
    assert abs(square.mean() - width) < 4 * (2 * width / (count * width)) ** 0.5  # chi squared: mean D, variance 2 D
    assert square.var() == pytest.approx(2 * width, rel=4 * ((2 + 12 / width) / (count * width)) ** 0.5)


def test_features_that_are_no_whole_blocks():
    assert orthogonal(11, 4, torch.Generator().manual_seed(0)).shape == (11, 4)
    assert orthogonal(3, 4, torch.Generator().manual_seed(0)).shape == (3, 4)


def test_each_layer_and_seed_has_features_of_its_own():
    made = [Performer(features=FEATURES, seed=seed).initial_values(config(), index)["omega"] for seed, index in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(omega.flatten().tolist()) for omega in made}) == len(made)
    assert torch.equal(made[0], Performer(features=FEATURES).initial_values(config(), 0)["omega"])


def test_nothing_trains_the_features():
    mixer = Mixer(Performer(features=FEATURES), config(), 0)
    assert [(name, parameter.requires_grad) for name, parameter in mixer.named_parameters()] == [("omega", False)]


@pytest.mark.parametrize("causal", [True, False])
def test_mixing_is_the_papers_estimate(causal):
    technique = Performer(features=FEATURES)
    omega = technique.initial_values(config(), 0)["omega"]
    out = mixed(technique, omega, *rows(), causal=causal)
    assert torch.allclose(out, reference(omega, *rows(), causal=causal).float(), atol=1e-5)


def test_many_features_come_near_softmax():
    query, key, value = rows(size=0.5)
    technique = Performer(features=8192)
    out = mixed(technique, technique.initial_values(config(), 0)["omega"], query, key, value)
    softmax = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert (out - softmax).norm() / softmax.norm() < 0.05  # 8192 features, relative variance below 10 each: 0.035


def test_scaling_is_that_of_the_family():
    technique = Performer(features=FEATURES)
    omega = technique.initial_values(config(), 0)["omega"]
    assert torch.allclose(mixed(technique, omega, *rows(), scaling=0.1), reference(omega, *rows(), scaling=0.1).float(), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_positive_and_sum_to_one(causal):
    query, key, _ = rows(width=TOKENS, tokens=TOKENS)
    value = torch.eye(TOKENS).expand(2, GROUPS, TOKENS, TOKENS)  # out comes the matrix of weights
    technique = Performer(features=FEATURES)
    weights = mixed(technique, technique.initial_values(config(TOKENS), 0)["omega"], query, key, value, causal=causal)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert not causal or not weights.triu(1).any()


@pytest.mark.parametrize("split", SPLITS)
def test_any_number_of_calls_gives_the_same(split):
    technique = Performer(features=FEATURES)
    omega = technique.initial_values(config(), 0)["omega"]
    assert torch.allclose(mixed(technique, omega, *rows(), split=split), mixed(technique, omega, *rows()), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_recurrent_chunked_and_parallel_forms_are_the_same(chunk):
    """Against the explicit products of what fades, in float64."""
    shared = HEADS // GROUPS
    query, key, value = random(2, GROUPS, shared, 70, 5, dtype=torch.float64), random(2, GROUPS, 1, 70, 5, seed=1).double(), random(2, GROUPS, 70, 3).double()
    state, fall = random(2, GROUPS, 1, 5, 3).double(), -random(2, GROUPS, 1, 70, seed=3).double().square()
    made, left = linear_attention(query, key, value, state, fall, chunk)
    held, wanted = state, []
    for token in range(70):
        held = fall[..., token, None, None].exp() * held + key[..., token, :, None] * value[:, :, None, token, None]
        wanted.append(query[..., token, None, :] @ held)
    assert torch.allclose(made, torch.cat(wanted, -2), atol=1e-12)
    assert torch.allclose(left, held, atol=1e-12)


def test_gradients_of_linear_attention():
    double = {"dtype": torch.float64}
    inputs = [random(1, 2, 2, 5, 3, **double), random(1, 2, 1, 5, 3, **double), random(1, 2, 5, 2, **double), random(1, 2, 1, 3, 2, **double)]
    inputs.append(-random(1, 2, 1, 5, **double).abs() - 0.1)
    assert torch.autograd.gradcheck(lambda *given: linear_attention(*given, chunk=2), [tensor.requires_grad_() for tensor in inputs])


def grown(place):
    """Keys of width 256 in some of whose features exp overflows in float32 from token `place` on: before, they are small."""
    query, key, value = rows(256, 100, 0.3)
    technique = Performer(features=64)
    omega = technique.initial_values(config(256), 0)["omega"]
    key[:, :, place:] = 4 * omega[: 100 - place]  # times D^-1/4: omega itself, whose exponent is |omega|^2 / 2
    assert exponents(omega[: 100 - place], omega).exp().isinf().any()
    return technique, omega, query, key, value


@pytest.mark.parametrize("causal", [True, False])
def test_exponents_that_overflow_do_not(causal):
    technique, omega, *given = grown(50)
    out = mixed(technique, omega, *given, causal=causal)
    close = 3e-4  # exponents go up to 150, and exp of them is right to 150 times float32's precision; processors differ
    assert torch.allclose(out, reference(omega, *given, causal=causal).float(), atol=close)


@pytest.mark.parametrize("causal", [True, False])
def test_queries_of_any_size(causal):
    """Of some exp overflows, of others every feature would be 0."""
    query, key, value = rows(256, 100, 0.3)
    technique = Performer(features=64)
    omega = technique.initial_values(config(256), 0)["omega"]
    query[:, :, :50], query[:, :, 50:] = 4 * omega[:50], 100 * query[:, :, 50:]
    made = exponents(query[0, 0] / 4, omega).exp()
    assert made[:50].isinf().any(-1).all()
    assert not made[50:].any()
    assert torch.allclose(mixed(technique, omega, query, key, value, causal=causal), reference(omega, query, key, value, causal=causal).float(), atol=1e-3)


@pytest.mark.parametrize("split", [[100], [50, 50], [45, 10, 45], [1] * 100])
def test_what_is_remembered_is_scaled_down_as_keys_grow(split):
    technique, omega, *given = grown(50)
    assert torch.allclose(mixed(technique, omega, *given, split=split), mixed(technique, omega, *given), atol=1e-4)


@pytest.mark.parametrize("split", [None, [100], [1] * 100])
def test_a_later_key_touches_no_earlier_token(split):
    """However much larger its features are: in the same chunk they would leave nothing of those before."""
    technique, omega, *given = grown(50)
    short = [tensor[:, :, :50] for tensor in given]
    assert torch.allclose(mixed(technique, omega, *given, split=split)[:, :, :50], mixed(technique, omega, *short), atol=1e-5)
    assert torch.allclose(mixed(technique, omega, *given, split=split)[:, :, 0], given[2][:, :, 0].repeat_interleave(2, 1), atol=1e-5)


@pytest.mark.parametrize("split", [None, [64, 36], [1] * 100])
def test_keys_whose_features_are_all_tiny(split):
    """Long keys give features that are 0 in float32; of those alone a token still mixes."""
    query, key, value = rows(8, 100)
    technique = Performer(features=FEATURES)
    omega = technique.initial_values(config(), 0)["omega"]
    key[:, :, :80] *= 30
    assert not exponents(key[:, :, :80] * 8**-0.25, omega).amax(-1).exp().all()
    query = query * 0.1  # so that what is left is a matter of the keys' scale
    assert torch.allclose(mixed(technique, omega, query, key, value, split=split), reference(omega, query, key, value).float(), atol=1e-4)


@pytest.mark.parametrize(("causal", "split"), [(False, None), (True, None), (True, [5, 60, 85]), (True, [1] * TOKENS)])
def test_padding_changes_nothing(causal, split):
    """At the left, in the middle, at the right; and a text that is nothing else."""
    query, key, value = rows()
    technique = Performer(features=FEATURES)
    omega = technique.initial_values(config(), 0)["omega"]
    live = torch.ones(2, TOKENS, dtype=torch.bool)
    live[0, :9] = live[0, 60:90] = live[0, -5:] = live[1] = False
    wild = [torch.where(live[:, None, :, None], tensor, 1e4) for tensor in (query, key, value)]
    out = mixed(technique, omega, *wild, live, causal, split)
    kept = [tensor[:1, :, live[0]] for tensor in (query, key, value)]
    assert torch.allclose(out[:1, :, live[0]], mixed(technique, omega, *kept, causal=causal), atol=1e-5)
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_estimate(causal):
    """What features are scaled by is held fixed: it cancels."""
    technique = Performer(features=FEATURES)
    omega = technique.initial_values(config(), 0)["omega"]
    found = []
    for form in (lambda *given: mixed(technique, omega, *given, causal=causal), lambda *given: reference(omega, *given, causal=causal)):
        given = [tensor[:, :, :20].clone().requires_grad_() for tensor in rows()]
        form(*given).square().sum().backward()
        found.append([tensor.grad for tensor in given])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max())


def test_bfloat16_inputs_are_mixed_in_float32():
    technique = Performer(features=FEATURES)
    omega = technique.initial_values(config(), 0)["omega"].bfloat16()
    given = [tensor.bfloat16() for tensor in rows()]
    assert torch.allclose(mixed(technique, omega, *given), reference(omega.float(), *given).float(), atol=1e-5)


def test_encoders_remember_nothing():
    assert Performer(features=FEATURES).cache_slots(config(kind="bert")) == {}
    assert Performer(features=FEATURES).cache_bytes(config(), 2) == 4 * GROUPS * (FEATURES * (WIDTH + 1) + 1)
