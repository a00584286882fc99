"""Several processes train what one does: with a copy of the models in each (DDP, DeepSpeed's ZeRO), and with the weights shared out (FSDP2); on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from effconvert import processes
from effconvert.errors import OptionError
from effconvert.heal._distiller import Distiller
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
CONFIGS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED"}


def zero(stage):
    """What `accelerate launch` sets for DeepSpeed, by configs/."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "DS_ACCELERATOR": "cpu"}


def launch(place, kind, die=0, environment=None, **more):
    """Distil in two processes."""
    options = [word for name, value in {**OPTIONS, **more}.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["distill", "converted", "--teacher", "model", *options, "--no-verify", "-o", place]
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(__file__).with_name("several.py"))]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(environment or {"ACCELERATE_USE_CPU": "true"})}
    return subprocess.run([*started, kind, str(die), *command], env=variables, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_what_one_does_and_go_on_after_a_kill(fsdp):
    put(Path("model"), noise=1.0, only="weight")
    Path("text.txt").write_text(prose())
    run("model", Gqa(groups=1, pool="mean"), place="converted")
    one = run("converted", Distill(teacher="model", **OPTIONS), place="one").output
    how = ("fsdp", {"ACCELERATE_USE_CPU": "true", **FSDP}) if fsdp else ("ddp", None)
    killed = launch("two", how[0], 7, how[1])
    assert killed.returncode != 0
    assert not Path("two").exists()
    assert (Path("two.training/checkpoints/checkpoint-6") / "config.json").is_file()
    assert Path("two.training/checkpoints/checkpoint-6/optimizer.bin").is_file() == fsdp  # as accelerate calls it there
    done = launch("two", how[0], 0, how[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NOT VERIFIED") == 1
    same_training(one, Path("two"))


def same_training(one, two):
    """Hold two distillations against each other."""
    one_curve, two_curve = (json.loads((place / "effconvert.json").read_text())["distillation"]["curve"] for place in (one, two))
    for mine, theirs in zip(one_curve, two_curve, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["held_out"] == pytest.approx(theirs["held_out"], abs=1e-4)
    assert all(torch.allclose(tensor, tensors(two)[name], atol=1e-3) for name, tensor in tensors(one).items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_trains_what_one_process_does(stage):
    pytest.importorskip("deepspeed")
    put(Path("model"), noise=1.0, only="weight")
    Path("text.txt").write_text(prose())
    run("model", Gqa(groups=1, pool="mean"), place="converted")
    one = run("converted", Distill(teacher="model", **OPTIONS), place="one").output
    done = launch("two", "zero", environment=zero(stage))
    assert done.returncode == 0, done.stderr
    same_training(one, Path("two"))


def test_weights_that_zero_3_puts_away_are_refused(monkeypatch):
    put(Path("model"))
    Path("text.txt").write_text(prose())
    monkeypatch.setattr(Distiller, "zero_stage", 3)
    with pytest.raises(OptionError, match=r"tried with DeepSpeed's ZeRO-3, which puts the head's weights away between layers; use configs/zero2\.yaml"):
        run("model", Gqa(groups=1, pool="mean"), Distill(**OPTIONS))


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_configs(name):
    config = load_config_from_file(str(Path(__file__).parents[2] / "configs" / f"{name}.yaml"))  # refuses keys that it does not know
    assert config.distributed_type == CONFIGS[name]
    assert config.mixed_precision == "no"  # --precision decides
    assert config.deepspeed_config.get("zero_stage", 0) == (int(name[-1]) if name.startswith("zero") else 0)


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
