"""Filters that are sums of decaying waves: parallel and recurrent are the same, and what is made of waves is found again."""

import json
import math

import pytest
import torch

from effconvert.errors import OptionError
from effconvert.surgery.mixing._convolution import Filter, by_matrix
from effconvert.surgery.mixing._waves import Waves, fitted, recur, shapes
from effconvert.surgery.mixing.hyena import Hyena
from tests.mixers.mixing import PIECES, SAME, far, in_pieces, pair, positions, run, tokens
from tests.surgery.rows import GROUPS, HEADS, WIDTH, config, random

WAVES, TEXT, SHARED = 3, 300, HEADS // GROUPS  # more tokens than two chunks
ALL = torch.ones(1, TEXT, dtype=torch.bool)


def weights(size=1.0):
    """Parameters of one convolution as training might leave them, float64."""
    return {name: size * random(*shape, seed=seed, dtype=torch.float64) for seed, (name, shape) in enumerate(shapes(1, GROUPS, HEADS, WAVES).items())}


def waves(of):
    return Waves.stored(of, 0, slice(None))


def by_definition(of, lags):
    """The formula at the top of the module, one filter and lag at a time: [F, n]."""
    rows = []
    for index in range(len(of["own"])):
        fall, turn = (of[name][0, index // SHARED] for name in ("fall", "turn"))
        decay, angle = torch.log1p(fall.exp()), math.pi / (1 + (-turn).exp())
        later = [
            (decay * (-decay * (lag - 1)).exp() * (of["cosines"][index] * (angle * (lag - 1)).cos() + of["sines"][index] * (angle * (lag - 1)).sin())).sum()
            for lag in range(1, lags)
        ]
        rows.append(torch.stack([of["own"][index], *later]))
    return torch.stack(rows)


def in_steps(of, rows, live, sizes):
    """What the recurrence gives in calls of these sizes."""
    state, made = torch.zeros(len(rows), GROUPS, 2 * WAVES, rows.shape[-1], dtype=rows.dtype), []
    for new, alive in zip(rows.split(sizes, 2), live.split(sizes, 1), strict=True):
        out, state = recur(waves(of), new, state, alive)
        made.append(out)
    return torch.cat(made, 2)


def test_filters_are_those_of_the_formula():
    assert far(waves(weights()).taps(40).flatten(0, 1), by_definition(weights(), 40)) < 1e-14
    assert waves(weights()).taps(1).shape == (GROUPS, SHARED, 1)


@pytest.mark.parametrize("sizes", [[TEXT], [1] * TEXT, [7, 1, 150, 142]], ids=["parallel", "recurrent", "both"])
def test_parallel_and_recurrent_are_the_convolution(sizes):
    rows = random(2, GROUPS, TEXT, WIDTH, seed=9, dtype=torch.float64)
    lags = Filter(by_definition(weights(), TEXT), 0).at(1 - TEXT, TEXT - 1).unflatten(0, (GROUPS, -1))
    assert far(in_steps(weights(), rows, ALL, sizes), by_matrix(rows, lags, TEXT)) < 1e-12


def test_padding_in_front_of_a_call_lets_nothing_fade():
    rows, live = random(2, GROUPS, TEXT, WIDTH, seed=9, dtype=torch.float64), ALL.repeat(2, 1)
    live[0, 7:150] = live[0, 158:163] = live[1, :7] = False  # a call of padding alone, and of some
    rows = rows.masked_fill(~live[:, None, :, None], 0)
    made = in_steps(weights(), rows, live, [7, 1, 150, 142])
    for text, alive in enumerate(live):
        alone = in_steps(weights(), rows[text : text + 1, :, alive], ALL[:, : int(alive.sum())], [int(alive.sum())])
        assert far(made[text : text + 1, :, alive], alone) < 1e-12


def test_gradients_of_both_are_the_same():
    found = []
    for sizes in ([TEXT], [1] * TEXT):
        of = {name: value.requires_grad_() for name, value in weights().items()}
        rows = random(2, GROUPS, TEXT, WIDTH, seed=9, dtype=torch.float64).requires_grad_()
        (in_steps(of, rows, ALL, sizes) * random(2, HEADS, TEXT, WIDTH, seed=8)).sum().backward()
        found.append([tensor.grad for tensor in (*of.values(), rows)])
    for ours, theirs in zip(*found, strict=True):
        assert far(ours, theirs) < 1e-10


def test_whatever_is_stored_decays():
    taps = waves(weights(size=4.0)).taps(100_000)
    assert taps.isfinite().all()
    assert float(taps[..., -1000:].abs().max()) < 1e-6 * float(taps.abs().max())


def test_filters_made_of_waves_are_found_and_stored_in_any_type():
    made = waves(weights()).taps(200)
    found = fitted([made], WAVES)
    rounded = {name: value.bfloat16() for name, value in found.items()}
    assert {name: value.shape for name, value in found.items()} == shapes(1, GROUPS, HEADS, WAVES)
    assert error(found, made) < 1e-2  # decays and turns have eight bits
    assert error(rounded, made) < 2e-2
    assert torch.equal(rounded["fall"].float(), found["fall"])
    assert error(fitted([made], WAVES - 1), made) > 2e-2


def error(of, taps):
    return float((waves(of).taps(taps.shape[-1]) - taps).norm() / taps.norm())


def test_more_waves_come_closer():
    taps = random(GROUPS, SHARED, 200, dtype=torch.float64) / (1 + torch.arange(200))
    errors = [error(fitted([taps], count), taps) for count in (1, 4, 16, 50)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1
    assert errors[-1] < 0.1


@pytest.mark.parametrize("lags", [1, 2, 3, 4, 5])
def test_few_lags_are_enough(lags):
    taps = random(GROUPS, SHARED, lags, dtype=torch.float64)
    for target in (taps, 0 * taps):
        found = fitted([target], 4)
        assert all(value.isfinite().all() for value in found.values())
        assert float((waves(found).taps(lags) - target).norm()) < 1e-2 * (1 + float(target.norm()))


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma2", "gpt2", "phi3", "gpt_neox"))])
def test_a_model_reads_in_any_number_of_calls_with_padding_and_writes(kind, tmp_path):
    _, model = pair(kind, ("hyena", {"recurrence": 6, "order": 3}))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".effconvert." in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    ids, mask = torch.cat([tokens(length=5, seed=1), tokens()], 1), torch.ones(2, 25, dtype=torch.long)
    mask[:, :5] = 0
    where, expected = positions(model, mask), run(model, tokens())
    pieces, cache = in_pieces(model, ids, (3, *[1] * 4, 9, *[1] * 9), mask, **where)
    assert far(pieces[:, 5:], expected) < SAME
    assert far(in_pieces(model, tokens(), PIECES)[0], expected) < SAME
    assert sum(layer.nbytes for layer in cache.layers) == sum(layer.nbytes for layer in in_pieces(model, tokens(), (1,))[1].layers)
    written = model.generate(tokens(), max_length=30, do_sample=False)
    assert torch.equal(written, model.generate(tokens(), max_length=30, do_sample=False, use_cache=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path, dtype="float32"), tokens()), expected)


@pytest.mark.parametrize("heal", [[], pytest.param(["--transfer"], marks=pytest.mark.slow)], ids=["converted", "transferred"])
def test_a_conversion_says_how_far_its_filters_are_off(model, command, heal):
    done = command("hyena", model, "-o", "waves", "--recurrence", 4, *heal, "--calibration-tokens", 256, "--no-verify")
    assert done.exit_code == 0, done.output
    assert "filters: how far sums of waves are" in " ".join(done.output.split())
    manifest, kept = (json.loads((model.parent / "waves" / name).read_text()) for name in ("effconvert.json", "config.json"))
    assert list(manifest["layer_errors"]) == ["0", "1", "2"]
    for said in manifest["layer_errors"].values():
        assert list(said) == ["filters", *(["before", "after"] if heal else [])]
        assert 0 < said["filters"] < 0.3
        assert not heal or said["after"] <= said["before"]
    assert kept["effconvert"]["replaced"][0]["options"]["recurrence"] == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recurrence": 5}, "give 6"),
        ({"recurrence": 0}, "--recurrence"),
        ({"recurrence": 4, "length": 9}, "have no end"),
        ({"recurrence": 4, "filter": "implicit"}, "makes waves of explicit"),
    ],
)
def test_options_without_sense_are_refused(options, reason):
    with pytest.raises(OptionError, match=reason):
        Hyena(**options)


def test_encoders_have_no_recurrence_and_decoders_need_no_length():
    with pytest.raises(OptionError, match="bert is an encoder, which sees later tokens too"):
        Hyena(recurrence=4).check(config("bert"))
    Hyena(recurrence=4).check(config("llama", num_key_value_heads=GROUPS, max_position_embeddings=None))
