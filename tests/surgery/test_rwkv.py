"""RWKV's time mixing is its paper's, token by token, in whatever parts it is computed; and what it begins with is that of the attention."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from effconvert.errors import ModelError, OptionError
from effconvert.heal._capture import Capture
from effconvert.modeling.attention import Mixer
from effconvert.surgery.mixing._call import Call, Rotation
from effconvert.surgery.mixing._retained import EPSILON
from effconvert.surgery.mixing._rwkv4 import equations, solve, weighted_mean
from effconvert.surgery.mixing.rwkv import Rwkv
from tests.mixers.mixing import PIECES, SAME, far, in_pieces, pair, positions, run, tokens
from tests.surgery.recurrent import (
    GROUPS,
    HEADS,
    HIDDEN,
    SPLITS,
    TOKENS,
    WIDTH,
    config,
    decaying,
    layer,
    mixed,
    near,
    padding_changes_nothing,
    random,
    rows,
    same_gradients,
    shaken,
)

FOUR, SEVEN = Rwkv(version=4), Rwkv()
SHARED = HEADS // GROUPS


def seventh(weights, query, key, value, hidden):
    """RWKV-7's equations in float64, with a matrix [D, D] for each query head and shifts of what is behind the projections."""
    w = {name: weight.double() for name, weight in weights.items()}
    query, key, value, hidden = (tensor.double() for tensor in (query, key, value, hidden))
    before = [torch.cat([torch.zeros_like(tensor[..., :1, :]), tensor[..., :-1, :]], -2) for tensor in (query, key, value, hidden)]
    r, k, v = (
        tensor + (last - tensor) * w[f"{name}_shift"][:, None]
        for name, tensor, last in zip(("query", "key", "value"), (query, key, value), before[:3], strict=True)
    )
    x_w, x_a, x_g = (hidden + (before[3] - hidden) * share for share in w["shift"])
    d = (x_w @ w["decay_down"].T).tanh() @ w["decay_up"].T
    a = x_a @ w["rate_down"].T @ w["rate_up"].T
    g = 1 + (x_g @ w["gate_down"].T).sigmoid() @ w["gate_up"].T
    heads = []
    for head in range(HEADS):
        group = head // SHARED
        keys, queries = slice(group * WIDTH, group * WIDTH + WIDTH), slice(head * WIDTH, head * WIDTH + WIDTH)
        state, outputs = torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64), []  # values by keys, as the paper has it
        for t in range(hidden.shape[1]):
            decay = (-(torch.tensor(-0.5).double().exp()) * (w["decay_bias"][group] + d[:, t, keys]).sigmoid()).exp()
            rate = (w["rate_bias"][group] + a[:, t, keys]).sigmoid()
            kappa = k[:, group, t] * w["removal"][group]
            kappa = kappa / kappa.norm(dim=-1, keepdim=True)
            new = k[:, group, t] * (1 + (rate - 1) * w["replacement"][group])
            state = state * decay[:, None] - (state @ kappa[..., None]) * (rate * kappa)[:, None] + v[:, group, t, :, None] * new[:, None]
            receptance = r[:, head, t] * WIDTH**-0.5
            out = (state @ receptance[..., None])[..., 0]
            out = out / (out.square().mean(-1, keepdim=True) + EPSILON).sqrt() * w["gain"][head]
            bonus = (receptance * w["bonus"][head] * new).sum(-1, keepdim=True) * v[:, group, t]
            outputs.append((out + bonus) * g[:, t, queries])
        heads.append(torch.stack(outputs, 1))
    return torch.stack(heads, 1)


def fourth(weights, query, key, value, hidden):
    """RWKV-4's equation in float64, as it is written down, with shifts of what is behind the projections."""
    w = {name: weight.double() for name, weight in weights.items()}
    query, key, value = (tensor.double() for tensor in (query, key, value))
    before = [torch.cat([torch.zeros_like(tensor[..., :1, :]), tensor[..., :-1, :]], -2) for tensor in (query, key, value)]
    r, k, v = (
        tensor + (last - tensor) * w[f"{name}_shift"][:, None]
        for name, tensor, last in zip(("query", "key", "value"), (query, key, value), before, strict=True)
    )
    heads = []
    for head in range(HEADS):
        group, outputs = head // SHARED, []
        decay, keys = w["decay"][head].exp(), (k[:, group] @ w["key"][head].T)
        for t in range(hidden.shape[1]):
            earlier = (keys[:, :t] - torch.arange(t - 1, -1, -1)[:, None] * decay).exp()
            own = (w["bonus"][head] + keys[:, t]).exp()
            wkv = ((earlier * v[:, group, :t]).sum(1) + own * v[:, group, t]) / (earlier.sum(1) + own)
            outputs.append(2 * (r[:, head, t] @ w["receptance"][head].T).sigmoid() * wkv)
        heads.append(torch.stack(outputs, 1))
    return torch.stack(heads, 1)


BOTH = pytest.mark.parametrize(("technique", "reference"), [(FOUR, fourth), (SEVEN, seventh)], ids=["4", "7"])


@BOTH
def test_mixing_is_the_papers_equation(technique, reference):
    assert near(mixed(technique, shaken(technique), *rows()), reference(shaken(technique), *rows()), 2e-5)


@pytest.mark.parametrize("split", SPLITS)
@BOTH
def test_any_number_of_calls_gives_the_same(technique, reference, split):
    assert near(mixed(technique, shaken(technique), *rows(), split=split), mixed(technique, shaken(technique), *rows()), 2e-5)


@BOTH
def test_padding_changes_nothing(technique, reference):
    padding_changes_nothing(technique)


@BOTH
def test_gradients_are_those_of_the_equation(technique, reference):
    same_gradients(technique, reference, tokens=20)


@BOTH
def test_bfloat16_models_are_mixed_in_float32(technique, reference):
    weights = {name: weight.bfloat16() for name, weight in shaken(technique).items()}
    given = [tensor.bfloat16() for tensor in rows()]
    assert near(mixed(technique, weights, *given), reference(weights, *given), 2**-6)  # projections of hidden states are the model's own: bfloat16


@BOTH
def test_everything_is_trained(technique, reference):
    assert all(parameter.requires_grad for parameter in Mixer(technique, config(), 0).parameters())


@pytest.mark.parametrize("size", [1.0, 80.0])
@pytest.mark.parametrize("chunk", [1, 7, 16, TOKENS])
def test_weights_are_held_by_a_running_maximum(chunk, size):
    """Keys of 80 and more, whose exponentials float32 does not hold, against the plain mean in float64."""
    key, value = size * random(2, HEADS, TOKENS, WIDTH), random(2, HEADS, TOKENS, WIDTH, seed=1)
    decay, bonus = random(HEADS, WIDTH, seed=2).exp(), random(HEADS, WIDTH, seed=3)
    begun = [torch.zeros(2, HEADS, WIDTH)] * 3
    made, state = weighted_mean(key, value, decay, bonus, torch.ones(2, TOKENS, dtype=torch.bool), begun, chunk)
    away = (torch.arange(TOKENS)[:, None] - 1 - torch.arange(TOKENS)).double()[..., None]
    scores = key.double()[:, :, None] - away * decay.double()[:, None, None]
    scores = torch.where(away == -1, key.double()[:, :, None] + bonus[:, None, None], scores).masked_fill(away < -1, -torch.inf)
    assert near(made, (scores.softmax(-2) * value.double()[:, :, None]).sum(-2), 1e-4 if size > 1 else 1e-5)  # float32 rounds scores of 300 to 1e-5
    assert all(tensor.isfinite().all() for tensor in state)


def test_the_strongest_decays_stay_finite():
    """A bias of 50 is exp(-0.61) a token for all channels, 64 of them to a chunk."""
    weights = {**shaken(SEVEN), "decay_bias": torch.full((GROUPS, WIDTH), 50.0)}
    assert near(mixed(SEVEN, weights, *rows()), seventh(weights, *rows()), 2e-5)


def test_the_state_is_a_matrix_a_kv_head_and_the_last_token():
    slots = SEVEN.cache_slots(config())
    assert slots["state"] == ((GROUPS, WIDTH, WIDTH), "float32")
    assert slots["last_hidden"] == ((HIDDEN,), "model")
    assert slots["last_query"] == ((HEADS, WIDTH), "model")


def test_it_begins_without_shift_and_nearly_without_regard_to_the_token():
    begun = SEVEN.initial_values(config(), 0)
    assert not any(begun[name].any() for name in ("shift", "query_shift", "key_shift", "value_shift", "bonus"))
    assert torch.allclose((-0.5 * torch.ones(()).double()).exp() * begun["decay_bias"].double().sigmoid(), -torch.tensor(1 - 2.0**-8).double().log())
    made = mixed(SEVEN, begun, *rows())
    assert torch.allclose(made.square().mean(-1).sqrt(), torch.ones(()), atol=0.2)  # what the random gate adds to 1
    assert not torch.equal(begun["gate_up"], SEVEN.initial_values(config(), 1)["gate_up"])


def test_fit_takes_decays_of_kv_heads_and_sizes_of_heads_from_all_batches():
    attention = decaying([0.9, 0.9, 0.99, 0.99], batch=3)
    fitted = SEVEN.fit(layer(attention[:2], attention[2:]), SEVEN.initial_values(config(), 0))
    decay = (-(torch.tensor(-0.5).double().exp()) * fitted["decay_bias"].double().sigmoid()).exp()
    assert torch.allclose(decay, torch.tensor([[0.9], [0.99]]).double().expand(GROUPS, WIDTH), atol=1e-4)
    assert torch.allclose(fitted["gain"], torch.tensor([1.0, 2, 3, 4])[:, None].expand(HEADS, WIDTH))


def test_a_head_that_tells_nothing_keeps_the_decay_that_it_begins_with():
    attention = decaying([0.9] * HEADS).clone()
    attention[:, :SHARED] = torch.eye(64)
    begun = SEVEN.initial_values(config(), 0)
    fitted = SEVEN.fit(layer(attention), begun)["decay_bias"]
    assert torch.equal(fitted[0], begun["decay_bias"][0])
    assert not torch.equal(fitted[1], begun["decay_bias"][1])


def additive(decay, bonus, chosen, keys):
    """Attention [B, H, T, T] whose log is the sum of a decay, a bonus and a product with the key, but for a constant for each query."""
    tokens = torch.arange(keys.shape[2])
    away = (tokens[:, None] - 1 - tokens).double()
    scores = (keys @ chosen[..., None]).mT - away * decay[:, None, None]
    scores = torch.where(away == -1, scores + (bonus - decay)[:, None, None], scores)
    return scores.masked_fill(away < -1, -torch.inf).softmax(-1)


def test_a_log_additive_attention_is_found_again():
    keys, chosen = random(2, HEADS, 40, WIDTH, dtype=torch.float64), random(HEADS, WIDTH, seed=1, dtype=torch.float64)
    decay, bonus = torch.tensor([0.01, 0.1, 0.5, 2.0]).double(), torch.tensor([-1.0, 0.0, 1.0, 3.0]).double()
    found = solve(*equations(additive(decay, bonus, chosen, keys), keys))
    assert torch.allclose(found, torch.cat([-decay[:, None], bonus[:, None], chosen], -1), atol=2e-2)  # the ridge


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_fitted_gives_what_such_an_attention_gave(turned):
    """Keys are those before RoPE, in the fit as in the mixer."""
    query, key, value, hidden = (tensor.double() for tensor in rows(40))
    angles = torch.arange(40)[:, None] * 0.5 ** torch.arange(WIDTH // 2).repeat(2)
    rotation = Rotation(apply_rotary_pos_emb, (angles.cos()[None], angles.sin()[None])) if turned else None
    decay, bonus = torch.tensor([0.01, 0.1, 0.5, 2.0]).double(), torch.tensor([-1.0, 0.0, 1.0, 3.0]).double()
    shared = key.repeat_interleave(SHARED, 1)
    attention = additive(decay, bonus, random(HEADS, WIDTH, seed=1, dtype=torch.float64), shared)
    query, key = rotation.apply(query, key, *rotation.parts) if rotation else (query, key)
    looks = [Capture(hidden, key=key, weights=attention, rotation=rotation)]
    given = SimpleNamespace(config=config(), index=0, activations=SimpleNamespace(capture=lambda *_, **__: iter(looks)))
    weights = {**FOUR.fit(given, FOUR.initial_values(config(), 0)), "receptance": torch.zeros(HEADS, WIDTH, WIDTH)}
    call = Call(query.float(), key.float(), value.float(), 1.0, torch.ones(2, 40, dtype=torch.bool), True, None, hidden, rotation)
    assert near(FOUR.mix(weights, call), attention @ value.repeat_interleave(SHARED, 1), 5e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_with_version_7_owes_what_the_contract_asks_of_version_4(kind):
    """In pieces, and behind padding."""
    _, model = pair(kind, ("rwkv", {}))
    expected = run(model, tokens())
    assert far(in_pieces(model, tokens(), PIECES)[0], expected) <= SAME
    ids, mask = torch.cat([tokens(length=5, seed=1), tokens()], 1), torch.ones(2, 25, dtype=torch.long)
    mask[:, :5] = 0
    pieces = in_pieces(model, ids, (3, 4, *[1] * 3, 9, *[1] * 6), mask, **positions(model, mask))[0]
    assert far(pieces[:, 5:], expected) <= SAME


def test_encoders_are_refused():
    with pytest.raises(ModelError, match="bert is an encoder, and rwkv goes through a text once"):
        SEVEN.check(config("bert"))


@pytest.mark.parametrize("version", [5, "6", "seven"])
def test_other_versions_are_refused(version):
    with pytest.raises(OptionError, match="--version"):
        Rwkv(version=version)


def test_a_number_is_a_version():
    assert Rwkv(version=4) == Rwkv(version="4")
