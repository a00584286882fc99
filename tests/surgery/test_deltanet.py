"""The delta rule is its papers', token by token, in whatever parts it is computed; and what deltanet begins with is that of the attention."""

import pytest
import torch

from effconvert.errors import ModelError
from effconvert.modeling.attention import Mixer
from effconvert.surgery.mixing._delta import delta_rule
from effconvert.surgery.mixing._retained import EPSILON, UNKNOWN
from effconvert.surgery.mixing.deltanet import Deltanet
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

TECHNIQUE = Deltanet()
SHARED = HEADS // GROUPS


def by_token(query, read, write, value, fall, state, key=None):
    """The rule as it is written down, one token after the other."""
    outputs = []
    for t in range(query.shape[-2]):
        found = read[:, :, t, None] @ state  # [B, G, 1, D]
        state = fall[:, :, t, :, None].exp() * state + write[:, :, t, :, None] * (found if key is not None else found + value[:, :, t, None])
        if key is not None:
            state = state + key[:, :, t, :, None] * value[:, :, t, None]
        outputs.append(query[:, :, :, t, None] @ state[:, :, None])
    return torch.cat(outputs, -2), state


def parts(decays, second, tokens=TOKENS):
    """Queries, and what is read, written and forgotten, in float64; decays for each token or for each channel."""
    query, key, value, again = (random(2, GROUPS, *more, tokens, WIDTH, seed=seed, dtype=torch.float64) for seed, more in enumerate([(SHARED,), (), (), ()]))
    key, rate = torch.nn.functional.normalize(key, dim=-1), random(2, GROUPS, tokens, 1, seed=4, dtype=torch.float64).sigmoid()
    fall = -0.6 * random(2, GROUPS, tokens, WIDTH if decays == "channels" else 1, seed=5, dtype=torch.float64).sigmoid()
    state = random(2, GROUPS, WIDTH, WIDTH, seed=6, dtype=torch.float64)
    return query, -rate * key, key, value, fall, state, *([again] if second else [])


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("decays", ["tokens", "channels"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_what_single_tokens_give(chunk, decays, second):
    given = parts(decays, second)
    for made, wanted in zip(delta_rule(*given, chunk=chunk), by_token(*given), strict=True):
        assert near(made, wanted, 1e-12)


@pytest.mark.parametrize("decays", ["tokens", "channels"])
def test_float32_holds_the_strongest_decays_over_a_chunk(decays):
    """Of channels those that rwkv allows, exp(-0.61) a token; of tokens any."""
    query, read, write, value, fall, state = parts(decays, second=False)
    strongest = torch.full_like(fall, -0.6066 if decays == "channels" else -30.0)
    single = [tensor.float().requires_grad_() for tensor in (query, read, write, value, strongest, state)]
    made, wanted = delta_rule(*single)[0], by_token(query, read, write, value, strongest, state)[0]
    assert near(made.detach(), wanted.detach())
    made.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in single)


def test_with_a_rate_of_1_a_key_gives_its_last_value():
    """Whatever other keys were given before, as long as they are at right angles to it."""
    keys = torch.eye(WIDTH).expand(1, 1, -1, -1).repeat(1, 1, 2, 1)  # each twice
    value = random(1, 1, 2 * WIDTH, WIDTH)
    made, state = delta_rule(keys[:, :, None], -keys, keys, value, torch.zeros(1, 1, 2 * WIDTH, 1), torch.zeros(1, 1, WIDTH, WIDTH))
    assert torch.allclose(made[0, 0, 0], value[0, 0], atol=1e-6)
    assert torch.allclose(state[0, 0], value[0, 0, WIDTH:], atol=1e-6)


def test_without_reading_it_is_linear_attention():
    query, _, write, value, _, state = parts("tokens", second=False)
    made, _ = delta_rule(query, 0 * write, write, value, 0 * value[..., :1], 0 * state)
    assert near(made, (query @ write[:, :, None].mT).tril() @ value[:, :, None], 1e-12)


def reference(weights, query, key, value, hidden):
    """Equation 10 of Gated DeltaNet in float64, one matrix for each KV head; then a norm, a gain and silu of the gate."""
    weights = {name: weight.double() for name, weight in weights.items()}
    query, key, value, hidden = (tensor.double() for tensor in (query, key, value, hidden))
    query, key = (tensor / tensor.norm(dim=-1, keepdim=True) for tensor in (query, key))
    alpha = 1 - (hidden @ weights["decay"].T + weights["decay_bias"]).sigmoid()  # [B, T, G]
    beta = (hidden @ weights["rate"].T + weights["rate_bias"]).sigmoid()
    gate = hidden @ weights["gate"].T + weights["gate_bias"]
    gate = (gate * gate.sigmoid()).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    one, heads = torch.eye(WIDTH, dtype=torch.float64), []
    for head in range(HEADS):
        group, state, outputs = head // SHARED, torch.zeros(len(key), WIDTH, WIDTH, dtype=torch.float64), []
        for t in range(query.shape[2]):
            k, v = key[:, group, t, :, None], value[:, group, t, None]
            a, b = alpha[:, t, group, None, None], beta[:, t, group, None, None]
            state = a * (one - b * k @ k.mT) @ state + b * k @ v
            outputs.append(query[:, head, t, None] @ state)
        out = torch.cat(outputs, 1)
        heads.append(out / (out.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weights["gain"][head])
    return torch.stack(heads, 1) * gate


def test_mixing_is_the_papers_equation():
    assert near(mixed(TECHNIQUE, shaken(TECHNIQUE), *rows()), reference(shaken(TECHNIQUE), *rows()), 2e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_any_number_of_calls_gives_the_same(split):
    weights = shaken(TECHNIQUE)
    assert near(mixed(TECHNIQUE, weights, *rows(), split=split), mixed(TECHNIQUE, weights, *rows()), 2e-5)


def test_padding_changes_nothing():
    padding_changes_nothing(TECHNIQUE)


def test_gradients_are_those_of_the_equation():
    same_gradients(TECHNIQUE, reference)


def test_bfloat16_models_are_mixed_in_float32():
    weights = {name: weight.bfloat16() for name, weight in shaken(TECHNIQUE).items()}
    given = [tensor.bfloat16() for tensor in rows()]
    assert near(mixed(TECHNIQUE, weights, *given), reference(weights, *given), 2**-6)  # projections of hidden states are the model's own: bfloat16


def test_everything_is_trained():
    assert all(parameter.requires_grad for parameter in Mixer(TECHNIQUE, config(), 0).parameters())


def test_it_begins_with_the_same_decay_and_rate_for_all_tokens_and_an_open_gate():
    begun, (query, key, value, hidden) = TECHNIQUE.initial_values(config(), 0), rows()
    assert torch.allclose(begun["decay_bias"].double().sigmoid(), torch.tensor(UNKNOWN).double())
    made = mixed(TECHNIQUE, begun, query, key, value, hidden)
    assert torch.equal(made, mixed(TECHNIQUE, begun, query, key, value, 5 * hidden.flip(1)))
    assert torch.allclose(made.square().mean(-1), torch.ones(()), atol=1e-3)  # the norm's epsilon shows where a sum is nearly 0


def test_fit_takes_decays_of_kv_heads_and_sizes_of_heads_from_all_batches():
    attention = decaying([0.9, 0.9, 0.99, 0.99], batch=3)
    fitted = TECHNIQUE.fit(layer(attention[:2], attention[2:]), TECHNIQUE.initial_values(config(), 0))
    assert torch.allclose(torch.sigmoid(-fitted["decay_bias"]), torch.tensor([0.9, 0.99]), atol=1e-4)
    assert torch.allclose(fitted["gain"], torch.tensor([1.0, 2, 3, 4])[:, None].expand(HEADS, WIDTH))
    assert torch.allclose(mixed(TECHNIQUE, fitted, *rows()).square().mean((0, 2, 3)).sqrt(), torch.tensor([1.0, 2, 3, 4]), atol=1e-3)


def test_a_head_that_tells_nothing_keeps_the_decay_that_it_begins_with():
    attention = decaying([0.9] * HEADS).clone()
    attention[:, :2] = torch.eye(64)
    begun = TECHNIQUE.initial_values(config(), 0)
    fitted = TECHNIQUE.fit(layer(attention), begun)["decay_bias"]
    assert fitted[0] == begun["decay_bias"][0]
    assert fitted[1] != begun["decay_bias"][1]


def test_a_kv_head_keeps_one_matrix_however_many_query_heads_share_it():
    assert TECHNIQUE.cache_slots(config()) == {"state": ((GROUPS, WIDTH, WIDTH), "float32")}
    assert TECHNIQUE.parameters(config())["gate"] == (HEADS * WIDTH, HIDDEN)


def test_encoders_are_refused():
    with pytest.raises(ModelError, match="bert is an encoder, and deltanet goes through a text once"):
        TECHNIQUE.check(config("bert"))
