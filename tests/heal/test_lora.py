"""Adapters beside weights that both models have: what they add, what is written, what is in memory, and what a stopped run does."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.plan import plan
from effconvert.convert.train import training_bytes
from effconvert.errors import ModelError, OptionError
from effconvert.heal import _distilling
from effconvert.heal._lora import NAMES, Adapters
from effconvert.heal.distill import Distill
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from tests.heal.healing import opened, put, run, stopped_at, tensors
from tests.models import save, tiny

SHORT = {"data": "text.txt", "window": 32, "batch_tokens": 128, "train_tokens": 5120, "rate": 1e-3, "lora": 4}
IDS = torch.arange(6, 30).reshape(2, 12)


def adapted(kind, rank=3):
    """A model in float64 with adapters that change something, and their names."""
    model = tiny(kind).double().eval()
    adapters = Adapters(model, [name for name, _ in model.named_parameters()], rank)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(NAMES[1]):
                parameter += torch.randn(parameter.shape, generator=draw, dtype=torch.double) / 10
    return model, adapters


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])  # gpt2 stores matrices [in, out]
def test_merged_weights_compute_what_the_adapters_do_and_have_their_gradient(kind):
    model, adapters = adapted(kind)
    assert any("mlp" in name or "output.dense" in name for name in adapters.weights)
    expected = model(input_ids=IDS).logits
    plain = tiny(kind).double().eval()
    plain.load_state_dict(adapters.merged())
    found = plain(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(tiny(kind).double().eval()(input_ids=IDS).logits, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, module in adapters.weights.items():
        gradient = plain.get_parameter(name).grad
        gradient = gradient if isinstance(module, nn.Linear) else gradient.T
        torch.testing.assert_close(module.lora_A.grad, 2 * module.lora_B.T @ gradient)
        torch.testing.assert_close(module.lora_B.grad, 2 * gradient @ module.lora_A.T)


@pytest.mark.parametrize("steps", [(Gqa(groups=1, pool="mean"),), (PruneLayers(layers="1"),)])
def test_it_closes_a_part_of_the_gap_and_writes_a_plain_model(steps):
    put(Path("model"), noise=1.0, only="weight", num_hidden_layers=3)
    run("model", *steps, Distill(**SHORT))
    told = json.loads(Path("out/effconvert.json").read_text())["distillation"]
    assert told["after"] < 0.97 * told["before"]
    assert not [name for name in tensors(Path("out")) if "lora" in name]
    opened("out")


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT), place="whole")
    stopped_at(monkeypatch, 22, lambda: run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT), place="resumed"))
    opened("resumed.training/checkpoints/checkpoint-20")  # a plain model
    run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT), place="resumed")
    whole, resumed = tensors(Path("whole")), tensors(Path("resumed"))
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)


def test_weights_that_stay_are_in_memory_once_and_are_the_original_s(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    seen = []
    real = _distilling.share
    monkeypatch.setattr(_distilling, "share", lambda student, teacher, same: (real(student, teacher, same), seen.append((student, teacher))))
    run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT))
    ((student, teacher),) = seen
    distinct = {parameter.data_ptr(): parameter.numel() for model in (student, teacher) for parameter in model.parameters()}
    own = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    pooled = sum(parameter.numel() for name, parameter in teacher.named_parameters() if ".k_proj." in name or ".v_proj." in name)
    kept = sum(parameter.numel() for parameter in student.parameters() if not parameter.requires_grad)
    assert sum(distinct.values()) == own + kept + pooled
    stored = tensors(Path("model"))
    assert all(torch.equal(parameter, stored[name]) for name, parameter in teacher.named_parameters() if name in stored)  # training left them alone


def test_less_memory_is_planned_where_less_is_trained():
    checkpoint = open_checkpoint(save(tiny("llama", num_hidden_layers=6), Path("model")))
    steps = [(Gqa(groups=1, pool="mean"), Distill(**{**SHORT, "lora": rank})) for rank in (0, 1, 4)]
    whole, few, more = (training_bytes(plan(checkpoint, chosen)) for chosen in steps)
    assert few < more < whole


def test_what_adapters_cannot_do_is_refused(monkeypatch):
    put(Path("model"))
    with pytest.raises(OptionError, match="--lora keeps the weights that are as in the original, and --unchanged-rate says"):
        Distill(lora=4, unchanged_rate=0.5)
    with pytest.raises(OptionError, match="--lora needs the original's weights, which --cache-teacher does not keep"):
        Distill(lora=4, cache_teacher=Path("kept"))
    model = tiny("llama")
    with pytest.raises(ModelError, match="no matrix of a linear layer is as in the original, so --lora has none"):
        Adapters(model, ["model.norm.weight", "model.embed_tokens.weight"], 4)
    monkeypatch.setattr("effconvert.heal._distiller.Distiller.shares_weights_out", True)
    with pytest.raises(OptionError, match=r"--lora works in one process, or with configs/ddp\.yaml"):
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT))
