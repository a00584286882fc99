"""Several processes train what one does: with a copy of the models in each (DDP), and with the weights shared out (FSDP2); on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effconvert import processes
from effconvert.errors import OptionError
from effconvert.heal.distill import Distill
from effconvert.surgery.attention.gqa import Gqa
from tests.heal.healing import prose, put, run, tensors

OPTIONS = {"data": "text.txt", "window": 32, "batch_tokens": 128, "train_tokens": 1280, "rate": 3e-3}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def launch(place, fsdp, die=0, **more):
    """Distil in two processes."""
    options = [word for name, value in {**OPTIONS, **more}.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["distill", "converted", "--teacher", "model", *options, "--no-verify", "-o", place]
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(__file__).with_name("several.py"))]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", **(FSDP if fsdp else {})}
    return subprocess.run([*started, str(int(fsdp)), str(die), *command], env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_what_one_does_and_go_on_after_a_kill(fsdp):
    put(Path("model"), noise=1.0, only="weight")
    Path("text.txt").write_text(prose())
    run("model", Gqa(groups=1, pool="mean"), place="converted")
    one = run("converted", Distill(teacher="model", **OPTIONS), place="one").output
    killed = launch("two", fsdp, die=7)
    assert killed.returncode != 0
    assert not Path("two").exists()
    assert (Path("two.training/checkpoints/checkpoint-6") / "config.json").is_file()
    assert Path("two.training/checkpoints/checkpoint-6/optimizer.bin").is_file() == fsdp  # as accelerate calls it there
    done = launch("two", fsdp)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NOT VERIFIED") == 1
    one_curve, two_curve = (json.loads((place / "effconvert.json").read_text())["distillation"]["curve"] for place in (one, Path("two")))
    for mine, theirs in zip(one_curve, two_curve, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["held_out"] == pytest.approx(theirs["held_out"], abs=1e-4)
    assert all(torch.allclose(tensor, tensors(Path("two"))[name], atol=1e-3) for name, tensor in tensors(one).items())


def test_only_distill_takes_several_processes(monkeypatch):
    put(Path("model"))
    Path("text.txt").write_text(prose())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="2 processes were started, and only distill uses more than one"):
        run("model", Gqa(groups=1, pool="mean"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(OptionError, match="a step has 4 windows, which 3 processes cannot share evenly; change --batch-tokens"):
        run("model", Gqa(groups=1, pool="mean"), Distill(**OPTIONS))
    with processes.alone():
        assert processes.count() == 1
