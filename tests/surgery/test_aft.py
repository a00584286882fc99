"""Weights of an attention-free transformer are exp(key + bias), channel by channel, in whatever parts they are summed, and begin as the model's attention."""

import json
from types import SimpleNamespace

import pytest
import torch

from effconvert.errors import OptionError
from effconvert.families import FAMILIES
from effconvert.heal._capture import Capture
from effconvert.modeling.attention import Mixer
from effconvert.modeling.model import model_class
from effconvert.modeling.state import State
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing.aft import Aft
from tests.mixers.mixing import far, run, tokens
from tests.models import characters, save, tiny
from tests.surgery.rows import GROUPS, HEADS, WIDTH, close, config, random

TEXT, HIDDEN, LONGEST = 50, HEADS * WIDTH, 64
LLAMA = config("llama", num_key_value_heads=GROUPS, max_position_embeddings=LONGEST)
BERT = config("bert", max_position_embeddings=LONGEST)
FORMS = [
    Aft(form="simple"),
    Aft(form="conv", window=1),
    Aft(form="conv", window=5),
    Aft(form="conv", window=100),
    Aft(form="local", window=19),
    Aft(form="full"),
]
SPLITS = [None, [TEXT], [7, 1, 20, 22], [1] * TEXT]


def named(technique):
    return f"{technique.form}-{technique.window}"


def given(texts=2, causal=True):
    """Values and hidden states."""
    return random(texts, GROUPS if causal else HEADS, TEXT, WIDTH, seed=2), random(texts, TEXT, HIDDEN, seed=3)


def trained(technique, causal=True, size=1.0):
    """Parameters as training might leave them: keys of about `size`."""
    shapes = technique.parameters(LLAMA if causal else BERT)
    weights = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    return {**weights, "key": weights["key"] * size / HIDDEN**0.5, "gate": weights["gate"] / HIDDEN**0.5}


def mixed(technique, weights, value, hidden, live=None, split=None, causal=True):
    """What the mixer gives of all tokens, called once, or in parts with a state, which has to have the size that was planned."""
    padded = live is not None
    live = torch.ones(hidden.shape[:2], dtype=torch.bool) if live is None else live
    state, made, at = State(technique.cache_slots(LLAMA)) if split else None, [], 0
    query = value.repeat_interleave(HEADS // value.shape[1], 1)  # nothing reads queries and keys
    for q, v, alive, rows in zip(*(each.split(split or TEXT, dim) for each, dim in ((query, 2), (value, 2), (live, 1), (hidden, 1))), strict=True):
        at += q.shape[2]
        if state:
            state.update(v, v)
        made.append(technique.mix(weights, Call(q, v, v, 1.0, alive, causal, state, rows, None, padded=padded)))
        if state:
            assert state.nbytes == len(v) * technique.cache_bytes(LLAMA, 4, at)
    return torch.cat(made, 2)


def table_of(technique, weights, count, causal):
    """The number of each pair of positions, by the paper: [H, T, T]."""
    found = torch.zeros(HEADS, count, count, dtype=torch.float64)
    reach = 0 if technique.form == "simple" else technique.window or LONGEST
    for query in range(count):
        for key in range(count):
            if abs(query - key) < reach:
                column = query - key + (0 if causal else reach - 1)
                at = {"conv": (column,), "local": (query, column), "full": (query, key)}[technique.form]
                found[:, query, key] = weights["table"].double()[(slice(None), *at)]
    return found


def reference(technique, weights, value, hidden, causal=True):
    """The definition in float64: a weight for each pair and channel."""
    value = value.double().repeat_interleave(HEADS // value.shape[1], 1)
    key, gate = ((hidden.double() @ weights[name].double().T).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for name in ("key", "gate"))
    count = value.shape[2]
    scores = key[:, :, None] + table_of(technique, weights, count, causal)[..., None]  # [B, H, T, T, D]
    if causal:
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1)[..., None], -torch.inf)
    return 2 * gate.sigmoid() * (scores.softmax(3) * value[:, :, None]).sum(3)


@pytest.mark.parametrize("technique", FORMS, ids=named)
@pytest.mark.parametrize("size", [1.0, 100.0])  # keys whose exponentials no number holds
def test_mixing_is_the_definition_in_any_number_of_calls(technique, size):
    weights = trained(technique, size=size)
    expected = reference(technique, weights, *given())
    for split in SPLITS:
        assert close(mixed(technique, weights, *given(), split=split), expected, 1e-5 * max(1, size / 10)), split


@pytest.mark.parametrize("technique", FORMS, ids=named)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_encoders_see_both_sides(technique, size):
    weights = trained(technique, False, size)
    assert close(
        mixed(technique, weights, *given(causal=False), causal=False), reference(technique, weights, *given(causal=False), False), 1e-5 * max(1, size / 10)
    )


@pytest.mark.parametrize("technique", FORMS, ids=named)
def test_padding_changes_nothing_and_takes_no_position(technique):
    """In a batch of a whole text, a shorter one, and padding alone: at the left in a decoder, anywhere in an encoder."""
    for causal, splits in ((True, (None, [5, 30, 15])), (False, (None,))):
        weights, live, (value, hidden) = trained(technique, causal), torch.ones(3, TEXT, dtype=torch.bool), given(3, causal)
        live[1] = torch.arange(TEXT) >= 20 if causal else random(TEXT) > 0
        live[2] = False
        wild = torch.where(live[:, None, :, None], value, 1e4), torch.where(live[..., None], hidden, 1e2)
        for split in splits:
            made = mixed(technique, weights, *wild, live, split, causal)
            assert made.isfinite().all()
            for row in range(2):
                expected = reference(technique, weights, value[row : row + 1, :, live[row]], hidden[row : row + 1, live[row]], causal)
                assert close(made[row : row + 1, :, live[row]], expected), (causal, split, row)


@pytest.mark.parametrize("technique", FORMS, ids=named)
def test_padding_between_tokens_takes_no_place_in_the_window(technique):
    weights, (value, hidden) = trained(technique), given()
    expected = reference(technique, weights, value[:, :, :30], hidden[:, :30])
    gap = 20
    value, hidden = (torch.cat([rows[..., :10, :], rows[..., -gap:, :] + 9, rows[..., 10:30, :]], -2) for rows in (value, hidden))
    live = torch.ones(2, TEXT, dtype=torch.bool)
    live[:, 10 : 10 + gap] = False
    made = mixed(technique, weights, value, hidden, live, [10, gap, 3, 17])
    assert close(made[:, :, live[0]], expected)


@pytest.mark.parametrize("technique", FORMS, ids=named)
def test_what_comes_later_changes_nothing(technique):
    weights, (value, hidden) = trained(technique), given()
    for at in (1, 5, 17, 49):
        later = (torch.arange(TEXT) >= at).float()[:, None] * 1e3
        assert torch.equal(mixed(technique, weights, value + later, hidden + later)[:, :, :at], mixed(technique, weights, value, hidden)[:, :, :at])


@pytest.mark.parametrize("causal", [True, False])
def test_forms_are_each_other_where_tables_say_the_same(causal):
    conv, local, full, simple = (Aft(form="conv", window=LONGEST), Aft(form="local", window=LONGEST), FORMS[-1], FORMS[0])
    weights = trained(conv, causal)
    expected = mixed(conv, weights, *given(causal=causal), causal=causal)
    rows = weights["table"][:, None].expand(-1, LONGEST, -1)
    assert close(mixed(local, {**weights, "table": rows}, *given(causal=causal), causal=causal), expected)
    pairs = torch.zeros(HEADS, LONGEST, LONGEST)
    pairs[:, :TEXT, :TEXT] = table_of(conv, weights, TEXT, causal).float()
    assert close(mixed(full, {**weights, "table": pairs}, *given(causal=causal), causal=causal), expected)
    weights["table"].fill_(3.0)  # the same for all, as the window has all: that changes nothing
    flat = mixed(conv, weights, *given(causal=causal), causal=causal)
    del weights["table"]
    assert close(flat, mixed(simple, weights, *given(causal=causal), causal=causal))


@pytest.mark.parametrize("technique", FORMS[2:], ids=named)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_definition(technique, causal):
    found = []
    for form in (mixed, reference):
        weights = {name: weight.clone().requires_grad_() for name, weight in trained(technique, causal).items()}
        rows = [tensor.clone().requires_grad_() for tensor in given(causal=causal)]
        (form(technique, weights, *rows, causal=causal) * random(2, HEADS, TEXT, WIDTH, seed=7)).sum().backward()
        found.append([tensor.grad for tensor in (*weights.values(), *rows)])
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs, 1e-4)


def test_bfloat16_models_are_summed_in_float32():
    technique = FORMS[2]
    weights, rows = ({name: weight.bfloat16() for name, weight in trained(technique).items()}, [tensor.bfloat16() for tensor in given()])
    made = mixed(technique, weights, *rows)
    assert float((made - reference(technique, weights, *rows)).norm() / made.norm()) < 2**-7  # keys are bfloat16, as the model's own are
    assert torch.equal(made, mixed(technique, weights, *rows))


def test_at_first_all_weights_are_equal_and_gates_are_open():
    value, hidden = given()
    mean = value.cumsum(2) / torch.arange(1, TEXT + 1)[:, None]
    for technique in FORMS:
        assert close(mixed(technique, technique.initial_values(LLAMA, 0), value, hidden), mean.repeat_interleave(HEADS // GROUPS, 1))
    assert all(parameter.requires_grad for parameter in Mixer(FORMS[-1], LLAMA, 0).parameters())


def test_texts_longer_than_the_table_are_refused():
    for technique in (FORMS[4], FORMS[5]):
        for causal, split in ((True, None), (True, [1] * TEXT), (False, None)):
            weights = trained(technique, causal)
            weights["table"] = weights["table"][:, : TEXT - 1, : TEXT - 1]
            with pytest.raises(ValueError, match="a text has 50 tokens, and aft's tables are for 49 at most"):
                mixed(technique, weights, *given(causal=causal), split=split, causal=causal)
        live = torch.ones(2, TEXT, dtype=torch.bool)
        live[:, :2] = False  # padding does not count
        weights = trained(technique)
        weights["table"] = weights["table"][:, : TEXT - 1, : TEXT - 1]
        assert mixed(technique, weights, *given(), live, [25, 25]).isfinite().all()


def test_what_is_remembered():
    """Sums for each channel, and keys and values within the window, those of KV heads; with --form full all of them."""
    inner, kv_inner = HEADS * WIDTH, GROUPS * WIDTH
    row = 2 * (inner + kv_inner) + 1
    sizes = [[technique.cache_bytes(LLAMA, 2, count) for count in (0, 1000)] for technique in (*FORMS[:3], *FORMS[4:])]
    sums = 3 * 4 * inner
    assert sizes == [[sums] * 2, [sums] * 2, [sums + 4 * row] * 2, [sums + 18 * row + 8] * 2, [8, 8 + 1000 * row]]
    assert FORMS[-1].cache_bytes(BERT, 2, 50) == 0
    assert FORMS[-1].token_bytes(BERT, 2) == 0


def layer(inputs, weights, heads=HEADS):
    """A layer of a decoder whose activations are these: inputs [B, T, M] and weights of attention [B, H, T, T] of each batch."""
    looks = [Capture(rows, inputs={"q": rows}, weights=each) for rows, each in zip(inputs, weights, strict=True)]
    scores = sum(len(rows) * rows.shape[1] ** 2 for rows in inputs)
    return SimpleNamespace(config=LLAMA, index=0, activations=SimpleNamespace(capture=lambda *_, **__: iter(looks), scores=scores))


def causal_softmax(scores):
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def fitted(technique, inputs, weights):
    """The output of the mixer as it is fitted to attention, and what that attention gives, of the same values."""
    found = technique.fit(layer(inputs, weights), technique.initial_values(LLAMA, 0))
    assert {name: tuple(value.shape) for name, value in found.items()} == technique.parameters(LLAMA)
    value = random(len(inputs[0]), GROUPS, TEXT, WIDTH, seed=8)
    return mixed(technique, found, value, inputs[0]), weights[0] @ value.repeat_interleave(HEADS // GROUPS, 1)


def test_attention_that_depends_on_positions_alone_is_what_full_gives():
    """The exact end: whatever the pairs' scores are, and whatever the text."""
    inputs, scores = [random(2, TEXT, HIDDEN, seed=seed) for seed in range(6)], 3 * random(1, HEADS, TEXT, TEXT)
    weights = [causal_softmax(scores).expand(2, -1, -1, -1)] * 6
    ours, theirs = fitted(FORMS[-1], inputs, weights)
    assert close(ours, theirs, 1e-4)
    local = Aft(form="local", window=19)
    ours, theirs = fitted(local, inputs, weights)
    assert not close(ours, theirs, 1e-1)
    ours, theirs = fitted(local, inputs, [causal_softmax(scores.triu(-18)).expand(2, -1, -1, -1)] * 6)  # alike beyond the window
    assert close(ours, theirs, 1e-4)


@pytest.mark.parametrize("form", ["simple", "conv"])
def test_attention_that_asks_for_nothing_is_fitted(form):
    """Scores that are a linear function of the key's token, with and without a number for each distance."""
    technique, direction = (Aft(form="simple") if form == "simple" else Aft(form="conv", window=6)), random(HEADS, HIDDEN, seed=5) / HIDDEN**0.5
    stretched = 10.0 ** -torch.linspace(0, 1, HIDDEN)  # as of a model's activations: few directions are large
    inputs = [random(2, TEXT, HIDDEN, seed=seed) * stretched for seed in range(12)]
    near = random(HEADS, 6, seed=6) if form == "conv" else torch.zeros(HEADS, 1)
    bias = table_of(Aft(form="conv", window=near.shape[1]), {"table": near}, TEXT, True).float()
    weights = [causal_softmax((rows / stretched @ direction.T).mT[:, :, None] + bias) for rows in inputs]
    ours, theirs = fitted(technique, inputs, weights)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03


def test_noise_is_not_fitted():
    """Attention that is random in each text has neither keys nor positions; what is held out shows it."""
    inputs = [random(1, TEXT, HIDDEN, seed=seed) for seed in range(3)]
    weights = [causal_softmax(3 * random(1, HEADS, TEXT, TEXT, seed=10 + seed)) for seed in range(3)]
    found = FORMS[-1].fit(layer(inputs, weights), FORMS[-1].initial_values(LLAMA, 0))
    flat = (found["key"] @ inputs[1][0].T).std()
    assert flat < 0.5
    assert found["table"].abs().max() < 1.5


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_model_that_asks_for_nothing_is_what_simple_gives(kind, tmp_path, command):
    """Its queries are 0, so all keys are equal to them, and attention is the mean: no text says that there is more to gain."""
    model, source = tiny(kind), tmp_path / "flat"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "self.query" in name:
                parameter.zero_()
    text = characters(save(model, source))
    done = command("aft", "--form", "simple", source, "-o", tmp_path / "made", "--calibrate", text, "--calibration-tokens", 256, "--no-verify")
    assert done.exit_code == 0, done.output
    assert far(run(load(tmp_path / "made"), tokens()), run(model, tokens())) < 1e-4


def load(folder):
    """The converted model."""
    return model_class(FAMILIES[json.loads((folder / "config.json").read_text())["model_type"].removeprefix("effconvert_")].lm).from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--form is needed"),
        ({"form": "relative"}, "--form is 'relative'"),
        ({"form": "simple", "window": 4}, "--window belongs to --form local and conv; --form simple has none"),
        ({"form": "full", "window": 4}, "--window belongs to --form local and conv; --form full has none"),
        ({"form": "local", "window": 0}, "--window is 0"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(OptionError, match=said):
        Aft(**options)


def test_a_number_for_each_pair_has_an_end():
    with pytest.raises(OptionError, match="each pair of the 4096 tokens that it reads; it does that up to 2048, so take local or conv"):
        Aft(form="full").check(config("llama", max_position_embeddings=4096))
    for form in ("simple", "conv", "local"):
        Aft(form=form).check(config("llama", max_position_embeddings=4096))


def test_a_window_is_no_longer_than_the_text():
    Aft(form="local", window=64).check(config("llama", max_position_embeddings=64))
    with pytest.raises(OptionError, match="--window 65 is more than the 64 tokens that llama reads"):
        Aft(form="local", window=65).check(config("llama", max_position_embeddings=64))
    Aft(form="conv", window=65).check(config("llama", max_position_embeddings=64))  # which has no longest text
    Aft(form="local").check(config("llama", max_position_embeddings=32))


def test_layers_with_a_window_are_left_alone():
    alternating = config("gemma2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    assert FORMS[0].chosen(alternating) == {1, 3}
