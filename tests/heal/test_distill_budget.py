"""Distillation for some minutes, with scores on the way, of a student that is made first; and what the plan says of its time."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from effconvert.convert.scores import unchanged_chance
from effconvert.errors import ModelError, OptionError
from effconvert.heal._deadline import rate
from effconvert.heal._distiller import Distiller
from effconvert.heal.distill import Distill
from effconvert.quantities import duration
from effconvert.surgery.attention.gqa import Gqa
from tests.eval.evaluating import choices
from tests.heal.healing import letters, prose, put, run, stopped_at, tensors

QUICK = {"data": "text.txt", "window": 32, "batch_tokens": 128, "rate": 3e-3}
POOLED = Gqa(groups=1, pool="mean")


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def curve(place="out"):
    return json.loads(Path(place, "effconvert.json").read_text())["distillation"]["curve"]


@pytest.fixture
def steady(monkeypatch):
    """A little more than three seconds a step, whatever the machine does."""
    monkeypatch.setattr(Distiller, "seconds", property(lambda self: 3.01 * self.state.global_step))


def test_minutes_end_a_training_and_measure_it_at_each_tenth(steady):
    put(Path("model"), noise=1.0, only="weight")
    run("model", POOLED, Distill(**QUICK, minutes=1.0))
    assert [point["tokens"] for point in curve()] == [128 * step for step in range(0, 21, 2)]
    assert curve()[-1]["held_out"] < curve()[0]["held_out"]


def test_measurements_are_fewer_where_they_would_take_much_of_the_time(steady, monkeypatch):
    """A fifth of it at most, with two after the first; and the same ones in a run that goes on."""
    monkeypatch.setattr(Distiller, "measured", lambda self: 0.05)  # of the minute
    monkeypatch.setattr(Distiller, "seconds", property(lambda self: 2.9 + 3.01 * self.state.global_step))
    put(Path("model"), noise=1.0, only="weight")
    run("model", POOLED, Distill(**QUICK, minutes=1.0), place="whole")
    assert [point["tokens"] // 128 for point in curve("whole")] == [0, 5, 10, 14, 19]
    stopped_at(monkeypatch, 11, lambda: run("model", POOLED, Distill(**QUICK, minutes=1.0)))
    run("model", POOLED, Distill(**QUICK, minutes=1.0))
    assert curve() == curve("whole")
    for before, steps in ((45.0, [0, 5]), (70.0, [0, 1])):  # also where the first measurement ends after the minute
        monkeypatch.setattr(Distiller, "measured", lambda self, before=before: before / 60)
        monkeypatch.setattr(Distiller, "seconds", property(lambda self, before=before: before + 3.01 * self.state.global_step))
        run("model", POOLED, Distill(**QUICK, minutes=1.0), place=f"after-{before}")
        assert [point["tokens"] // 128 for point in curve(f"after-{before}")] == steps


def test_tokens_end_it_where_they_are_fewer(steady):
    put(Path("model"), noise=1.0, only="weight")
    outcome = run("model", POOLED, Distill(**QUICK, minutes=1.0, train_tokens=1024))
    assert curve()[-1]["tokens"] == 1024
    assert "trains for 8 steps of 128 tokens, or for 60 seconds if they end first" in " ".join(outcome.plan.notes)


def test_a_run_with_minutes_goes_on_where_it_was_stopped(steady, monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    stopped_at(monkeypatch, 13, lambda: run("model", POOLED, Distill(**QUICK, minutes=1.0)))
    run("model", POOLED, Distill(**QUICK, minutes=1.0))
    run("model", POOLED, Distill(**QUICK, minutes=1.0), place="whole")
    assert [point["tokens"] for point in curve()] == [point["tokens"] for point in curve("whole")]
    whole = tensors(Path("whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(Path("out")).items())


def test_the_rate_rises_and_falls_with_the_time():
    assert [rate(progress, 0.1) for progress in (0.0, 0.05, 0.1, 0.55, 1.0, 1.5)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_scores_stand_in_the_curve_and_change_nothing():
    put(Path("model"), noise=1.0, only="weight", max_position_embeddings=1024)
    tokenizer = letters()
    tokenizer.eos_token = "</s>"  # before which lm-eval's tasks begin
    tokenizer.save_pretrained("model")
    choices(Path("tasks"), count=4)
    given = {**QUICK, "train_tokens": 1024}
    run("model", POOLED, Distill(**given, tasks="pick", include_path="tasks", limit=2, passkey=(512,)))
    run("model", POOLED, Distill(**given), place="plain")
    assert all({"passkey 512", "pick acc", "pick acc_norm"} <= point["scores"].keys() for point in curve())
    assert all(0 <= value <= 1 for point in curve() for value in point["scores"].values())
    plain = tensors(Path("plain"))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors(Path("out")).items())
    assert "| pick acc |" in Path("out/README.md").read_text()
    assert "include-path: ../tasks\n" in Path("out/effconvert.yaml").read_text()


def test_random_numbers_are_as_they_were_after_scores():
    def seed(number):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)

    seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    seed(1)
    with unchanged_chance():
        seed(7)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_a_student_is_made_first():
    put(Path("model"), noise=1.0, only="weight", num_hidden_layers=4)
    outcome = run("model", Distill(**QUICK, student_layers=2, student_ffn=16), dry_run=True)
    assert [step.name for step in outcome.plan.surgeries] == ["prune-layers", "narrow", "refit", "distill"]
    assert (outcome.plan.config.layers, outcome.plan.config.ffn) == (2, 16)


def test_the_plan_says_how_long_it_takes_after_a_few_steps():
    put(Path("model"), noise=1.0, only="weight")
    before = {path.name for path in Path().iterdir()}
    outcome = run("model", POOLED, Distill(**QUICK, unchanged_rate=0.0), dry_run=True)
    assert "here, from a few of its steps, with the original in the place of the model" in " ".join(outcome.plan.remarks)
    assert {path.name for path in Path().iterdir()} == before
    assert [duration(seconds) for seconds in (0.2, 80, 100, 4000, 9000, 2e5)] == [
        "1 second",
        "80 seconds",
        "1.7 minutes",
        "67 minutes",
        "2.5 hours",
        "2.3 days",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"limit": 3}, OptionError, "--limit is for lm-eval's tasks, and none is named"),
        ({"cache_kind": "topk"}, OptionError, "--cache-kind does nothing without --cache-teacher"),
        ({"cache_size": 16}, OptionError, "--cache-size does nothing without --cache-teacher"),
        ({"minutes": 1, "cache_teacher": "cache"}, OptionError, "--minutes alone does not say how many; give --train-tokens"),
        ({"student_layers": 2, "teacher": "model"}, OptionError, "is made of MODEL, which is its teacher; leave --teacher out"),
        ({"student_layers": 3}, OptionError, "--student-layers 3 is not fewer than the 3 layers of the model"),
        ({"tasks": "none", "include_path": "absent"}, OptionError, "--include-path absent is no folder"),
        ({"passkey": 64, "teacher": "model"}, OptionError, "--passkey 64 is too short: the question alone takes"),
        ({"passkey": 4096, "teacher": "model"}, OptionError, "--passkey 4096 is more than the 1024 tokens that the model reads"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, error, message):
    put(Path("model"), num_hidden_layers=3, max_position_embeddings=1024)
    with pytest.raises(error, match=message):
        run("model", Distill(**{"teacher": None if "student_layers" in options else "model", **QUICK, **options}))
    assert not Path("out.training").exists()


def test_a_student_in_a_recipe_is_made_by_the_steps_before():
    put(Path("model"), num_hidden_layers=3)
    with pytest.raises(OptionError, match="put prune-layers, narrow and refit before distill instead"):
        run("model", POOLED, Distill(**QUICK, student_layers=2))


def test_scores_are_for_models_that_predict_the_next_token():
    put(Path("model"), "bert")
    with pytest.raises((OptionError, ModelError), match="--tasks and --passkey are for models that predict the next token"):
        run("model", POOLED, Distill(**QUICK, passkey=(256,)))
