"""bfloat16 on a CPU without instructions for it: verification runs in float32, and eval, bench and distill say what is slow."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert import verify
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.eval.quality.text import Text
from effconvert.modeling import precision
from effconvert.modeling.precision import computes
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa


@pytest.fixture(params=[True, False])
def able(request, monkeypatch):
    """Whether the CPU has the instructions."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(precision, "computes", lambda dtype: request.param or dtype == torch.float32)
    return request.param


def test_float32_takes_the_place_of_bfloat16_where_it_is_faster_and_fits(able):
    faster = torch.bfloat16 if able else torch.float32
    assert precision.type_on("cpu", torch.bfloat16, 1000) == precision.type_on(None, torch.bfloat16, 1000) == faster
    assert precision.type_on("cpu", torch.float16, 1000) == torch.float16  # whose overflow float32 would hide
    assert precision.type_on("cpu", torch.float32, 1000) == torch.float32
    assert precision.type_on("cpu", torch.bfloat16, 10**15) == torch.bfloat16  # more than there is memory
    assert precision.type_on("cuda:0", torch.bfloat16, 1000) == torch.bfloat16


def test_every_cpu_computes_in_float32_and_says_of_half_precision_whether_it_does():
    assert computes(torch.float32)
    assert {type(computes(dtype)) for dtype in (torch.bfloat16, torch.float16)} == {bool}


@pytest.mark.few(4)
@pytest.mark.parametrize(("precision", "faster", "said"), [("auto", True, True), ("auto", False, False), ("float32", True, False), ("bfloat16", True, False)])
def test_a_training_in_float32_says_that_bfloat16_is_faster(precision, faster, said, llama, command, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("effconvert.modeling.precision.multiplies_bfloat16", lambda: faster)
    options = ["--teacher", llama, "--precision", precision, "--window", 32, "--batch-tokens", 64, "--minutes", 1, "--dry-run"]
    result = command("distill", llama, *options)
    assert result.exit_code == 0
    assert ("computes faster with --precision bfloat16" in " ".join((result.output + result.stderr).split())) == said


def test_verification_says_in_which_type_it_ran(able, llama):
    outcome = convert(str(llama), (Gqa(groups=2, pool="mean"),), RunOptions(output=Path("out"), tokens=64, context=32))
    assert outcome.report.dtype == ("bfloat16" if able else "float32")


def test_verification_stays_in_bfloat16_where_float32_does_not_fit(able, llama, monkeypatch):
    conversion = plan(open_checkpoint(llama), (Gqa(groups=2, pool="mean"),))
    text = Text("text", "Three short words " * 20)
    assert verify.prepare(conversion, text, RunOptions()).dtype == (torch.bfloat16 if able else torch.float32)
    rest, token = verify._bytes(conversion, torch.bfloat16)
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: SimpleNamespace(available=rest + 64 * token, total=10**12))
    assert verify.prepare(conversion, text, RunOptions()).dtype == torch.bfloat16


@pytest.mark.few(4)
def test_what_is_slow_is_said_with_what_to_give(able, llama, command):
    slow = {
        "eval": command("eval", llama, "--tokens", 64, "--context", 32, "--passkey", ""),
        "bench": command("bench", llama, "--context", 16, "--new-tokens", 2, "--rounds", 1),
        "distill": command(
            "distill", llama, "--teacher", llama, "--precision", "bfloat16", "--window", 32, "--batch-tokens", 64, "--train-tokens", 1024, "--dry-run"
        ),
    }
    for name, result in slow.items():
        said = " ".join((result.output + result.stderr).split())
        assert result.exit_code == 0, said
        option = "--precision" if name == "distill" else "--dtype"
        assert (f"torch has no fast bfloat16 on this CPU, and reads texts several times as fast with {option} float32" in said) != able, name
    plain = command("eval", llama, "--tokens", 64, "--context", 32, "--passkey", "", "--dtype", "float32")
    assert "no fast" not in plain.output + plain.stderr
