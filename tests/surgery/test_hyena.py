"""Hyena is the paper's recurrence of convolutions and gates, however it is computed, and begins as the filter that is closest to attention."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

from effconvert.errors import ModelError, OptionError
from effconvert.heal._capture import Capture
from effconvert.modeling.state import State
from effconvert.surgery.mixing import _implicit
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing._convolution import Filter, by_matrix, by_transform, convolve, mean_by_lag, sums_by_lag
from effconvert.surgery.mixing._waves import Waves
from effconvert.surgery.mixing.hyena import Hyena
from tests.mixers.mixing import SAME, far, in_pieces, pair, run, tokens
from tests.surgery.rows import GROUPS, HEADS, WIDTH, close, config, random, rows

TEXT = 150  # tokens: so many that they are transformed, and so few that parts of them are not
LLAMA, BERT = config("llama", num_key_value_heads=GROUPS, max_position_embeddings=256), config(num_key_value_heads=GROUPS, max_position_embeddings=256)
SHAPES = [{}, {"order": 4}, {"length": 20}, {"length": 1}, {"filter": "implicit"}, {"recurrence": 6}]
BOTH = [(options, causal) for options in SHAPES for causal in (True, False) if causal or "recurrence" not in options]
LEAKS = 1e-4  # a transform spreads what it rounds over all tokens


def named(options):
    return "-".join(map(str, options.values())) or "plain"


def trained(technique, of=LLAMA):
    """Parameters as training might leave them."""
    values = technique.initial_values(of, 0)
    return {name: value + 0.1 * random(*value.shape, seed=seed) for seed, (name, value) in enumerate(values.items())}


def mixed(technique, weights, query, key, value, live=None, split=None, causal=True):
    """What the mixer gives of all tokens, called once, or in parts with a state, which has to have the size that was planned."""
    padded = live is not None
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    state, made, at = State(technique.cache_slots(LLAMA)) if split else None, [], 0
    for size in split or [key.shape[2]]:
        part = slice(at, at + size)
        at += size
        q, k, v = (tensor[:, :, part] for tensor in (query, key, value))
        if state:
            state.update(k, v)
        made.append(technique.mix(weights, Call(q, k, v, 1.0, live[:, part], causal, state, q, None, padded=padded)))
        if state:
            assert state.nbytes == len(key) * technique.cache_bytes(LLAMA, 4, at)
    return torch.cat(made, 2)


def long_filters(technique, weights, count, causal):
    """All filters by lag in float64, [F, 2 T - 1] from lag 1 - T on."""
    lags = torch.arange(1 - count, count)
    if technique.filter == "implicit":
        return _implicit.taps(weights, lags).double() * (lags >= 0 if causal else 1)
    if technique.recurrence:
        waves = [
            Waves.stored({name: value.double() for name, value in weights.items()}, number, technique._rows(GROUPS, number))
            for number in range(technique.order)
        ]
        return pad(torch.cat([each.taps(count).flatten(0, 1) for each in waves]), (count - 1, 0))
    first = 0 if causal else -(weights["filters"].shape[1] // 2)
    taps = weights["filters"].double() / (1 + torch.arange(first, first + weights["filters"].shape[1]).abs())
    return torch.stack([taps[:, lag - first] if 0 <= lag - first < taps.shape[1] else torch.zeros(len(taps)).double() for lag in lags.tolist()], 1)


def reference(technique, weights, query, key, value, causal=True):
    """Definition 3.1 of the paper in float64, by matrices: z = gate * (H z), with short filters before."""
    count, shared = value.shape[2], HEADS // GROUPS
    distance = torch.arange(count)[:, None] - torch.arange(count)
    matrices = long_filters(technique, weights, count, causal)[:, distance + count - 1]  # [F, T, T]

    def short(taps, tensor):
        beside = pad(tensor.double(), (0, 0, 2, 0) if causal else (0, 0, 1, 1))
        return torch.einsum("bgtdj,gdj->bgtd", beside.unfold(2, 3, 1), taps.double())

    z = short(weights["value_taps"], value)
    for number, taps in enumerate(weights["key_taps"]):
        z = (1 + short(taps, key)) * (matrices[number * GROUPS : (number + 1) * GROUPS] @ z)
    return (1 + short(weights["query_taps"], query)) * (matrices[-HEADS:] @ z.repeat_interleave(shared, 1))


@pytest.mark.parametrize(("options", "causal"), BOTH, ids=lambda value: named(value) if isinstance(value, dict) else ["encoder", "decoder"][value])
def test_mixing_is_the_papers_recurrence_in_any_number_of_calls(options, causal):
    technique = Hyena(**options)
    weights = trained(technique, LLAMA if causal else BERT)
    expected = reference(technique, weights, *rows(TEXT), causal)
    for split in (None, [7, 1, 100, 42], [1] * TEXT) if causal else (None,):
        made = mixed(technique, weights, *rows(TEXT), split=split, causal=causal)
        assert float((made - expected).norm() / expected.norm()) < 1e-5, split


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_gates_begin_at_one_and_all_filters_but_the_last_at_one_token(options):
    technique = Hyena(**options)
    weights = technique.initial_values(LLAMA, 0)
    _, _, value = rows(TEXT)
    last = long_filters(technique, weights, TEXT, True)[-HEADS:]
    made = mixed(technique, weights, *(1e3 * tensor for tensor in rows(TEXT)[:2]), value)
    assert close(made, convolve(value, Filter(last.float(), 1 - TEXT), TEXT), 1e-5 if technique.filter == "explicit" else 1e-3)


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_padding_changes_nothing(options):
    technique = Hyena(**options)
    weights, encoding = trained(technique), trained(technique, BERT)
    live = torch.ones(2, TEXT, dtype=torch.bool)
    live[0, :20] = live[1] = False
    kept = [tensor[:1, :, 20:] for tensor in rows(TEXT)]
    wild = [torch.where(live[:, None, :, None], tensor, 1e4) for tensor in rows(TEXT)]
    for split in (None, [5, 30, 115]):
        made = mixed(technique, weights, *wild, live, split)
        assert far(made[:1, :, 20:], reference(technique, weights, *kept)) < SAME, split
        assert made.isfinite().all()
    if technique.recurrence:
        return
    live[0] = random(TEXT) > 0
    wild = [torch.where(live[:, None, :, None], tensor, 1e4) for tensor in rows(TEXT)]
    made = mixed(technique, encoding, *wild, live, causal=False)
    kept = [tensor[:1, :, live[0]] for tensor in rows(TEXT)]
    assert far(made[:1, :, live[0]], reference(technique, encoding, *kept, causal=False)) < SAME
    assert made.isfinite().all()


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_padding_between_calls_changes_no_distance(options):
    """In front of what a call adds to a text, while another text of the batch has no padding there."""
    technique, live = Hyena(**options), torch.ones(2, TEXT, dtype=torch.bool)
    live[0, 60:70] = False
    weights = trained(technique)
    made = mixed(technique, weights, *rows(TEXT), live, [60, 80, 10])
    for text, alive in enumerate(live):
        kept = [tensor[text : text + 1, :, alive] for tensor in rows(TEXT)]
        assert far(made[text : text + 1, :, alive], reference(technique, weights, *kept)) < SAME


@pytest.mark.parametrize("options", SHAPES, ids=named)
def test_no_token_sees_a_later_one(options):
    technique = Hyena(**options)
    weights, given = trained(technique), rows(TEXT)
    changed = [torch.cat([tensor[:, :, :140], 9 * tensor[:, :, 140:]], 2) for tensor in given]
    made, before = (mixed(technique, weights, *each) for each in (changed, given))
    assert far(made[:, :, :140], before[:, :, :140]) < LEAKS
    assert far(made[:, :, 140:], before[:, :, 140:]) > 0.1


def test_tokens_beyond_the_filter_do_not_count_and_are_not_kept():
    technique = Hyena(length=20)
    weights, (query, key, value) = trained(technique), rows(TEXT)
    other = value.clone()
    other[:, :, :50] = 0
    made, before = (mixed(technique, weights, query, key, rows) for rows in (other, value))
    assert far(made[:, :, 50 + 2 + 2 * 19 :], before[:, :, 50 + 2 + 2 * 19 :]) < LEAKS  # two filters, one behind the other, and the short one
    assert technique.cache_bytes(LLAMA, 4, 1) == technique.cache_bytes(LLAMA, 4, 1000) == Hyena().cache_bytes(LLAMA, 4, 19)
    assert Hyena().cache_bytes(LLAMA, 4, 300) == Hyena().cache_bytes(LLAMA, 4, 255)  # as long as a text may be


@pytest.mark.parametrize(("first", "count", "new"), [(0, 40, 150), (0, 150, 150), (0, 500, 90), (-149, 299, 150), (-10, 21, 1), (0, 20, 1)])
def test_matrix_and_transform_are_the_sum_over_lags(first, count, new):
    given, taps = random(2, GROUPS, TEXT, WIDTH, dtype=torch.float64), random(HEADS, count, dtype=torch.float64)
    expected = torch.zeros(2, HEADS, TEXT, WIDTH, dtype=torch.float64)
    for index, tap in enumerate(taps.unbind(1)):
        begin, end = max(0, first + index), min(TEXT, TEXT + first + index)
        if begin < end:
            expected[:, :, begin:end] += tap[:, None, None] * given[:, :, begin - first - index : end - first - index].repeat_interleave(2, 1)
    lags = Filter(taps, first).at(1 - new, TEXT - 1).unflatten(0, (GROUPS, -1))
    assert close(by_matrix(given, lags, new), expected[:, :, -new:], 1e-12)
    assert close(by_transform(given, lags, new, lags.shape[-1]), expected[:, :, -new:], 1e-12)
    assert close(convolve(given, Filter(taps, first), new), expected[:, :, -new:], 1e-4)


def test_a_transform_of_as_many_points_as_tokens_is_wrong():
    """The convolution would be a circular one: late tokens would come in before the first."""
    given, taps = random(1, GROUPS, 128, WIDTH, dtype=torch.float64), random(HEADS, 128, dtype=torch.float64)
    lags = Filter(taps, 0).at(-127, 127).unflatten(0, (GROUPS, -1))
    assert far(by_transform(given, lags, 128, 255), by_matrix(given, lags, 128)) < 1e-13
    circular = torch.fft.irfft(torch.fft.rfft(given.repeat_interleave(2, 1), 128, dim=2) * torch.fft.rfft(taps, 128)[..., None], 128, dim=2)
    assert far(circular, by_matrix(given, lags, 128)) > 0.1


def test_sums_by_lag():
    matrix = random(2, 6, 6, dtype=torch.float64)
    assert torch.allclose(sums_by_lag(matrix), torch.stack([matrix.diagonal(-lag, -2, -1).sum(-1) for lag in range(-5, 6)], -1))


def attention(taps, first, count, sink=0.0):
    """Attention of filters [H, n] by lag, [3, H, T, T], and what it gives to the first token."""
    at = torch.arange(count)[:, None] - torch.arange(count) - first
    weights = torch.where((at >= 0) & (at < taps.shape[1]), taps[:, at.clamp(0, taps.shape[1] - 1)], 0.0)
    weights[..., 0] += sink
    return weights.expand(3, -1, -1, -1)


@pytest.mark.parametrize(("first", "causal"), [(0, True), (-3, False)], ids=["decoder", "encoder"])
def test_attention_that_is_a_convolution_is_found_exactly(first, causal):
    taps = random(HEADS, 7).abs()
    closest = mean_by_lag([attention(taps, first, count) for count in (30, 16)], causal)
    assert close(closest.at(first, first + 6), taps, 1e-6)
    assert close(closest.at(-29, 29).sum(1), taps.sum(1), 1e-6)


def test_what_a_first_token_gets_is_no_part_of_a_decoders_filter():
    taps = random(HEADS, 7).abs()
    assert close(mean_by_lag([attention(taps, 0, 30, sink=5.0)], True).taps, pad(taps, (0, 8)), 1e-6)


@pytest.mark.parametrize("options", [{}, {"filter": "implicit"}, {"length": 4}], ids=named)
@pytest.mark.parametrize("config", [LLAMA, BERT], ids=["decoder", "encoder"])
def test_the_last_filters_are_those_of_attention(options, config):
    technique, taps = Hyena(**options), 0.5 ** torch.arange(9).sub(4).abs().float() * random(HEADS, 1).abs()
    first, reach = (0, 3) if config.decoder else (-4, 3)
    looks = [Capture(torch.zeros(0), weights=attention(taps, first, 30))]
    layer = SimpleNamespace(config=config, index=0, activations=SimpleNamespace(capture=lambda *_, **__: iter(looks)))
    found = technique.fit(layer, technique.initial_values(config, 0))
    made = long_filters(technique, found, 30, config.decoder)
    lags = range(max(first, -reach), reach + 1)
    assert close(made[-HEADS:, 29 + lags[0] : 30 + lags[-1]], taps[:, lags[0] - first : lags[-1] - first + 1], 2e-2 if technique.filter == "implicit" else 1e-6)
    assert close(made[:GROUPS], (torch.arange(-29, 30) == 0).float().expand(GROUPS, -1), 1e-3)


def test_an_implicit_filter_is_the_same_in_bfloat16_and_for_every_length():
    weights = Hyena(filter="implicit").initial_values(LLAMA, 0)
    taps = _implicit.taps(weights, torch.arange(300))
    rounded = _implicit.taps({name: value.bfloat16() for name, value in weights.items()}, torch.arange(300))
    assert far(rounded, taps) < 0.02  # what was fitted is rounded, the network is not
    assert torch.equal(_implicit.taps(weights, torch.arange(200)), taps[:, :200])


def test_gates_do_not_turn_with_the_position():
    """RoPE is undone: a text anywhere in a longer one gives the same."""
    _, model = pair("llama", ("hyena", {}))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_taps"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    expected = run(model, tokens(), position_ids=torch.arange(20)[None])
    assert far(run(model, tokens(), position_ids=torch.arange(20)[None] + 30), expected) < SAME
    assert far(in_pieces(model, tokens(), (7, 1, 12))[0], expected) < SAME


@pytest.mark.parametrize("recurrence", [None, 4])
def test_gradients_are_those_of_the_recurrence(recurrence):
    technique, found = Hyena(order=3, recurrence=recurrence), []
    for form in (mixed, reference):
        weights = {name: weight.clone().requires_grad_() for name, weight in trained(technique).items()}
        given = [tensor.clone().requires_grad_() for tensor in rows(TEXT)]
        (form(technique, weights, *given) * random(2, HEADS, TEXT, WIDTH, seed=7)).sum().backward()
        found.append([tensor.grad for tensor in (*weights.values(), *given)])
    for ours, theirs in zip(*found, strict=True):
        assert far(ours, theirs) < 1e-4


def test_a_conversion_fits_each_layer(model, command):
    done = command("hyena", model, "-o", "made", "--calibration-tokens", 256, "--length", 16, "--no-verify")
    assert done.exit_code == 0, done.output
    made = {name: tensor.float() for file in sorted(model.parent.glob("made/*.safetensors")) for name, tensor in load_file(file).items() if "filters" in name}
    filters = torch.stack([made[name] for name in sorted(made)])
    kept = json.loads((model.parent / "made/config.json").read_text())
    groups = kept["num_key_value_heads"]
    assert filters.shape == (3, groups + kept["num_attention_heads"], 16)
    assert torch.equal(filters[:, :groups], pad(torch.ones(3, groups, 1), (0, 15)))
    assert (filters[:, groups:, 0] > 0).all()  # attention is nearly flat, as the model is random
    assert len({tuple(each.flatten().tolist()) for each in filters}) == 3
    assert kept["effconvert"]["replaced"][0]["options"] == {"order": 2, "filter": "explicit", "length": 16, "recurrence": None}


@pytest.mark.parametrize(("options", "reason"), [({"order": 1}, "--order"), ({"filter": "implicit", "length": 9}, "have no end"), ({"length": 0}, "--length")])
def test_options_without_sense_are_refused(options, reason):
    with pytest.raises(OptionError, match=reason):
        Hyena(**options)


def test_a_model_that_does_not_say_how_long_a_text_may_be_needs_the_length():
    unsaid = config("llama", num_key_value_heads=GROUPS, max_position_embeddings=None)
    with pytest.raises(ModelError, match="how long a text may be"):
        Hyena().check(unsaid)
    Hyena(length=9).check(unsaid)
    with pytest.raises(OptionError, match="--length 65 is more than the 64 tokens that this model reads at most; leave it out"):
        Hyena(length=65).check(config("llama", num_key_value_heads=GROUPS, max_position_embeddings=64))
    Hyena(filter="implicit").check(unsaid)
