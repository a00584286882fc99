"""Several processes train what one does: with a copy of the models in each (DDP, DeepSpeed's ZeRO), and with the weights shared out (FSDP2); on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
PUT_AWAY = {  # as configs/zero3.yaml, but for weights as small as those of a tiny model, which ZeRO-3 would keep in every process
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}
CONFIGS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def environment(kind):
    """What `accelerate launch` sets by configs/."""
    if not kind.startswith("zero"):
        return {"ACCELERATE_USE_CPU": "true", **(FSDP if kind == "fsdp" else {})}
    Path("zero3.json").write_text(json.dumps(PUT_AWAY))
    how = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero3.json"} if kind == "zero3" else {"ACCELERATE_DEEPSPEED_ZERO_STAGE": kind[-1]}
    return {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", **how}


def launch(place, kind, die=0):
    """Distil in two processes."""
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["distill", "converted", "--teacher", "model", *options, "-o", place]
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(__file__).with_name("several.py"))]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment(kind)}
    return subprocess.run([*started, kind, str(die), *command], env=variables, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_two_processes_train_what_one_does_and_go_on_after_a_kill(kind):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    put(Path("model"), noise=1.0, only="weight")
    Path("text.txt").write_text(prose())
    run("model", Gqa(groups=1, pool="mean"), place="converted")
    one = run("converted", Distill(teacher="model", **OPTIONS), place="one").output
    killed = launch("two", kind, 7)
    assert killed.returncode != 0
    assert not Path("two").exists()
    checkpoint = Path("two.training/checkpoints/checkpoint-6")
    assert (checkpoint / "config.json").is_file()
    assert (checkpoint / "optimizer.bin").is_file() == (kind == "fsdp")  # as accelerate calls it there
    assert len([*checkpoint.glob("global_step6/*model_states.pt")]) == {"zero1": 1, "zero2": 1, "zero3": 2}.get(kind, 0)  # a file for each share of the weights
    done = launch("two", kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verified, and written to two") == 1
    same_training(one, Path("two"))


def same_training(one, two):
    """Hold two distillations against each other."""
    one_curve, two_curve = (json.loads((place / "effconvert.json").read_text())["distillation"]["curve"] for place in (one, two))
    for mine, theirs in zip(one_curve, two_curve, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["held_out"] == pytest.approx(theirs["held_out"], abs=1e-4)
    assert all(torch.allclose(tensor, tensors(two)[name], atol=1e-3) for name, tensor in tensors(one).items())


def test_zero_3_that_does_not_gather_the_weights_of_checkpoints_is_refused(monkeypatch):
    put(Path("model"))
    Path("text.txt").write_text(prose())
    monkeypatch.setattr(Distiller, "zero", SimpleNamespace(zero_stage=3, zero3_save_16bit_model=False))
    with pytest.raises(OptionError, match=r"gathered only on request, and distill needs them; set zero3_save_16bit_model: true, as configs/zero3\.yaml"):
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
