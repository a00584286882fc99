"""Transfer: mixers come nearer to the attention that they replaced, on text that nobody looked at, and what was not taught stays."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import effconvert
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert import run as running
from effconvert.convert.calibration import prepare
from effconvert.convert.plan import plan
from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.heal._layer import _is_held_out
from effconvert.heal._training import _held_out_batches, _rate_factor, _share, train
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.options import RunOptions
from effconvert.recipe import read
from effconvert.replay import replay
from effconvert.surgery.attention.expand_kv import ExpandKv
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mla import Mla
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.mixing.streaming import Streaming
from effconvert.surgery.width.narrow import Narrow
from tests.heal.healing import TOKENS, heldout, prose, put, run, tensors

GROUPED = {"num_key_value_heads": 2}
TEACH = Transfer(epochs=3)  # enough to come nearer
CASES = {  # what is taught: family, changes to its config, mixer
    "llama": ("llama", {}, Linear(window=6)),  # with biases
    "llama-grouped": ("llama", GROUPED, Linear(window=6)),
    "llama-t2r": ("llama", {}, Linear(window=6, feature="t2r", features=8)),
    "llama-elu": ("llama", {}, Linear(feature="elu")),  # nothing of its own: projections alone
    "llama-streaming": ("llama", {}, Streaming(window=6, sinks=2)),
    "qwen3-grouped": ("qwen3", GROUPED, Linear()),
    "gemma3_text": ("gemma3_text", {}, Linear(window=6)),
    "phi3-grouped": ("phi3", GROUPED, Linear(window=6)),  # q, k, v in one
    "glm": ("glm", {}, Linear(window=6)),  # RoPE of a part
    "gpt2": ("gpt2", {}, Linear(window=6)),  # transposed, in one
    "gpt_bigcode": ("gpt_bigcode", {}, Linear(window=6)),
    "gpt_neox": ("gpt_neox", {}, Linear(window=6)),  # in one, head by head
    "bert": ("bert", {}, Linear()),
}


def opened(folder):
    return effconvert.load(folder, dtype="float32", device="cpu").model


@torch.inference_mode()
def off(original, *folders):
    """Return for each model and layer how far the output of its o is from the original layer's, for inputs as the last model has them.

    On text that nobody saw, relative to the size of that output. Layers of one model beside those of another need the same inputs.
    """
    models = [opened(folder) for folder in (original, *folders)]
    family = FAMILIES[models[0].config.model_type]
    layers = [model.base_model.get_submodule(family.layers) for model in models]
    outputs, calls = [[] for _ in models], []
    for layer in layers[-1]:
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    models[-1](heldout(), **({"use_cache": False} if family.decoder else {}))
    for made, column in zip(outputs, layers, strict=True):
        for layer, (args, kwargs) in zip(column, tuple(calls), strict=False):
            layer.get_submodule(family.parts["o"]).register_forward_hook(lambda _, args, out, made=made: made.append(out))
            layer(*args, **kwargs)
    return [[float((one - wanted).norm() / wanted.norm()) for one, wanted in zip(made, outputs[0], strict=True)] for made in outputs[1:]]


def changed(one, other):
    """Names of the tensors in which two models differ."""
    mine, theirs = tensors(Path(one)), tensors(Path(other))
    assert mine.keys() == theirs.keys()
    return {name for name in mine if not torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8))}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model, what it is with mixers, and these taught; each made once, and told what was said of it."""
    made = {}

    def find(name):
        if name not in made:
            kind, changes, mixer = CASES[name]
            place = tmp_path_factory.mktemp(name)
            (place / "text.txt").write_text(prose())
            source, text = put(place / "model", kind, **changes), str(place / "text.txt")
            run(source, mixer, place=place / "plain", calibrate=text)
            made[name] = place, run(source, mixer, TEACH, place=place / "taught", calibrate=text)
        return made[name]

    return find


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CASES)
def test_attention_of_each_layer_comes_nearer_on_text_that_nobody_saw(taught, name):
    place, outcome = taught(name)
    before, after = off(place / "model", place / "plain", place / "taught")
    assert min(before) > 1e-3
    for index, (plain, healed) in enumerate(zip(before, after, strict=True)):
        assert healed < plain, index
    for said in outcome.layer_errors.values():
        assert said["after"] < said["before"]


@pytest.mark.parametrize("name", CASES)
def test_nothing_else_is_touched(taught, name):
    place, _ = taught(name)
    family, mixer = FAMILIES[CASES[name][0]], CASES[name][2]
    projections = {family.parts[part] for part in ("q", "k", "v", "o")}
    for tensor in tensors(place / "plain"):
        inside = tensor.partition(f"{family.layers}.")[2].partition(".")[2]
        may = inside.rpartition(".")[0] in projections or ".effconvert." in tensor
        assert (tensor in changed(place / "plain", place / "taught")) <= may, tensor
    every = changed(place / "plain", place / "taught")
    for part in (*sorted(projections), *([f"{family.attention}.effconvert"] if mixer.parameters(open_checkpoint(place / "plain").config) else [])):
        assert any(f"{part}." in tensor for tensor in every), part


def test_every_parameter_of_a_mixer_and_every_bias_is_taught(taught):
    place, _ = taught("llama-t2r")
    every = changed(place / "plain", place / "taught")
    for part in ("query_map", "key_map", "query_bias", "key_bias", "share"):
        assert any(f"effconvert.{part}" in name for name in every), part
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert any(name.endswith(f"{part}.bias") for name in every), part
        assert any(name.endswith(f"{part}.weight") for name in every), part


def test_layers_without_a_mixer_keep_their_bytes():
    source = put(Path("model"), num_hidden_layers=4)
    step = Linear(window=6, keep_softmax="0,-1")
    run(source, step, place="plain")
    outcome = run(source, step, Transfer(epochs=2))
    every = changed("plain", "out")
    assert {name.split(".")[2] for name in every} == {"1", "2"}
    assert set(outcome.layer_errors) == {"1", "2"}
    assert outcome.plan.notes == ["transfer: trains the 2 layers that have a mixer, and what else has other shapes than the original's"]


def test_what_was_said_is_the_error_on_held_out_windows(taught):
    """Of the first layer, measured in the models as they lie on disk; what reaches later layers in the plain model is something else."""
    place, outcome = taught("llama")
    ids = heldout_ids(place, TOKENS)
    assert outcome.layer_errors["0"]["before"] == pytest.approx(squared_error(place, "plain", ids), rel=1e-4)
    assert outcome.layer_errors["0"]["after"] == pytest.approx(squared_error(place, "taught", ids), rel=1e-4)


def heldout_ids(place, count):
    """All windows; the last batch is held out."""
    planned = plan(open_checkpoint(place / "model"), (Linear(window=6), Transfer()))
    ids = prepare(planned, RunOptions(calibrate=str(place / "text.txt"), calibration_tokens=count)).ids
    assert len(ids) in (8, 16)
    return ids


@torch.inference_mode()
def squared_error(place, which, ids, held_out=slice(8, None)):
    """Of the first layer on the second batch of eight windows, whose inputs are the embeddings in both."""
    outputs = []
    for folder in (place / which, place / "model"):
        model = opened(folder)
        model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, args, out: outputs.append(out))
        model(ids, use_cache=False)
    found, wanted = outputs
    return float((found[held_out] - wanted[held_out]).square().mean() / wanted.square().mean())


def test_the_same_text_gives_the_same_bytes(taught):
    place, _ = taught("llama")
    run(place / "model", Linear(window=6), TEACH, calibrate=str(place / "text.txt"))
    assert not changed("out", place / "taught")


@pytest.mark.slow
def test_another_text_more_epochs_and_another_rate_give_others(taught):
    place, _ = taught("llama")
    Path("other.txt").write_text(prose(seed=1))
    for index, (step, text) in enumerate(((TEACH, "other.txt"), (Transfer(epochs=2), "text.txt"), (Transfer(epochs=3, rate=1e-3), "text.txt"))):
        run(place / "model", Linear(window=6), step, place=f"out-{index}", calibrate=text)
        assert changed(f"out-{index}", place / "taught")


@pytest.mark.slow
@pytest.mark.usefixtures("one_window_a_batch")
def test_the_best_epoch_is_kept_and_not_the_last():
    """Where there is so little text that it is learnt by heart."""
    place = Path()
    source = put(place / "model")
    said = run(source, Linear(window=6), Transfer(rate=0.01, epochs=60), place="taught", calibration_tokens=256).layer_errors["0"]
    assert said["after"] < said["before"]
    assert said["after"] == pytest.approx(squared_error(place, "taught", heldout_ids(place, 256), slice(7, None)), rel=1e-4)


def test_what_predicts_held_out_windows_no_better_is_not_kept(monkeypatch):
    """A rate that only destroys, and no lower one that is tried after it."""
    monkeypatch.setattr("effconvert.heal._training.RATES", (1,))
    source = put(Path("model"))
    run(source, Linear(window=6), place="plain")
    outcome = run(source, Linear(window=6), Transfer(rate=1.0, epochs=1))
    worse = [index for index, said in outcome.layer_errors.items() if said["after"] == said["before"]]
    assert worse
    assert not {name for name in changed("plain", "out") if name.split(".")[2] in worse}


class Number(dict):
    """A layer whose attention gives its only weight, whatever it reads."""

    def __init__(self, wanted):
        super().__init__(o=torch.zeros(()))
        self.index, self.activations = 0, self
        self.wanted = [torch.full((1, 4, 1), number) for number in wanted]

    def original(self, *_, **__):
        return [SimpleNamespace(outputs={"attention": wanted}) for wanted in self.wanted]

    def stored(self, layer):
        return {}

    def place_output(self, layer, place, trainable, stored, batch):
        return trainable.get("o", self["o"]) * torch.ones(1, 4, 1)


@pytest.mark.parametrize(("held_out", "expected"), [(0.52, 1.0), (0.06, 0.1), (0.006, 0.01), (-1.0, 0.0)])
def test_lower_rates_are_tried_where_one_gained_nothing(held_out, expected):
    """A step of the optimizer is as long as its rate. The text to learn from wants it long; that to judge by may find it too long, or the wrong way."""
    layer, size = Number([5.0, held_out]), (25 + held_out**2) / 2
    said = train(layer, [0], "attention", ["o"], epochs=1, rate=math.sqrt(size) / abs(held_out))  # 1, by the error
    assert float(layer["o"]) == pytest.approx(expected)
    assert said == pytest.approx({"before": held_out**2 / size, "after": (held_out - expected) ** 2 / size}, rel=1e-4)


def test_steps_are_as_long_as_the_root_of_the_error():
    layer = Number([5.0, 0.5])
    train(layer, [0], "attention", ["o"], epochs=1, rate=1.0)
    assert float(layer["o"]) == pytest.approx(0.5 / math.sqrt((25 + 0.5**2) / 2))
    layer = Number([0.1, 5.0])  # with an error of 2: more than all is not wrong
    train(layer, [0], "attention", ["o"], epochs=1, rate=0.5)
    assert float(layer["o"]) == pytest.approx(0.5)


def test_wide_matrices_take_shorter_steps():
    assert [_share("q", torch.zeros(64, width)) for width in (64, 256, 512, 4096)] == [1, 1, 0.5, 1 / 16]
    assert _share("q.bias", torch.zeros(4096)) == 1
    assert _share("scores.effconvert.query_map", torch.zeros(8, 128, 128)) == 10
    assert _share("scores.effconvert.gate", torch.zeros(512, 512)) == 5


def test_texts_of_each_length_are_judged_by():
    assert _held_out_batches([64] * 7) == [6]
    assert _held_out_batches([64] * 17) == [7, 15]
    assert sorted(_held_out_batches([64, 16, 4] * 2 + [64])) == [4, 5, 6]
    assert sorted(_held_out_batches([64, 16] * 8)) == [14, 15]
    assert _held_out_batches([64, 64, 16]) == [1]  # the only one of its length is learnt from
    assert _held_out_batches([64, 16]) == [1]


def test_what_is_neutral_stays_as_it_is():
    source = put(Path("model"))
    run(source, Linear(window=64), place="plain")
    outcome = run(source, Linear(window=64), Transfer(epochs=1))
    for said in outcome.layer_errors.values():
        assert said["before"] < 1e-9
        assert said["after"] <= said["before"]


def test_a_model_of_half_precision_is_taught_as_it_is_stored(taught):
    source = put(Path("model"))
    opened(source).to(torch.bfloat16).save_pretrained(source)
    outcome = run(source, Linear(window=6), TEACH)
    assert {tensor.dtype for tensor in tensors(Path("out")).values()} == {torch.bfloat16}
    for said in outcome.layer_errors.values():
        assert said["after"] < said["before"]
    run(source, Linear(window=6), place="plain")
    assert all(after < before for before, after in zip(*off(source, "plain", "out"), strict=True))


# Its places


@pytest.mark.usefixtures("one_window_a_batch")
def test_it_is_a_step_an_option_and_a_command_of_its_own(command):
    source = put(Path("model"))
    tokens = 256
    little = ("--calibrate", "text.txt", "--calibration-tokens", tokens, "--no-verify")
    done = command("linear", "--window", 6, "--transfer", source, "-o", "option", *little)
    assert done.exit_code == 0, done.stderr
    assert "error before transfer" in done.stdout
    Path("recipe.yaml").write_text(
        yaml.safe_dump(
            {"model": str(source), "output": "step", "calibrate": "text.txt", "calibration-tokens": tokens, "steps": [{"linear": {"window": 6}}, "transfer"]}
        )
    )
    replay(read(Path("recipe.yaml")))
    assert not changed("option", "step")
    assert command("linear", "--window", 6, source, "-o", "plain", *little).exit_code == 0
    assert command("transfer", "plain", "--teacher", source, "-o", "command", *little).exit_code == 0
    assert not changed("command", "option")
    assert changed("command", "plain")


def test_the_recipe_beside_it_makes_it_again(taught):
    place, _ = taught("llama")
    shutil.copy(place / "text.txt", "text.txt")
    recipe = read(place / "taught" / "effconvert.yaml", output=Path("again"))
    assert [next(iter(step.recipe)) for step in recipe[0].steps] == ["linear", "transfer"]
    replay(recipe)
    assert not changed("again", place / "taught")


def test_the_manifest_and_the_outcome_say_what_it_brought(taught):
    place, outcome = taught("llama")
    said = json.loads((place / "taught" / "effconvert.json").read_text())["layer_errors"]
    assert said == outcome.layer_errors
    assert set(said) == {"0", "1"}
    assert "layer_errors" not in json.loads((place / "plain" / "effconvert.json").read_text())


@pytest.mark.parametrize(("steps", "expected"), [((Linear(window=6),), ["transfer", "refit"]), ((Gqa(groups=2),), ["refit", "transfer"])])
def test_mixers_are_taught_before_a_refit_and_matrices_of_another_shape_after_it(steps, expected):
    outcome = run(put(Path("model")), *steps, transfer=True, refit=True)
    assert [step.name for step in outcome.plan.surgeries[len(steps) :]] == expected


@pytest.mark.parametrize(
    ("steps", "parts"),
    [
        ((Gqa(groups=1, pool="mean"),), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ((Narrow(ffn=20),), {"gate_proj", "up_proj", "down_proj"}),
        ((Gqa(groups=2, pool="mean"), Narrow(ffn=20)), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ((Mla(rank=16, rope_dims=4),), {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    ],
)
def test_matrices_of_another_shape_are_taught_and_no_others(steps, parts):
    source = put(Path("model"), attention_bias=False, mlp_bias=False)
    run(source, *steps, place="plain")
    outcome = run("plain", Transfer(teacher=str(source), epochs=3))
    assert outcome.plan.notes == ["transfer: trains attention and FFNs where they differ from the original's"]
    assert {name.split(".")[-2] for name in changed("plain", "out")} == parts
    assert len(outcome.layer_errors) == 2
    assert all(said["after"] < said["before"] for said in outcome.layer_errors.values())


def test_what_computes_the_same_in_other_shapes_stays_as_it_is():
    source = put(Path("model"), **GROUPED)
    run(source, ExpandKv(groups=4), place="plain")
    outcome = run("plain", Transfer(teacher=str(source), epochs=3))
    assert not changed("plain", "out")
    assert all(said["after"] == said["before"] for said in outcome.layer_errors.values())


class Measured(Refit):
    """A refit that notes the error on its own held-out windows before and after."""

    @property
    def name(self):
        return "refit"

    def heal(self, layer, originals):
        before = self.error(layer, originals)
        super().heal(layer, originals)
        ERRORS.append((before, self.error(layer, originals)))

    def error(self, layer, originals):
        wanted = [look.outputs["o"] for look in layer.activations.original([originals[0]], ("o",), until="o")]
        found = [look.outputs["o"] for look in layer.activations.capture(layer, ("o",), until="o")]
        off = [
            (one[row] - other[row]).square().mean()
            for index, (one, other) in enumerate(zip(found, wanted, strict=True))
            for row in range(len(one))
            if _is_held_out(index, row, wanted)
        ]
        assert off
        return float(sum(off))


ERRORS = []


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["qwen3-grouped", "gpt2", "gpt_neox", "bert"])
def test_a_refit_after_it_makes_no_layer_worse_on_its_own_held_out_windows(taught, name):
    place, _ = taught(name)
    ERRORS.clear()
    run(place / "taught", Measured(teacher=str(place / "model")))
    assert len(ERRORS) == 2
    for before, after in ERRORS:
        assert after <= before * (1 + 1e-6)
    assert any(after < before for before, after in ERRORS)
    parts = FAMILIES[CASES[name][0]].parts
    for tensor in changed("out", place / "taught"):
        assert f".{parts['o']}." in tensor  # queries and values were taught; of attention's weights there are none to fit to


def test_a_chain_of_sharing_heads_and_mixers_is_taught_towards_the_first():
    source = put(Path("model"))
    steps = Gqa(groups=2, pool="mean"), Linear(window=6)
    run(source, *steps, place="plain")
    outcome = run(source, *steps, TEACH)
    assert all(said["after"] < said["before"] for said in outcome.layer_errors.values())
    assert all(after < before for before, after in zip(*off(source, "plain", "out"), strict=True))


def test_another_width_is_refused():
    source, wide = put(Path("model")), put(Path("wide"), hidden_size=64)
    run(source, Linear(window=6), place="plain")
    with pytest.raises(ModelError, match="64 wide"):
        run("plain", Transfer(teacher=str(wide)))
    assert not list(Path().glob("out*"))


# Killed


class Dying(Transfer):
    """Is killed at the layers in FATAL."""

    @property
    def name(self):
        return "transfer"

    def heal(self, layer, originals):
        TAUGHT.append(layer.index)
        if layer.index in FATAL:
            raise KeyboardInterrupt
        super().heal(layer, originals)


TAUGHT, FATAL = [], []


@pytest.fixture(autouse=True)
def _unharmed():
    TAUGHT.clear()
    FATAL.clear()


def manifest(place):
    return json.loads((Path(place) / "effconvert.json").read_text())


def test_a_killed_run_goes_on_from_the_last_layer_to_the_same_bytes_and_notes():
    source, steps = put(Path("model"), num_hidden_layers=3), (Linear(window=6), Dying(epochs=2))
    run(source, *steps, place="unbroken")
    for fatal in (1, 2):
        TAUGHT.clear()
        FATAL[:] = [fatal]
        with pytest.raises(KeyboardInterrupt):
            run(source, *steps)
        assert list(range(fatal - 1, fatal + 1)) == TAUGHT  # those before were found
    FATAL.clear()
    TAUGHT.clear()
    outcome = run(source, *steps)
    assert TAUGHT == [2]
    assert not changed("out", "unbroken")
    assert manifest("out")["layer_errors"] == manifest("unbroken")["layer_errors"] == outcome.layer_errors
    assert set(outcome.layer_errors) == {"0", "1", "2"}


def test_a_run_killed_after_its_layers_were_written_keeps_the_notes(monkeypatch):
    source, steps = put(Path("model")), (Linear(window=6), Dying(epochs=2))
    run(source, *steps, place="unbroken", verify=True, tokens=32, context=16)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "verify", die)
        with pytest.raises(KeyboardInterrupt):
            run(source, *steps, verify=True, tokens=32, context=16)
    TAUGHT.clear()
    outcome = run(source, *steps, verify=True, tokens=32, context=16)
    assert not TAUGHT
    assert not changed("out", "unbroken")
    assert manifest("out").get("layer_errors") == manifest("unbroken")["layer_errors"]
    assert outcome.layer_errors == manifest("unbroken")["layer_errors"]


def test_the_rate_warms_up_and_cools_down():
    heights = [_rate_factor(step, 100) for step in range(100)]
    assert heights[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert max(heights) == 1.0
    assert heights[9:] == sorted(heights[9:], reverse=True)
    assert 0 <= heights[-1] < 0.01
    assert [_rate_factor(step, 1) for step in range(1)] == [1.0]
