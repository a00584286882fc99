"""Training towards a teacher's predictions: the loss and its gradients, what is kept, and what a stopped run does."""

import gc
import json
import shutil
import weakref
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers.processors import TemplateProcessing

from effconvert.checkpoint import sources
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.cli import main
from effconvert.convert import train as training
from effconvert.convert import training_text
from effconvert.convert.plan import plan
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.heal import _distiller, _distilling
from effconvert.heal._hidden import distance, hidden_states
from effconvert.heal._in_pieces import ROWS
from effconvert.heal._objective import Head, Objective, head_of
from effconvert.heal._windows import UNLABELLED, held_out, masked, repeating
from effconvert.heal.distill import Distill
from effconvert.heal.refit import Refit
from effconvert.kernels._kinds import KINDS
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.depth.share_layers import ShareLayers
from effconvert.surgery.embedding.factor_embed import FactorEmbed
from effconvert.surgery.ffn.moe_split import MoeSplit
from effconvert.surgery.mixing.linear import Linear
from tests.heal.healing import letters, opened, prose, put, run, stopped_at, tensors
from tests.models import DECODERS, heed_caps, save, tiny

SHORT = {"data": "text.txt", "window": 32, "batch_tokens": 128, "train_tokens": 5120, "rate": 3e-3}


THREE = {"distilbert": {"n_layers": 3}, "modernbert": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}}  # layers


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def stopped(monkeypatch, *steps, place="out"):
    """Begin a distillation, and stop it as Ctrl-C does, two steps after a checkpoint."""
    stopped_at(monkeypatch, 22, lambda: run("model", *steps, Distill(**SHORT), place=place))


def rows(count=ROWS + 40, width=12, vocabulary=50):
    draw = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(count, width, generator=draw, dtype=torch.double) for _ in range(2))
    heads = [torch.randn(vocabulary, width, generator=draw, dtype=torch.double) / 2 for _ in range(2)]
    return hidden, theirs, heads, torch.randint(vocabulary, (count,), generator=draw)


def matrix(weights):
    return Head(lambda part: part @ weights.T, lambda: [weights])


def written_out(objective, student, teacher, labels):
    """The loss by its definition, on all logits at once."""
    p, q = ((logits / objective.temperature).softmax(-1) for logits in (teacher, student))
    m = (p + q) / 2
    divergence = {
        "kl": (p * (p / q).log()).sum(-1),
        "reverse-kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
    }[objective.kind]
    likely = -student.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return ((1 - objective.ce) * objective.temperature**2 * divergence + objective.ce * likely).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "ce"), [(1.0, 0.0), (2.0, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("again", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(kind, temperature, ce, again):
    hidden, theirs, (weights, their_weights), labels = rows()
    objective, results = Objective(kind, temperature, ce, again), []
    for loss in (
        lambda h, w: objective(h, matrix(w), theirs, matrix(their_weights), labels),
        lambda h, w: written_out(objective, h @ w.T, theirs @ their_weights.T, labels),
    ):
        given = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        value = loss(*given)
        value.backward()
        results.append((value.detach(), *(tensor.grad for tensor in given)))
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).abs().max() <= 2e-5 * expected.abs().max()  # logits are compared in float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(kind):
    hidden, _, (weights, _), labels = rows()
    hidden = hidden.float().requires_grad_()
    head = matrix(weights.float())
    loss = Objective(kind, 1.5)(hidden, head, hidden.detach(), head, labels)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad.abs().max() < 1e-7


def test_rows_of_padding_in_a_vocabulary_change_nothing():
    hidden, theirs, (weights, their_weights), labels = rows()
    padded = torch.cat([their_weights, torch.randn(14, 12).double()])
    losses = [Objective()(hidden, matrix(weights), theirs, matrix(w), labels) for w in (their_weights, padded)]
    assert torch.equal(*losses)


def test_a_model_without_a_head_keeps_no_cache_while_it_is_trained(monkeypatch):
    asked, model = [], tiny("llama").model
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", wraps(forward)(lambda *given, **more: asked.append(more["use_cache"]) or forward(*given, **more)))
    _distiller._route(model)
    hidden_states(model, {"input_ids": torch.arange(3, 20)[None]}, ())
    assert asked == [False]


@pytest.mark.parametrize("kind", DECODERS)
def test_the_head_of_every_family_is_known(kind):
    model = heed_caps(tiny(kind).eval())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = head_of(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    torch.testing.assert_close(found, expected)


def pieces_have_the_gradients_of(model):
    """Hold the gradients that pieces give to those of autograd, parameter by parameter."""
    ids, found = torch.arange(3, 20)[None], []
    for again in (False, True):
        model.zero_grad()
        head, hidden = head_of(model), model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        Objective(again=again)(hidden, head, hidden.detach().roll(1, -1), head, ids[0]).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_pieces_give_gradients_to_all_that_a_head_depends_on(kind):
    pieces_have_the_gradients_of(heed_caps(tiny(kind).eval()))


@pytest.mark.parametrize("tied", [False, True])
def test_also_where_a_head_is_lent_the_factors_of_an_embedding(tied):
    put(Path("model"), tie_word_embeddings=tied)
    run("model", FactorEmbed(rank=8, blocks=1))
    pieces_have_the_gradients_of(opened("out", dtype=torch.float32))


def test_no_logits_of_all_tokens_are_in_memory(monkeypatch):
    hidden, theirs, (weights, their_weights), labels = rows(4 * ROWS)
    seen, alive = [], []

    def watched(weights):
        def logits(part):
            gc.collect()
            seen.append((len(part), sum(found() is not None for found in alive)))
            alive.append(weakref.ref(result := part @ weights.T))
            return result

        return Head(logits, lambda: [weights])

    Objective()(hidden.requires_grad_(), watched(weights.requires_grad_()), theirs, watched(their_weights), labels).backward()
    assert [count for count, _ in seen] == [ROWS] * 8  # of both models once for each piece: none is computed again for the gradients
    assert max(before for _, before in seen) <= 1  # of the piece at work


def test_nothing_is_kept_for_gradients_where_there_are_none(monkeypatch):
    hidden, theirs, (weights, their_weights), labels = rows()
    with torch.no_grad():
        loss = Objective()(hidden.requires_grad_(), matrix(weights.requires_grad_()), theirs, matrix(their_weights), labels)
    assert not loss.requires_grad
    expected = Objective()(hidden, matrix(weights), theirs, matrix(their_weights), labels)
    assert torch.equal(loss, expected.detach())


def test_held_out_windows_are_from_all_over():
    chosen = held_out(200).nonzero()[:, 0]
    assert len(chosen) == 12
    assert chosen.max() > 180
    assert chosen.min() < 20


@pytest.mark.few(4)
@pytest.mark.parametrize("steps", [(Gqa(groups=1, pool="mean"),), (Linear(),), (MoeSplit(experts=4, active=2),), (Gqa(groups=1), Refit())])
def test_it_closes_a_part_of_the_gap_and_says_how_much(steps):
    put(Path("model"), attention_bias=False, mlp_bias=False, noise=1.0, only="weight")
    outcome = run("model", *steps, Distill(**SHORT))
    told = json.loads(Path("out/effconvert.json").read_text())["distillation"]
    assert told["after"] < 0.97 * told["before"]
    assert told["measure"] == "kl"
    assert {key: told["curve"][0][key] for key in ("tokens", "held_out")} == {"tokens": 0, "held_out": told["before"]}
    assert all(0 < point["loss"] < 9 for point in told["curve"][1:])
    seconds = [point["seconds"] for point in told["curve"]]
    assert seconds == sorted(seconds)
    assert told["curve"][-1]["tokens"] == 5120
    assert not Path("out.training").exists()
    assert [*outcome.plan.recipe[-1]] == ["distill"]
    before = run("model", *steps, place="before")
    assert {name: tensor.shape for name, tensor in tensors(Path("out")).items()} == {name: tensor.shape for name, tensor in tensors(before.output).items()}


def test_a_converted_model_is_distilled_later():
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=1), place="converted")
    run("converted", Distill(teacher="model", **SHORT), place="later")
    run("model", Gqa(groups=1), Distill(**SHORT), place="at-once")
    later, at_once = (json.loads(Path(place, "effconvert.json").read_text())["distillation"] for place in ("later", "at-once"))
    assert [point["held_out"] for point in later["curve"]] == [point["held_out"] for point in at_once["curve"]]
    assert all(torch.equal(tensor, tensors(Path("at-once"))[name]) for name, tensor in tensors(Path("later")).items())


def test_a_model_that_training_makes_worse_stays_as_it_is():
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=2), place="converted")
    run("converted", Distill(teacher="model", **{**SHORT, "rate": 1.0}), place="out")
    told = json.loads(Path("out/effconvert.json").read_text())["distillation"]
    assert told["after"] == told["before"]
    before, after = tensors(Path("converted")), tensors(Path("out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("steps", [(Gqa(groups=1),), (MoeSplit(experts=4, active=2),)])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(steps, monkeypatch):
    put(Path("model"), attention_bias=False, mlp_bias=False, noise=1.0, only="weight")
    run("model", *steps, Distill(**SHORT), place="whole")
    stopped(monkeypatch, *steps, place="resumed")
    assert not Path("resumed").exists()
    assert (Path("resumed.training/checkpoints/checkpoint-20") / "config.json").is_file()
    run("model", *steps, Distill(**SHORT), place="resumed")
    whole, resumed = tensors(Path("whole")), tensors(Path("resumed"))
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)
    curves = [json.loads(Path(place, "effconvert.json").read_text())["distillation"]["curve"] for place in ("whole", "resumed")]
    assert [point["tokens"] for point in curves[0]] == sorted({point["tokens"] for point in curves[1]})


def test_a_checkpoint_on_the_way_is_measured_as_any_model(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    Path("model/additional_chat_templates").mkdir()
    Path("model/additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    stopped(monkeypatch, Linear(), place="out")
    checkpoint = Path("out.training/checkpoints/checkpoint-20")
    for name in ("tokenizer.json", "additional_chat_templates/tools.jinja"):
        assert (checkpoint / name).read_bytes() == Path("model", name).read_bytes()
    measured = CliRunner().invoke(main, ["eval", str(checkpoint), "--text", "text.txt", "--tokens", "128", "--context", "32"])
    assert measured.exit_code == 0, measured.output
    assert "perplexity" in measured.output


def test_a_run_that_was_stopped_behind_its_last_step_does_no_more(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=1), Distill(**SHORT), place="whole")
    with monkeypatch.context() as patched:
        patched.setattr("effconvert.heal._distilling.points", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("model", Gqa(groups=1), Distill(**SHORT), place="resumed")
    assert (Path("resumed.training/checkpoints/checkpoint-40") / "config.json").is_file()
    shutil.move("resumed.training", "moved.training")
    run("model", Gqa(groups=1), Distill(**SHORT), place="moved")
    whole, resumed = tensors(Path("whole")), tensors(Path("moved"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    curves = [json.loads(Path(place, "effconvert.json").read_text())["distillation"]["curve"] for place in ("whole", "moved")]
    assert [(point["tokens"], point["held_out"]) for point in curves[0]] == [(point["tokens"], point["held_out"]) for point in curves[1]]


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_checkpoint_that_a_kill_left_unfinished_is_left_out(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=1), Distill(**SHORT), place="whole")
    stopped(monkeypatch, Gqa(groups=1), place="resumed")
    checkpoints = sorted(Path("resumed.training/checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    weights = checkpoints[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run("model", Gqa(groups=1), Distill(**SHORT), place="resumed")
    whole, resumed = tensors(Path("whole")), tensors(Path("resumed"))
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)


def test_the_original_sees_each_held_out_window_once(monkeypatch):
    asked, teachers = [], _distiller.Distiller.teachers
    monkeypatch.setattr(_distiller.Distiller, "teachers", lambda self, inputs: (asked.append(self.model.training), teachers(self, inputs))[1])
    monkeypatch.setattr(_distiller.Distiller, "check", lambda *_: None)
    put(Path("model"), noise=1.0, only="weight")

    def curve(place):
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT), place=place)
        return [point["held_out"] for point in json.loads(Path(place, "effconvert.json").read_text())["distillation"]["curve"]]

    kept, once = curve("out"), asked.count(False)
    monkeypatch.setattr(_distiller, "MOST_KEPT", 0)
    assert curve("again") == kept
    assert asked.count(False) - once == len(kept) * once


def test_a_model_of_the_hub_is_converted_and_distilled_at_its_revision(monkeypatch):
    """The steps before the distillation are a conversion of their own, of the folder that was fetched."""
    snapshot, asked = put(Path("hub/models--lab--tiny/snapshots", "a" * 40), noise=1.0, only="weight"), []
    monkeypatch.setattr(sources, "fetch", lambda model, revision, to_convert: asked.append((model, revision)) or snapshot)
    run("lab/tiny", Gqa(groups=1, pool="mean"), Distill(**SHORT), revision="v1")
    assert asked == [("lab/tiny", "v1")]
    assert f"revision: {'a' * 40}" in Path("out/effconvert.yaml").read_text()


def test_a_checkpoint_of_a_run_is_not_trained_into_the_output_of_that_run(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    stopped(monkeypatch, Gqa(groups=1, pool="mean"))
    checkpoint = next(Path("out.training/checkpoints").glob("checkpoint-*"))
    before = tensors(checkpoint)
    for student, teacher in ((checkpoint, "model"), ("model", str(checkpoint))):
        with pytest.raises(OptionError, match=r"out\.training, which is needed for the output, and the model .* lie one inside the other"):
            run(student, Distill(**SHORT, teacher=teacher))
    assert tensors(checkpoint).keys() == before.keys()


@pytest.mark.parametrize("output", ["teacher", "teacher/inside"])
def test_an_output_in_place_of_the_teacher_is_refused(output):
    put(Path("model"))
    for place in ("teacher", "student"):
        run("model" if place == "teacher" else "teacher", Gqa(groups=2 if place == "teacher" else 1, pool="mean"), place=place)
    before = Path("teacher/effconvert.json").read_bytes()
    with pytest.raises(OptionError, match="lie one inside the other"):
        run("student", Refit(teacher="teacher"), place=output, overwrite=True)
    assert Path("teacher/effconvert.json").read_bytes() == before
    assert not Path("teacher/inside").exists()


def test_another_text_is_another_run():
    put(Path("model"), noise=1.0, only="weight")
    first = run("model", Gqa(groups=1), Distill(**SHORT), place="first").plan.fingerprint
    Path("text.txt").write_text(prose(seed=5))
    assert run("model", Gqa(groups=1), Distill(**SHORT), place="second").plan.fingerprint != first


@pytest.mark.slow
def test_after_a_factorised_embedding_and_dropped_layers_too():
    put(Path("model"), noise=1.0, only="weight", num_hidden_layers=3)
    run("model", FactorEmbed(rank=12), Distill(**SHORT), place="factored")
    run("model", PruneLayers(layers="1"), Distill(**SHORT), place="pruned")
    run("pruned", Distill(teacher="model", **SHORT), place="again")
    for place in ("factored", "again"):
        told = json.loads(Path(place, "effconvert.json").read_text())["distillation"]
        assert told["after"] < told["before"]


def test_healing_before_it_goes_towards_the_same_teacher():
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=1), place="converted")
    run("converted", Refit(), Distill(teacher="model", **SHORT), place="healed")
    assert json.loads(Path("healed/effconvert.json").read_text())["distillation"]["after"] > 0


def test_the_recipe_beside_it_finds_its_text():
    put(Path("model"))
    run("model", Gqa(groups=1), Distill(**SHORT))
    assert "data: ../text.txt" in Path("out/effconvert.yaml").read_text()


def test_a_folder_of_somebody_else_is_not_touched():
    put(Path("model"))
    Path("out.training").mkdir()
    Path("out.training/mine.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"out\.training is in the way and effconvert did not write it"):
        run("model", Gqa(groups=1), Distill(**SHORT))
    assert Path("out.training/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "steps", "error", "message"),
    [
        ("llama", (Gqa(groups=1), Distill(data="text.txt", ce=0.7, hidden=0.7)), OptionError, "--ce 0.7 and --hidden 0.7 are shares of the loss"),
        ("llama", (Gqa(groups=1), Distill(data="text.txt", window=65)), OptionError, "--window 65 is more than the 64 tokens"),
        ("llama", (Distill(), Refit()), OptionError, "distill trains the finished model, so it comes last"),
        ("llama", (Distill(),), OptionError, "--teacher is needed"),
        ("llama", (Gqa(groups=1), Distill(data="nowhere.txt", window=32)), OptionError, "--data nowhere.txt is neither a file"),
        ("llama", (Gqa(groups=1), Distill(data="self")), OptionError, "--data self is not possible"),
    ],
)
def test_what_cannot_be_is_refused(kind, steps, error, message):
    put(Path("model"), kind)
    with pytest.raises(error, match=message):
        run("model", *steps)
    assert {path.name for path in Path().iterdir()} == {"model", "text.txt"}


def test_too_short_a_text_is_refused():
    put(Path("model"))
    Path("text.txt").write_text(prose(100))
    with pytest.raises(OptionError, match="has 100 tokens, and --window 32 needs 128; give a longer --data"):
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT))


def test_too_little_memory_is_said_before_anything_is_written(monkeypatch):
    put(Path("model"))
    monkeypatch.setattr(training, "training_bytes", lambda plan: 10**15)
    with pytest.raises(OptionError, match=r"distill needs 1000000\.0 GB of memory"):
        run("model", Gqa(groups=1), Distill(**SHORT))
    assert not Path("out.training").exists()


def test_too_small_a_disk_is_said_before_anything_is_written(monkeypatch):
    put(Path("model"))
    monkeypatch.setattr(training, "checkpoint_bytes", lambda plan: 10**17)
    with pytest.raises(OptionError, match=r"out\.training needs up to .* for checkpoints, and .* has .* free; give an --output on another disk"):
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT))
    assert not Path("out.training").exists()


def test_several_gpus_are_refused(monkeypatch):
    put(Path("model"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OptionError, match="2 GPUs are visible, and this is one process; start one for each"):
        run("model", Gqa(groups=1), Distill(**SHORT))


def test_a_loss_that_is_no_number_is_named(monkeypatch):
    put(Path("model"))
    monkeypatch.setattr(Objective, "__call__", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(ModelError, match="the loss is nan at step 0; give a lower --rate"):
        run("model", Gqa(groups=1), Distill(**SHORT))


def test_the_plan_says_how_many_steps():
    checkpoint = open_checkpoint(save(tiny("llama"), Path("model")))
    assert "trains for 40 steps of 128 tokens" in " ".join(plan(checkpoint, (Gqa(groups=1), Distill(**SHORT))).notes)


def test_windows_that_repeat_themselves_have_a_passage_of_their_first_half_again_in_the_second():
    ids = torch.arange(200 * 64).reshape(200, 64)
    result = repeating(ids, 0.25)
    changed = [(before, after) for before, after in zip(ids, result, strict=True) if not torch.equal(before, after)]
    assert 30 < len(changed) < 70
    for before, after in changed:
        again = (before != after).nonzero()[:, 0]
        assert again[0] >= 32
        assert len(again) == again[-1] - again[0] + 1 in range(4, 17)
        first = after[again[0]] - before[0]
        assert torch.equal(after[again], before[first : first + len(again)])
        assert first + len(again) <= 32
    assert torch.equal(repeating(ids, 0.25), result)
    assert repeating(ids, 0) is ids


def test_bfloat16_is_asked_for_or_a_gpu_s():
    assert Distill(precision="bfloat16").in_bfloat16("cpu")
    assert Distill().in_bfloat16("cuda")
    assert not Distill().in_bfloat16("cpu")
    assert not Distill(precision="float32").in_bfloat16("cuda")


def test_training_in_bfloat16_closes_the_gap_too():
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT, precision="bfloat16", recall=0.5))
    told = json.loads(Path("out/effconvert.json").read_text())["distillation"]
    assert told["after"] < 0.97 * told["before"]


def test_a_masked_model_does_not_see_what_it_predicts():
    ids = torch.randint(5, 100, (40, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2  # special
    items = masked(ids, 4, [2], 100)
    seen, labels = (torch.stack([item[key] for item in items]) for key in ("input_ids", "labels"))
    chosen = labels != UNLABELLED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(seen[~chosen], ids[~chosen])
    assert not chosen[:, 0].any()
    assert 0.12 < chosen.float().mean() < 0.18
    assert 0.75 < (seen[chosen] == 4).float().mean() < 0.85
    assert 0.05 < (seen[chosen] == ids[chosen]).float().mean() < 0.15


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_distance_of_hidden_states_is_that_of_the_definition(kind):
    draw = torch.Generator().manual_seed(0)
    own, theirs = ([torch.randn(7, 5, generator=draw, dtype=torch.double) for _ in range(2)] for _ in range(2))
    own[0].requires_grad_()
    value = distance(own, theirs, kind)
    value.backward()
    found, own[0].grad = own[0].grad, None
    if kind == "mse":
        expected = sum(((a - b) ** 2).mean() / (b**2).mean() for a, b in zip(own, theirs, strict=True)) / 2
    else:
        expected = sum((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean() for a, b in zip(own, theirs, strict=True)) / 2
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, own[0].grad, rtol=1e-4, atol=1e-7)
    assert distance(theirs, theirs, kind) < 1e-6


@pytest.mark.few(4)
@pytest.mark.parametrize(("kind", "head"), [("bert", True), ("distilbert", True), ("modernbert", True), ("electra", True), ("bert", False), ("llama", False)])
def test_encoders_and_models_without_a_head_are_distilled_too(kind, head):
    put(Path("model"), kind, noise=1.0, only="weight", **THREE.get(kind, {"num_hidden_layers": 3}))
    with_mask = letters()
    with_mask.mask_token = "<s>"
    with_mask.save_pretrained("model")
    if not head:
        transformers.AutoModel.from_pretrained("model").save_pretrained("model")
    run("model", PruneLayers(layers="1"), Distill(**SHORT))
    told = json.loads(Path("out/effconvert.json").read_text())["distillation"]
    assert told["measure"] == ("kl" if head else "hidden")
    assert told["after"] < 0.97 * told["before"]


@pytest.mark.slow
def test_hidden_states_of_a_shorter_model_go_towards_those_after_the_dropped_layers():
    put(Path("model"), noise=1.0, only="weight", num_hidden_layers=4)
    told = {}
    for share in (0.0, 1.0):
        run("model", PruneLayers(layers="1,2"), Distill(**SHORT, hidden=share), place=f"out{share}")
        told[share] = json.loads(Path(f"out{share}/effconvert.json").read_text())["distillation"]
    assert told[1.0]["measure"] == "kl"
    assert told[1.0]["after"] < told[1.0]["before"] == told[0.0]["before"]


def test_a_layer_stands_for_those_that_were_dropped_after_it():
    checkpoint = open_checkpoint(save(tiny("llama", num_hidden_layers=5), Path("model")))
    conversion = plan(checkpoint, (PruneLayers(layers="1,2,4"), Distill(**SHORT, hidden=0.5)))
    assert training.layers_of_the_teacher(conversion) == [range(3), range(3, 5)]


def test_unchanged_weights_stay_and_are_in_memory_once(monkeypatch):
    put(Path("model"), noise=1.0, only="weight", num_hidden_layers=3)
    shared = []
    real = _distilling.share
    monkeypatch.setattr(_distilling, "share", lambda student, teacher, same: (real(student, teacher, same), shared.append((student, teacher, same))))
    run("model", PruneLayers(layers="1"), Gqa(groups=1, pool="mean"), Distill(**SHORT, unchanged_rate=0.0))
    run("model", PruneLayers(layers="1"), Gqa(groups=1, pool="mean"), place="before")
    before, after = tensors(Path("before")), tensors(Path("out"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {name for name in before if ".k_proj." in name or ".v_proj." in name}
    ((student, teacher, names),) = shared
    assert names["model.layers.1.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert all(student.get_parameter(name).data_ptr() == teacher.get_parameter(other).data_ptr() for name, other in names.items())


def test_a_teacher_that_shares_weights_teaches_what_a_second_model_does(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    real = _distilling.share
    for place, teacher in (("second", lambda model: None), ("shared", lambda model: model)):
        monkeypatch.setattr(_distilling, "share", lambda student, model, same, teacher=teacher: real(student, teacher(model), same))
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT, unchanged_rate=0.0), place=place)
    second = tensors(Path("second"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in tensors(Path("shared")).items())


def test_unchanged_weights_at_a_lower_rate_move_less():
    put(Path("model"), noise=1.0, only="weight")
    run("model", Gqa(groups=1, pool="mean"), place="before")
    moved = []
    for share in (1.0, 0.1):
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT, unchanged_rate=share), place=f"out{share}")
        moved.append((tensors(Path(f"out{share}"))["model.layers.0.mlp.up_proj.weight"] - tensors(Path("before"))["model.layers.0.mlp.up_proj.weight"]).norm())
    assert 0 < moved[1] < moved[0] / 4


def test_a_loss_that_is_not_least_at_the_teacher_is_refused(monkeypatch):
    put(Path("model"))
    monkeypatch.setattr("effconvert.heal._objective.divergence_reference", lambda student, teacher, *_: (student - 1.5 * teacher).square().sum(1))
    with pytest.raises(EffconvertError, match="a student that is its teacher has a loss"):
        run("model", Gqa(groups=1), Distill(**SHORT))


def test_a_teacher_with_another_tokenizer_is_refused():
    put(Path("model"))
    put(Path("other"))
    file = Path("other/tokenizer.json")
    file.write_text(file.read_text().replace('"a":', '"\u00e9":'))
    with pytest.raises(ModelError, match="the teacher's tokenizer is another one: of 99 tokens of the student, 1 have another number there or none"):
        run("model", Gqa(groups=1), Distill(teacher="other", **SHORT))


def test_gradient_checkpointing_gives_the_same_weights():
    put(Path("model"), noise=1.0, only="weight")
    for place, saving in (("plain", False), ("saving", True)):
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT, gradient_checkpointing=saving), place=place)
    plain, saving = tensors(Path("plain")), tensors(Path("saving"))
    assert all(torch.allclose(plain[name], saving[name], atol=1e-6) for name in plain)


def test_an_unknown_logger_is_refused_before_anything_is_written():
    put(Path("model"))
    with pytest.raises(OptionError, match="--report-to diary is not installed, or transformers does not know it"):
        run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT, report_to="diary"))
    assert {path.name for path in Path().iterdir()} == {"model", "text.txt"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory is too small for a step; lower --batch-tokens or --window"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), "the memory is too small for a step"),
        (OSError(28, "No space left on device"), "cannot be written .*; make room on that disk, and the same command goes on"),
    ],
)
def test_what_a_device_or_a_disk_cannot_do_is_said_and_nothing_is_lost(error, message, monkeypatch):
    put(Path("model"), noise=1.0, only="weight")

    def fail(self, args, state, control, **more):
        if state.global_step == 22:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(_distilling.Reporter, "on_step_end", fail)
        with pytest.raises(EffconvertError, match=message):
            run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT))
    assert Path("out.training/checkpoints/checkpoint-20/config.json").is_file()
    assert run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT)).output.is_dir()


def test_no_cache_is_kept_while_it_trains(monkeypatch):
    put(Path("model"))
    seen, real = [], _distiller.hidden_states

    def watched(base, *more):
        handle = base.register_forward_hook(lambda *found: seen.append(found[-1]))
        states = real(base, *more)
        handle.remove()
        return states

    monkeypatch.setattr(_distiller, "hidden_states", watched)
    run("model", Gqa(groups=1, pool="mean"), Distill(**{**SHORT, "train_tokens": 1024}))
    assert seen
    assert all(output.past_key_values is None for output in seen)


@pytest.mark.few(4)
@pytest.mark.parametrize(("ce", "hidden"), [(0.5, 0.0), (0.5, 0.5), (0.25, 0.125)])
def test_shares_are_of_the_whole_loss(ce, hidden):
    put(Path("model"), noise=1.0, only="weight")
    run("model", Distill(teacher="model", **{**SHORT, "train_tokens": 1024, "rate": 1e-9}, ce=ce), place="text")
    run("model", Distill(teacher="model", **{**SHORT, "train_tokens": 1024, "rate": 1e-9}, ce=ce, hidden=hidden), place="both")
    losses = [json.loads(Path(place, "effconvert.json").read_text())["distillation"]["curve"][1]["loss"] for place in ("text", "both")]
    assert losses[0] > 0.5  # of the original as its own student, cross-entropy is all that there is
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("steps", [(PruneLayers(layers="1"),), ()])
def test_leaving_unchanged_weights_out_is_refused_where_there_are_no_others(steps):
    put(Path("model"), noise=1.0, only="weight", num_hidden_layers=3)
    with pytest.raises(ModelError, match="every weight is as in the original, so --unchanged-rate 0 leaves nothing to train"):
        run("model", *steps, Distill(teacher=None if steps else "model", **SHORT, unchanged_rate=0.0))


def test_what_layers_share_is_changed_where_it_is_not_as_in_all_of_them():
    put(Path("model"), noise=1.0, only="weight")
    run("model", ShareLayers(groups=1, pool="first"), place="before")
    run("model", ShareLayers(groups=1, pool="first"), Distill(**SHORT, unchanged_rate=0.0))
    before, after = tensors(Path("before")), tensors(Path("out"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "model.layers.0.mlp.up_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed


def test_a_teacher_without_a_head_is_refused():
    put(Path("model"))
    put(Path("bare"))
    transformers.AutoModel.from_pretrained("bare").save_pretrained("bare")
    with pytest.raises(ModelError, match=r"the teacher \(LlamaModel\) has no head that predicts tokens"):
        run("model", Distill(teacher="bare", **SHORT))


def test_what_a_stopped_run_has_written_is_no_part_of_the_disk_that_it_needs(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    stopped(monkeypatch, Gqa(groups=1, pool="mean"))
    there = sum(file.stat().st_size for file in Path("out.training").rglob("*") if file.is_file())
    monkeypatch.setattr(training, "checkpoint_bytes", lambda plan: 10**17 + there - 1)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**17))
    assert run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT)).output.is_dir()


def test_a_text_that_is_read_more_than_once_is_announced():
    put(Path("model"), noise=1.0, only="weight")
    windows = len(prose()) // SHORT["window"]  # a token is a letter
    fresh = int((~held_out(windows)).sum()) * SHORT["window"]
    for tokens, said in ((fresh, False), (2 * fresh, True)):
        steps = {**SHORT, "train_tokens": tokens, "batch_tokens": SHORT["window"]}
        notes = " ".join(run("model", Gqa(groups=1, pool="mean"), Distill(**steps), dry_run=True).plan.notes)
        assert (f"the text has {fresh:,} tokens to train on, and {tokens:,} are read, some of them again" in notes) == said, notes


def test_checkpoints_of_other_options_are_announced_and_a_damaged_mark_is_another_run(monkeypatch):
    put(Path("model"), noise=1.0, only="weight")
    stopped(monkeypatch, Gqa(groups=1, pool="mean"))
    told = " ".join(run("model", Gqa(groups=1, pool="mean"), Distill(**{**SHORT, "rate": 1e-4}), dry_run=True).plan.notes)
    assert "out.training has checkpoints of a run with other options, another text or another version of effconvert, which will be removed" in told
    assert "which will be removed" not in " ".join(run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT), dry_run=True).plan.notes)
    Path("out.training/effconvert-training.json").write_text("")
    assert run("model", Gqa(groups=1, pool="mean"), Distill(**SHORT)).output.is_dir()


def test_less_memory_is_planned_where_less_is_needed():
    checkpoint = open_checkpoint(save(tiny("llama", num_hidden_layers=6), Path("model")))
    steps = [(Gqa(groups=1, pool="mean"), Distill(**SHORT, gradient_checkpointing=saving)) for saving in (False, True)]
    plain, saving = (training.training_bytes(plan(checkpoint, chosen)) for chosen in steps)
    assert saving < plain


def test_passages_are_not_copied_over_special_tokens():
    put(Path("model"), "bert")
    tokenizer = letters()
    tokenizer.add_special_tokens({"mask_token": "<s>", "cls_token": "<pad>", "sep_token": "</s>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 2)])
    tokenizer.save_pretrained("model")
    conversion = plan(open_checkpoint(Path("model")), (Gqa(groups=1, pool="mean"), Distill(**SHORT, recall=1.0)))
    windows = training_text.items(conversion, training_text.read_text(conversion)).train
    assert all(item["labels"][0] == UNLABELLED and item["input_ids"][0] == 0 and item["input_ids"][-1] == 2 for item in windows)
