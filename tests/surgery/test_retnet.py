"""Retention is the paper's, in whatever parts it is computed, and its decays are those of the attention that it takes the place of."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from effconvert.errors import ModelError, OptionError
from effconvert.heal._capture import Capture
from effconvert.kernels.linear_attention import linear_attention
from effconvert.modeling.attention import Mixer
from effconvert.modeling.state import State
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing._retained import EPSILON, by_distance, fit_decay
from effconvert.surgery.mixing.retnet import Retnet
from tests.surgery.recurrent import GROUPS, HEADS, HIDDEN, SPLITS, TOKENS, WIDTH, config, random, rows

TECHNIQUE = Retnet(decay="paper")


def trained():
    """Parameters as training might leave them."""
    weights = TECHNIQUE.initial_values(config(), 0)
    weights = {name: weight + 0.3 * random(*weight.shape, seed=seed) for seed, (name, weight) in enumerate(weights.items())}
    return {**weights, "decay": torch.tensor([-8.0, -3.0, -1.0, 1.0])}


def retained(weights, query, key, value, hidden, live=None, split=None):
    """What the mixer gives of all tokens, called once, or in parts with a state."""
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    state = State(TECHNIQUE.cache_slots(config())) if split else None
    cuts = ((query, 2), (key, 2), (value, 2), (live, 1), (hidden, 1))
    made = []
    for q, k, v, alive, given in zip(*(tensor.split(split or key.shape[2], dim) for tensor, dim in cuts), strict=True):
        if state:
            state.update(k, v)
        made.append(TECHNIQUE.mix(weights, Call(q, k, v, WIDTH**-0.5, alive, True, state, given, None)))
    return torch.cat(made, 2)


def reference(weights, query, key, value, hidden):
    """Equation 8 of the paper in float64, by the explicit matrix D; one gamma a head, and D keys for R queries."""
    weights = {name: weight.double() for name, weight in weights.items()}
    query, key, value, hidden = (tensor.double() for tensor in (query, key, value, hidden))
    gamma = 1 - weights["decay"].sigmoid()
    tokens = torch.arange(query.shape[2])
    distance = tokens[:, None] - tokens
    heads = []
    for head in range(HEADS):
        shared = head // (HEADS // GROUPS)
        mask = torch.where(distance >= 0, gamma[head] ** distance.clamp_min(0), 0)
        out = (query[:, head] @ key[:, shared].mT * WIDTH**-0.5 * mask) @ value[:, shared]
        out = out / (out.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weights["gain"][head]
        mine = slice(head * WIDTH, (head + 1) * WIDTH)
        gate = hidden @ weights["gate"][mine].T + weights["gate_bias"][mine]
        heads.append(out * gate * gate.sigmoid())
    return torch.stack(heads, 1)


def near(ours, theirs, tolerance=1e-5):
    """Whether outputs are the same in float32; they are about 1, but where a head's sum is nearly 0 and the norm magnifies what was rounded."""
    return float((ours - theirs).norm() / theirs.norm()) < tolerance


def test_mixing_is_the_papers_equation():
    assert near(retained(trained(), *rows()), reference(trained(), *rows()))


@pytest.mark.parametrize("split", SPLITS)
def test_any_number_of_calls_gives_the_same(split):
    assert near(retained(trained(), *rows(), split=split), retained(trained(), *rows()))


@pytest.mark.parametrize("chunk", [1, 7, 64, TOKENS])
def test_parallel_chunked_and_recurrent_retention_are_the_same(chunk):
    """In float64, against the matrix of the paper, so that what is left is rounding."""
    query, key, value = (tensor.double() for tensor in rows()[:3])
    gamma = (1 - trained()["decay"].double().sigmoid()).unflatten(0, (GROUPS, -1))
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    mask = torch.where(distance >= 0, gamma[..., None, None] ** distance.clamp_min(0), 0)
    grouped = query.unflatten(1, (GROUPS, -1))
    wanted = (grouped @ key[:, :, None].mT * mask) @ value[:, :, None]
    start = torch.zeros(2, GROUPS, HEADS // GROUPS, WIDTH, WIDTH, dtype=torch.float64)
    fall = gamma.log()[None, ..., None].expand(2, -1, -1, TOKENS)
    made, _ = linear_attention(grouped, key[:, :, None], value, start, fall, chunk)
    assert (made - wanted).abs().max() / wanted.abs().max() < 1e-13


def test_a_head_that_forgets_at_once_sees_its_own_token_only():
    weights = {**TECHNIQUE.initial_values(config(), 0), "decay": torch.full((HEADS,), 50.0)}
    query, key, value, hidden = rows()
    shared = HEADS // GROUPS
    own = (query * key.repeat_interleave(shared, 1)).sum(-1, keepdim=True) * value.repeat_interleave(shared, 1)
    assert near(retained(weights, query, key, value, hidden), own / own.square().mean(-1, keepdim=True).sqrt())


def test_a_head_that_never_forgets_is_linear_attention_without_a_normaliser():
    weights = {**TECHNIQUE.initial_values(config(), 0), "decay": torch.full((HEADS,), -50.0)}
    query, key, value, hidden = rows()
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, 1) for tensor in (key, value))
    summed = (query @ key.mT).tril() @ value
    assert near(retained(weights, query, key[:, ::2], value[:, ::2], hidden), summed / summed.square().mean(-1, keepdim=True).sqrt())


def test_the_gate_begins_open_and_every_size_at_one():
    out = retained(TECHNIQUE.initial_values(config(), 0), *rows())
    assert torch.allclose(out.square().mean(-1), torch.ones(()), atol=1e-5)


def test_the_papers_decays():
    gamma = torch.sigmoid(-TECHNIQUE.initial_values(config(), 0)["decay"])
    assert torch.allclose(gamma, torch.tensor([1 - 2.0**-5, 1 - 2.0**-6, 1 - 2.0**-7, 1 - 2.0**-8]), atol=1e-7)


def test_bfloat16_keeps_slow_heads_apart():
    kept = torch.sigmoid(TECHNIQUE.initial_values(config(heads=12), 0)["decay"].bfloat16().double())  # 1 - gamma
    assert torch.allclose(kept.log2(), torch.arange(-5, -17, -1).double(), atol=0.1)  # bfloat16 rounds a logit of 11 by up to 0.03, which is 0.05 in log2


@pytest.mark.parametrize("split", [None, [5, 60, 85], [1] * TOKENS])
def test_padding_changes_nothing(split):
    """At the left, in the middle, at the right; and a text that is nothing else. In the middle it makes nobody forget."""
    live = torch.ones(2, TOKENS, dtype=torch.bool)
    live[0, :9] = live[0, 60:90] = live[0, -5:] = live[1] = False
    query, key, value, hidden = rows()
    wild = [torch.where(live[:, None, :, None], tensor, 1e4) for tensor in (query, key, value)]
    out = retained(trained(), *wild, hidden, live, split)
    kept = [tensor[:1, :, live[0]] for tensor in (query, key, value)]
    assert near(out[:1, :, live[0]], retained(trained(), *kept, hidden[:1, live[0]]))
    assert out.isfinite().all()


def test_gradients_are_those_of_the_equation():
    found = []
    for form in (retained, reference):
        weights = {name: weight.clone().requires_grad_() for name, weight in trained().items()}
        given = [tensor.clone().requires_grad_() for tensor in rows(20)]
        (form(weights, *given) * random(2, HEADS, 20, WIDTH, seed=7)).sum().backward()
        found.append([tensor.grad for tensor in (*weights.values(), *given)])
    for ours, theirs in zip(*found, strict=True):
        assert near(ours, theirs, 1e-4)


def test_bfloat16_models_are_retained_in_float32():
    weights = {name: weight.bfloat16() for name, weight in trained().items()}
    given = [tensor.bfloat16() for tensor in rows()]
    assert near(retained(weights, *given), reference(weights, *given), 2**-8)  # the gate's projection is one of the model's own: bfloat16


def test_everything_is_trained():
    assert all(parameter.requires_grad for parameter in Mixer(TECHNIQUE, config(), 0).parameters())


def decaying(gammas, tokens=64, sink=0.0, batch=2):
    """Attention [B, H, T, T] that falls by gamma with the distance, but for a share that goes to the first token."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    weights = torch.stack([torch.where(distance >= 0, gamma ** distance.clamp_min(0), 0.0) for gamma in gammas])
    weights = (1 - sink) * weights / weights.sum(-1, keepdim=True)
    weights[..., 0] += sink
    return weights.expand(batch, -1, -1, -1)


@pytest.mark.parametrize("sink", [0.0, 0.9])
def test_fitted_decays_are_those_that_attention_has(sink):
    gammas = [0.9, 0.97, 0.99, 0.999]  # and not more: rows that add up to 1 are flat for the last of them
    far = fit_decay(by_distance(decaying(gammas, sink=sink)).double())
    assert torch.allclose(far, 1 - torch.tensor(gammas).double(), rtol=1e-3)


def test_fitted_decays_stay_within_bounds():
    far = fit_decay(by_distance(decaying([0.3, 1.0])).double())
    assert far.tolist() == [2.0**-3, 2.0**-12]


def test_near_distances_count_by_what_they_get():
    """Beyond what a head looks at there is a floor: that most distances are there must not make it a head that never forgets."""
    far = fit_decay(by_distance(decaying([0.88], tokens=512) + 1e-6).double())
    assert float(far) == pytest.approx(0.12, abs=0.005)


def layer(*batches):
    """A layer whose activations show these weights, and outputs of size 1, 2, 3 and 4."""
    looks = [
        Capture(
            torch.zeros(len(weights), weights.shape[-1], HIDDEN), inputs={"o": torch.arange(1.0, 5).repeat_interleave(WIDTH).expand(*weights.shape[::3], -1)}
        )
        for weights in batches
    ]
    for look, weights in zip(looks, batches, strict=True):
        look.weights = weights
    return SimpleNamespace(config=config(), index=0, activations=SimpleNamespace(capture=lambda *_, **__: iter(looks)))


def test_fit_takes_decays_and_sizes_from_all_batches():
    technique = Retnet()
    attention = decaying([0.9, 0.97, 0.99, 0.999], batch=3)
    fitted = technique.fit(layer(attention[:2], attention[2:]), technique.initial_values(config(), 0))
    assert torch.allclose(torch.sigmoid(-fitted["decay"]), torch.tensor([0.9, 0.97, 0.99, 0.999]), atol=1e-4)
    assert torch.allclose(fitted["gain"], torch.tensor([1.0, 2, 3, 4])[:, None].expand(HEADS, WIDTH))


def test_a_head_that_tells_nothing_gets_the_papers_decay():
    technique, attention = Retnet(), decaying([0.9] * HEADS).clone()
    attention[:, 2] = torch.eye(64)
    begun = technique.initial_values(config(), 0)
    fitted = technique.fit(layer(attention), begun)
    assert fitted["decay"][2] == begun["decay"][2]
    assert fitted["decay"][1] != begun["decay"][1]


def test_what_is_fitted_has_the_size_that_attention_gave():
    technique, given = Retnet(), rows()
    weights = technique.fit(layer(decaying([0.9] * HEADS)), technique.initial_values(config(), 0))
    assert torch.allclose(retained(weights, *given).square().mean((0, 2, 3)).sqrt(), torch.tensor([1.0, 2, 3, 4]), atol=1e-4)


def test_a_conversion_fits_each_layer(model, command):
    """Whose attention is flat, since it is random: each head forgets as slowly as any. Sizes differ between layers."""
    done = command("retnet", model, "-o", "fitted", "--calibration-tokens", 256, "--no-verify")
    assert done.exit_code == 0, done.output
    assert command("retnet", "--decay", "paper", model, "-o", "plain", "--no-verify").exit_code == 0
    fitted, plain = (
        {name: tensor for file in folder for name, tensor in load_file(file).items() if ".effconvert." in name}
        for folder in (sorted(model.parent.glob("fitted/*.safetensors")), sorted(model.parent.glob("plain/*.safetensors")))
    )
    for index in range(3):
        part = f"model.layers.{index}.self_attn.effconvert."
        assert torch.equal(plain[f"{part}decay"], TECHNIQUE.initial_values(config(), index)["decay"].bfloat16())
        assert (plain[f"{part}gain"] == 1).all()
        assert torch.allclose(fitted[f"{part}decay"].double().sigmoid().log2(), torch.tensor(-12.0).double(), atol=0.1)
    gains = torch.stack([tensor for name, tensor in sorted(fitted.items()) if name.endswith("gain")])
    assert len({tuple(gain.flatten().tolist()) for gain in gains}) == 3
    assert torch.equal(gains, gains[..., :1].expand_as(gains))
    assert json.loads((model.parent / "plain/config.json").read_text())["effconvert"]["replaced"][0]["options"] == {"decay": "paper"}


def test_encoders_are_refused():
    with pytest.raises(ModelError, match="bert is an encoder, and retnet looks back only"):
        TECHNIQUE.check(config("bert"))


def test_other_decays_are_refused():
    with pytest.raises(OptionError, match="--decay"):
        Retnet(decay="none")
