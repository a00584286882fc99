"""Monarch Mixer is two steps under one name: what is done, recorded and healed is these two. Its convolutions could be evaluated by Monarch factors too."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.surgery.mixing._convolution import Filter, convolve
from effconvert.surgery.mixing.hyena import Hyena
from effconvert.surgery.mixing.monarch_mixer import MonarchMixer
from effconvert.surgery.projections.monarch import Monarch
from tests.heal.healing import apart, opened, prose, put, run, tensors
from tests.mixers.mixing import SAME, far, in_pieces, positions, tokens
from tests.mixers.mixing import run as logits_of

SMALL = {"blocks": 8, "length": 12}
BOTH = [Hyena(length=12), Monarch(blocks=8)]


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def transformed(rows, inverse=False):
    """The Fourier transform of rows [..., n] in complex128 as a Monarch matrix of sqrt(n) blocks, after a transpose of the rows seen as a square."""
    blocks, turn = round(rows.shape[-1] ** 0.5), (2j if inverse else -2j) * torch.pi
    outer, middle, inner = torch.meshgrid(*[torch.arange(blocks, dtype=torch.float64)] * 3, indexing="ij")
    factors = {  # output p K + k, input s K + r: of their product p s K K turns nothing, and all else is a term of k, p, r or of r, k, s
        "left": torch.exp(turn * middle * inner / blocks),  # [k, p, r]
        "right": torch.exp(turn * middle * (inner * blocks + outer) / blocks**2),  # [r, k, s]
    }
    square = rows.to(torch.complex128).unflatten(-1, (blocks, blocks)).mT.flatten(-2)
    return Monarch(blocks=blocks).forward(factors, square, None) / (rows.shape[-1] if inverse else 1)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_a_fourier_transform_is_a_monarch_matrix(size):
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    torch.testing.assert_close(transformed(rows), torch.fft.fft(rows))
    torch.testing.assert_close(transformed(transformed(rows), inverse=True), rows)


@pytest.mark.parametrize("first", [0, -63])  # to the past, and to both sides
def test_a_convolution_by_monarch_factors_is_that_by_torch(first):
    draw = torch.Generator().manual_seed(0)
    rows, filters = torch.randn(2, 1, 64, 5, generator=draw), Filter(torch.randn(3, 64 - first, generator=draw), first)
    lags = torch.nn.functional.pad(filters.at(-63, 63).double(), (0, 129))
    spectrum = transformed(lags)[:, None] * transformed(torch.nn.functional.pad(rows.double().mT, (0, 192)))  # [B, H, D, 256]
    found = transformed(spectrum, inverse=True).real[..., 63:127].mT
    torch.testing.assert_close(convolve(rows, filters, 64), found.float(), rtol=0, atol=1e-4)


def test_what_is_done_and_recorded_is_two_steps():
    put(Path("model"))
    run("model", MonarchMixer(**SMALL))
    run("model", *BOTH, place="both")
    one, other = tensors(Path("out")), tensors(Path("both"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for file in ("config.json", "effconvert.yaml"):
        assert Path("out", file).read_text() == Path("both", file).read_text()
    done = [next(iter(step)) for step in yaml.safe_load(Path("out/effconvert.yaml").read_text())["steps"]]
    assert done == ["hyena", "monarch"] == [next(iter(step)) for step in json.loads(Path("out/effconvert.json").read_text())["recipe"]]


def test_layers_are_those_of_both_and_the_folder_is_called_after_what_was_asked(command):
    put(Path("model"))
    done = command(
        "monarch-mixer", "--blocks", "8", "--layers", "1", "--length", "12", "model", "--no-verify", "--calibrate", "text.txt", "--calibration-tokens", "512"
    )
    assert done.exit_code == 0, done.output
    kept = json.loads(Path("model-monarch-mixer-8/config.json").read_text())["effconvert"]["replaced"]
    assert {(record["technique"], record["place"], *record["layers"]) for record in kept} == {
        ("hyena", "scores", 1),
        *(("monarch", part, 1) for part in ("gate", "up", "down")),
    }


def test_healing_goes_on_both_places():
    put(Path("model"), noise=1.0)
    outcome = run("model", MonarchMixer(**SMALL), Transfer(epochs=2), Refit())
    assert [step.name for step in outcome.plan.surgeries] == ["hyena", "monarch", "transfer", "refit"]
    run("model", MonarchMixer(**SMALL), place="raw")
    raw, healed = apart("model", "raw", "out")
    assert healed < raw
    before, after = tensors(Path("raw")), tensors(Path("out"))
    changed = {name.rpartition("layers.0.")[2] for name in before if "layers.0." in name and not torch.equal(before[name], after[name])}
    assert {"self_attn.effconvert.filters", "self_attn.o_proj.weight", "mlp.down_proj.effconvert.left", "mlp.up_proj.effconvert.right"} <= changed


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoders_look_back_alone_and_a_cache_changes_nothing(kind):
    put(Path("model"), kind, noise=1.0)
    run("model", MonarchMixer(**SMALL))
    model, ids = opened(dtype=torch.float32), tokens()
    whole, other = logits_of(model, ids), ids.clone()
    other[:, 12] += 1
    assert far(logits_of(model, other)[:, :12], whole[:, :12]) < SAME
    assert far(logits_of(model, other)[:, 12:], whole[:, 12:]) > 1e-3
    assert far(in_pieces(model, ids, (7, 1, 5, 7))[0], whole) < SAME
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[:, :6] = 0
    padded = torch.cat([ids[:, :6], ids], 1)
    assert far(logits_of(model, padded, attention_mask=mask, **positions(model, mask))[:, 6:], whole) < SAME
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 24)


def test_encoders_look_to_both_sides():
    put(Path("model"), "bert", noise=1.0)
    run("model", MonarchMixer(**SMALL))
    model, ids = opened(dtype=torch.float32), tokens()
    whole, other = logits_of(model, ids), ids.clone()
    other[:, 12] += 1
    assert far(logits_of(model, other)[:, :12], whole[:, :12]) > 1e-4
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[:, 20:] = 0
    assert far(logits_of(model, torch.cat([ids, ids[:, :6]], 1), attention_mask=mask)[:, :20], whole) < SAME


def test_what_does_not_fit_is_refused():
    put(Path("model"))
    with pytest.raises(OptionError, match=r"--blocks 5 does not divide the 32 inputs and 48 outputs of gate; give 2, 4, 8, 16"):
        run("model", MonarchMixer(blocks=5))
    with pytest.raises(OptionError, match="--layers 7 names what is no layer"):
        run("model", MonarchMixer(blocks=8, layers="7"))
    with pytest.raises(OptionError, match="--length is 0"):
        MonarchMixer(blocks=8, length=0)
    with pytest.raises(OptionError, match="there is no option --order; there are --blocks, --length, --layers"):
        MonarchMixer(blocks=8, order=3)
    with pytest.raises(ValueError, match="monarch-mixer stands for other steps"):
        plan(open_checkpoint(Path("model")), (MonarchMixer(blocks=8),))
    put(Path("phi3"), "phi3")
    with pytest.raises(ModelError, match="phi3 holds gate, up in one module"):
        run("phi3", MonarchMixer(blocks=8))
    assert not Path("out").exists()
