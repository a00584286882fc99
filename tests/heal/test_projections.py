"""Hidden states of a student and a teacher of another width."""

import json
from pathlib import Path

import pytest
import torch

from effconvert.errors import ModelError
from effconvert.heal import _distilling
from effconvert.heal._projections import Projections
from effconvert.heal.distill import Distill
from tests.heal.healing import opened, prose, put, run, stopped_at, tensors

SHORT = {"data": "text.txt", "window": 32, "batch_tokens": 128, "train_tokens": 2560, "rate": 3e-3, "hidden": 0.5, "teacher": "teacher"}


@pytest.fixture(autouse=True)
def _models():
    Path("text.txt").write_text(prose())
    put(Path("model"), noise=1.0, only="weight", num_hidden_layers=2)
    put(Path("teacher"), noise=1.0, only="weight", num_hidden_layers=4, hidden_size=96)


def test_maps_are_fitted_by_least_squares():
    draw = torch.Generator().manual_seed(0)
    own, theirs = [torch.randn(200, 8, generator=draw) for _ in range(2)], [torch.randn(200, 12, generator=draw) for _ in range(2)]
    maps = Projections([(8, 12), (8, 12)])
    maps.fit(own, theirs)
    for found, mine, other in zip(maps.project(own), own, theirs, strict=True):
        torch.testing.assert_close(found, mine @ torch.linalg.lstsq(mine, other).solution, atol=5e-3, rtol=0)


def test_a_student_learns_from_a_wider_teacher_and_stays_a_plain_model():
    run("model", Distill(**SHORT))
    told = json.loads(Path("out/effconvert.json").read_text())["distillation"]
    assert told["after"] < 0.9 * told["before"]
    assert {file.name for file in Path("out").glob("*.safetensors")} == {"model.safetensors"}
    assert tensors(Path("out")).keys() == tensors(Path("model")).keys()
    opened("out")


def test_their_gradients_are_of_one_step(monkeypatch):
    seen = []
    real = _distilling.Distiller.training_step

    def watched(self, *given, **more):
        seen.append(any(parameter.grad is not None and parameter.grad.any() for parameter in self.projections.parameters()))
        return real(self, *given, **more)

    monkeypatch.setattr(_distilling.Distiller, "training_step", watched)
    run("model", Distill(**SHORT))
    assert len(seen) == 20
    assert not any(seen)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(monkeypatch):
    run("model", Distill(**SHORT), place="whole")
    stopped_at(monkeypatch, 11, lambda: run("model", Distill(**SHORT)))
    run("model", Distill(**SHORT))
    whole = tensors(Path("whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(Path("out")).items())


def test_weights_of_another_width_are_not_the_same():
    with pytest.raises(ModelError, match="the teacher is 96 wide and the student 32"):
        run("model", Distill(**SHORT, unchanged_rate=0.5))
