"""Refit: what was changed computes nearer to the original on text that nobody looked at, and what was not changed stays."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import effconvert
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.plan import plan, stand_for
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal._layer import _is_held_out
from effconvert.heal.refit import Refit
from effconvert.recipe import read
from effconvert.replay import replay
from effconvert.surgery._regression import Problem
from effconvert.surgery._ridge import ridge
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mqa import Mqa
from tests.convert.conftest import one_line
from tests.convert.test_seam import Plain
from tests.heal.healing import TOKENS, apart, heldout, load, prose, put, run, tensors
from tests.models import ATTENDING, DECODERS, GROUPING

# Families whose attention is that of llama, qwen3, olmo2, bert, roberta or modernbert, number by number,
ALIKE = ("seed_oss", "arcee", "starcoder2", "apertus", "olmo3", "olmoe", "xlm-roberta", "camembert", "electra", "nomic_bert")
# or whose RoPE and layout are those of stablelm, cohere, glm or llama.
ALIKE += ("phi", "nemotron", "ernie4_5", "glm4", "eurobert")
HEALED = [kind for kind in ATTENDING if kind not in ALIKE]
ENCODERS = [kind for kind in HEALED if kind not in DECODERS]
NORMED = [kind for kind in HEALED if "q_norm" in FAMILIES[kind].parts]
CLIPPED = ["olmo"]
BIASED = ["llama", "qwen2", "glm", "gpt2"]  # of the tiny models
SHARING = [kind for kind in GROUPING if kind in HEALED and kind in DECODERS]


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """A model, it with half its KV heads, which are means, and that refitted; each family once."""
    made = {}

    def find(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "text.txt").write_text(prose())
            source, text = put(folder / "model", kind), str(folder / "text.txt")
            run(source, Gqa(groups=2, pool="mean"), place=folder / "plain")
            run(source, Gqa(groups=2, pool="mean"), Refit(), place=folder / "refitted", calibrate=text)
            made[kind] = source, folder / "plain", folder / "refitted"
        return made[kind]

    return find


def healed(student, teacher, place="healed", **more):
    return run(student, Refit(teacher=str(teacher)), place=place, **more).output


def same_tensors(one, other):
    mine, theirs = ({name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tensors(Path(folder)).items()} for folder in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def changed(one, other):
    """The modules in which two models differ."""
    mine, theirs = tensors(Path(one)), tensors(Path(other))
    return {name for name in mine if mine[name].shape != theirs[name].shape or not torch.equal(mine[name], theirs[name])}


# Nothing to heal


@pytest.mark.parametrize("kind", HEALED)
def test_a_model_refitted_towards_itself_keeps_its_bytes(kind):
    source = put(Path("model"), kind)
    healed(source, source)
    assert same_tensors("healed", source)


def test_a_step_that_changes_nothing_leaves_nothing_to_refit():
    source = put(Path("model"))
    run(source, Gqa(groups=4), Refit())
    assert same_tensors("out", source)


# Something to heal


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", SHARING)
def test_after_sharing_heads_a_model_comes_nearer_to_its_original(pooled, kind):
    plain, refitted = apart(*pooled(kind))
    assert plain > 1e-3
    assert refitted < plain


@pytest.mark.few(4)
@pytest.mark.parametrize(("kind", "pool"), [("gpt2", "mean"), ("llama", "pca"), ("qwen3", "pca"), ("gpt2", "pca")])
def test_after_pooling_in_other_ways_too(kind, pool):
    source = put(Path("model"), kind)
    step = Mqa(pool=pool) if kind == "gpt2" else Gqa(groups=2, pool=pool)
    run(source, step, place="plain")
    run(source, step, Refit(), place="refitted")
    plain, refitted = apart(source, "plain", "refitted")
    assert plain > 1e-3
    assert refitted < plain


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", HEALED)
def test_every_family_recovers_from_noise_in_o(kind):
    source, student = put(Path("model"), kind), put(Path("student"), kind, noise=0.5, only=f"{FAMILIES[kind].parts['o']}.weight")
    assert changed(source, student) == {name for name in tensors(source) if name.endswith(f"{FAMILIES[kind].parts['o']}.weight")}
    before, after = apart(source, student, healed(student, source))
    assert before > 1e-3
    assert after < 0.05 * before


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", [kind for kind in HEALED if kind not in (*NORMED, *CLIPPED)])
def test_every_family_without_a_norm_of_queries_recovers_from_noise_in_q(kind):
    """q is fused with k and v in some; a perturbed k can be undone in q no less."""
    part = FAMILIES[kind].parts["q"]
    source, student = put(Path("model"), kind), put(Path("student"), kind, noise=0.3, only=f"{part}.weight")
    before, after = apart(source, student, healed(student, source))
    assert before > 1e-3
    assert after < 0.5 * before
    q = [name for name in changed(student, "healed") if f"{part}.weight" in name]
    assert len(q) == 2  # of both layers


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", SHARING)
def test_attention_of_each_layer_comes_nearer_on_held_out_text(pooled, kind):
    """Each layer by itself: its output, for what reaches it in the converted model, beside that of the original's layer for the same."""
    source, plain, refitted = pooled(kind)
    for before, after in zip(off(source, plain), off(source, refitted), strict=True):
        assert after < before


@torch.inference_mode()
def off(original, folder):
    """Return for each layer how far the output of its o is from the original layer's, for the same inputs, relative to it."""
    ids, family = heldout(), FAMILIES[json.loads((Path(folder) / "config.json").read_text())["model_type"]]
    models = [load(place).get_submodule(family.prefix) for place in (folder, original)]
    found = []
    for layer, teacher in zip(*(model.get_submodule(family.layers) for model in models), strict=True):
        outputs, calls = [], []
        layer.register_forward_pre_hook(lambda _, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True)
        for one in (layer, teacher):
            one.get_submodule(family.parts["o"]).register_forward_hook(lambda _, args, out, outputs=outputs: outputs.append(out))
        models[0](ids, use_cache=False)
        args, kwargs = calls[0]
        teacher(*args, **kwargs)
        found.append(float((outputs[0] - outputs[1]).norm() / outputs[1].norm()))
    return found


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", BIASED)
def test_noise_in_biases_is_recovered_from(kind):
    suffix = f"{FAMILIES[kind].parts['v']}.bias"
    source, student = put(Path("model"), kind), put(Path("student"), kind, noise=0.5, only=suffix)
    assert changed(source, student)
    before, after = apart(source, student, healed(student, source))
    assert after < 0.5 * before
    assert any(name.endswith(suffix) for name in changed(student, "healed"))


@pytest.mark.parametrize("kind", NORMED)
def test_queries_that_go_through_a_norm_are_left_alone_and_it_is_said(kind):
    source = put(Path("model"), kind)
    run(source, Gqa(groups=2, pool="mean"), place="plain")
    outcome = run("plain", Refit(teacher=str(source)), place="refitted")
    parts = FAMILIES[kind].parts
    touched = {name.split(".layers.")[1].split(".", 1)[1].rsplit(".", 1)[0] for name in changed("plain", "refitted")}
    assert touched == {parts["v"], parts["o"]}
    assert any(remark.startswith("refit:") and "norm" in remark for remark in outcome.plan.notes)


@pytest.mark.parametrize("kind", CLIPPED)
def test_clipped_queries_are_left_alone_and_it_is_said(kind):
    source = put(Path("model"), kind)
    run(source, Gqa(groups=2, pool="mean"), place="plain")
    outcome = run("plain", Refit(teacher=str(source)), place="refitted")
    assert not any(name.endswith(f"{FAMILIES[kind].parts['q']}.weight") for name in changed("plain", "refitted"))
    assert any(remark.startswith("refit:") and "clipped" in remark for remark in outcome.plan.notes)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_where_queries_go_through_no_norm_nothing_is_said_of_it(kind):
    source = put(Path("model"), kind)
    planned = plan(open_checkpoint(source), (Refit(teacher=str(source)),), open_checkpoint(source))
    assert not any("queries" in remark for remark in planned.notes)
    assert bool(planned.notes) == ("mlp_post_norm" in FAMILIES[kind].parts)  # of which another sentence speaks


def test_what_was_refitted_is_only_q_v_and_o():
    source = put(Path("model"), "mistral")
    run(source, Gqa(groups=2, pool="mean"), place="plain")
    healed("plain", source)
    parts = {name.split(".")[-2] for name in changed("plain", "healed")}
    assert parts == {"q_proj", "v_proj", "o_proj"}


def test_a_model_of_half_precision_is_refitted_as_it_is_stored():
    source = put(Path("model"))
    load(source).to(torch.bfloat16).save_pretrained(source)
    run(source, Gqa(groups=1, pool="mean"), place="plain")
    run(source, Gqa(groups=1, pool="mean"), Refit(), place="refitted")
    assert {tensor.dtype for tensor in tensors(Path("refitted")).values()} == {torch.bfloat16}
    plain, refitted = apart(source, "plain", "refitted")
    assert refitted < 0.9 * plain


@pytest.mark.few(4)
@pytest.mark.parametrize("seed", range(4))
def test_of_a_text_that_says_nothing_little_is_learnt(seed, monkeypatch):
    """Of noise in 64 tokens all that can be learnt is wrong, and most of it is not confirmed by the window held out, of 8 tokens. Without that it is done."""
    source = put(Path("model"))
    run(source, Gqa(groups=2, pool="pca"), place="plain")
    draw = random.Random(seed)
    Path("noise.txt").write_text("".join(chr(draw.randrange(32, 127)) for _ in range(64)))
    noise = {"calibrate": "noise.txt", "calibration_tokens": 64}
    run("plain", Refit(teacher=str(source)), place="refitted", **noise)
    monkeypatch.setattr("effconvert.heal._layer.ridge", lambda fit, held: ridge(fit, fit))
    monkeypatch.setattr(Problem, "held_out", Problem.fit_windows)
    run("plain", Refit(teacher=str(source)), place="trusting", **noise)
    plain, refitted, trusting = apart(source, "plain", "refitted", "trusting")
    assert refitted < 2 * plain  # measured: 1.0 to 1.7 times
    assert trusting > 2.5 * plain


def test_fewer_tokens_than_inputs_are_regularised_and_it_is_said():
    wide = {"hidden_size": 96, "num_key_value_heads": 4}
    source = put(Path("model"), **wide)
    outcome = run(source, Gqa(groups=2, pool="mean"), Refit(), calibration_tokens=64)
    assert any("64 tokens for 96 inputs" in remark and "regularised" in remark for remark in outcome.plan.notes)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(Path("out")).values())
    assert not any("regularised" in remark for remark in run(source, Gqa(groups=2), Refit(), place="more", calibration_tokens=96).plan.notes)


# Fewer layers


def without_middle(layers):
    half = len(layers) // 2
    return [*layers[: half - 1], *layers[half + 1 :]]


class DropMiddle(Plain):
    """Leaves two layers in the middle out."""

    @property
    def name(self):
        return "drop-middle"

    def config(self, config):
        raw = {**config.raw, config.family.layers_key: config.layers - 2}
        if "layer_types" in raw:
            raw["layer_types"] = without_middle(raw["layer_types"])
        return type(config)(raw, config.family)

    def rewrite(self, model):
        model.layers = without_middle(model.layers)
        super().rewrite(model)


class DropLast(DropMiddle):
    """Leaves the last two layers out."""

    def rewrite(self, model):
        model.layers = model.layers[:4]
        Plain.rewrite(self, model)


DEEP = {"num_hidden_layers": 6}
LINEAR = ["llama", "mistral", "qwen2", "granite", "gemma", "phi3", "cohere", "glm", "opt", "gpt_neox"]  # nothing between down and what it is added to


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", [*LINEAR, "gpt2", "gptj", "codegen", "bloom"])
def test_after_dropping_layers_a_refit_makes_held_out_text_no_worse(kind):
    source = put(Path("model"), kind, **{FAMILIES[kind].layers_key: 4})
    run(source, DropMiddle(), place="plain")
    run(source, DropMiddle(), Refit(), place="refitted")
    plain, refitted = apart(source, "plain", "refitted")
    assert plain > 1e-3
    assert refitted < plain
    down = f".0.{FAMILIES[kind].parts['down']}.weight"
    assert any(name.endswith(down) for name in changed("plain", "refitted"))  # of the last layer before the gap
    if kind in ("llama", "gpt2"):
        assert apart(source, healed("plain", source)) == pytest.approx([refitted], rel=1e-4)


@pytest.mark.parametrize("kind", ["olmo2", "bert"])
def test_behind_a_norm_dropped_layers_make_nothing_worse(kind):
    source = put(Path("model"), kind, **DEEP)
    run(source, DropMiddle(), place="plain")
    run(source, DropMiddle(), Refit(), place="refitted")
    plain, refitted = apart(source, "plain", "refitted")
    assert refitted <= plain * 1.001
    assert not any(FAMILIES[kind].parts["down"] in name and "attention" not in name for name in changed("plain", "refitted"))


def test_a_multiplier_of_the_residual_is_counted_in():
    """Granite multiplies what an MLP adds: what is missing has to be divided by it, or too much or too little is added."""
    left = []
    for multiplier in (1.0, 0.25, 3.0):
        source = put(Path(f"{multiplier}"), "granite", residual_multiplier=multiplier, **DEEP)
        run(source, DropMiddle(), place=f"{multiplier}-plain")
        run(source, DropMiddle(), Refit(), place=f"{multiplier}-refitted")
        plain, refitted = (missing(source, f"{multiplier}-{which}") for which in ("plain", "refitted"))
        left.append(refitted / plain)
    assert left == pytest.approx([left[0]] * 3, abs=0.05)
    assert max(left) < 0.95


@torch.inference_mode()
def missing(original, folder):
    """Return how far the state after the layer before the gap is from that after the gap in the original."""
    states = [load(place)(heldout(), output_hidden_states=True).hidden_states for place in (original, folder)]
    return float((states[0][4] - states[1][2]).norm())


def test_which_layers_a_shallower_student_stands_for_is_known_by_its_norms():
    source = put(Path("model"), **DEEP)
    run(source, DropMiddle(), place="plain")
    student, teacher = open_checkpoint(Path("plain")), open_checkpoint(source)
    assert stand_for(student, teacher) == [range(1), range(1, 4), range(4, 5), range(5, 6)]
    run(source, DropLast(), place="short")
    assert stand_for(open_checkpoint(Path("short")), teacher) == [range(1), range(1, 2), range(2, 3), range(3, 6)]
    assert stand_for(teacher, teacher) == [range(index, index + 1) for index in range(6)]


# What does not fit


def unfit(student, teacher):
    with pytest.raises(ModelError) as refusal:
        healed(student, teacher)
    assert not list(Path().glob("healed*"))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_another_width_is_refused_with_both():
    told = unfit(put(Path("student")), put(Path("teacher"), hidden_size=64))
    assert "64 wide" in told
    assert "student 32" in told


def test_a_deeper_student_is_refused_with_both():
    told = unfit(put(Path("student"), num_hidden_layers=3), put(Path("teacher")))
    assert "teacher has 2 layers and the student 3" in told


def test_a_shallower_student_with_norms_of_its_own_is_refused():
    student = put(Path("student"), noise=0.5, only="input_layernorm.weight")
    told = unfit(student, put(Path("teacher"), **DEEP))
    assert "layer 0 of the student has the norms of none" in told


def test_a_teacher_with_other_heads_leaves_o_to_be_refitted():
    """Its scores are other ones, its output is not."""
    source = put(Path("teacher"))
    student = put(Path("student"), num_attention_heads=2, num_key_value_heads=2, head_dim=16, noise=0.5, only="o_proj.weight")
    healed(student, source)
    assert {name.split(".")[-2] for name in changed(student, "healed")} <= {"o_proj"}


@pytest.mark.parametrize("smaller", [{"vocab_size": 64}, {"n_positions": 16}], ids=["vocabulary", "positions"])
def test_a_teacher_that_cannot_read_the_text_is_no_traceback(command, smaller):
    student, teacher = put(Path("student"), "gpt2"), put(Path("teacher"), "gpt2", **smaller)
    result = command("refit", student, "--teacher", teacher, "-o", "out", "--no-verify", "--calibrate", "text.txt", "--calibration-tokens", TOKENS)
    assert result.exit_code == 0 or one_line(result)


def test_two_teachers_are_refused():
    source, other = put(Path("model")), put(Path("other"))
    with pytest.raises(OptionError, match="different teachers"):
        run(source, Refit(teacher=str(source)), Refit(teacher=str(other)))


def test_alone_a_refit_needs_a_teacher(command):
    source = put(Path("model"))
    result = command("refit", source, "-o", "out")
    assert result.exit_code == 2
    assert "--teacher is needed" in one_line(result)
    assert not Path("out").exists()


@pytest.mark.parametrize(("teacher", "code"), [("nowhere", 2), ("empty", 2), ("broken", 1)])
def test_a_teacher_that_is_no_model_is_refused(command, teacher, code):
    source = put(Path("model"))
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    result = command("refit", source, "--teacher", teacher, "-o", "out")
    assert result.exit_code == code
    assert teacher in one_line(result)
    assert not Path("out").exists()


# Doors


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def test_all_doors_give_the_same_bytes(command):
    source = put(Path("model"))
    run(source, Gqa(groups=2), Refit(), place="objects")
    effconvert.convert(source, {"gqa": {"groups": 2}}, "refit", output="python", verify=False, calibrate="text.txt", calibration_tokens=TOKENS)
    asked = ("--no-verify", "--calibrate", "text.txt", "--calibration-tokens", TOKENS)
    assert command("gqa", "--groups", 2, "--refit", source, "-o", "option", *asked).exit_code == 0
    recipe = {"model": "model", "output": "recipe", "steps": [{"gqa": {"groups": 2}}, "refit"], "verify": False}
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "calibrate": "text.txt", "calibration-tokens": TOKENS}))
    assert command("run", "recipe.yaml").exit_code == 0
    assert len({weights(place) for place in ("objects", "python", "option", "recipe")}) == 1
    run(source, Gqa(groups=2), place="plain")
    assert weights("plain") != weights("recipe")


def test_after_a_step_that_looks_at_nothing_two_commands_are_one_recipe(command):
    """A mean needs no calibration, so that both refits see the same; the student's tensors are stored as they were rounded."""
    source = put(Path("model"))
    run(source, Gqa(groups=2, pool="mean"), Refit(), place="together")
    asked = ("--no-verify", "--calibrate", "text.txt", "--calibration-tokens", TOKENS)
    assert command("gqa", "--groups", 2, "--pool", "mean", source, "-o", "one", *asked).exit_code == 0
    assert command("refit", "one", "--teacher", source, "-o", "two", *asked).exit_code == 0
    assert weights("two") == weights("together")


def test_the_written_recipe_makes_the_same_bytes_again(command):
    source = put(Path("model"))
    asked = ("--no-verify", "--calibrate", "text.txt", "--calibration-tokens", TOKENS)
    assert command("gqa", "--groups", 2, "--refit", source, "-o", "out", *asked).exit_code == 0
    assert command("run", "out/effconvert.yaml", "-o", "again").exit_code == 0
    assert weights("again") == weights("out")
    student = shutil.copytree("out", "student")
    assert command("refit", student, "--teacher", source, "-o", "alone", *asked).exit_code == 0
    replay(read(Path("alone/effconvert.yaml"), output=Path("alone-again"), verify=False))
    assert weights("alone-again") == weights("alone")


def test_the_same_refit_twice_gives_the_same_bytes():
    source = put(Path("model"))
    for place in ("one", "two"):
        run(source, Gqa(groups=1), Refit(), place=place)
    assert weights("one") == weights("two")


def test_a_refitted_model_is_verified_and_recorded():
    source = put(Path("model"))
    outcome = run(source, Gqa(groups=2), Refit(), verify=True, tokens=120, context=30, text=Path("text.txt"))
    assert outcome.report.after.quality.kl > 0
    manifest = json.loads(Path("out/effconvert.json").read_text())
    assert [next(iter(step)) for step in manifest["recipe"]] == ["gqa", "refit"]
    assert manifest["calibration"]["tokens"] == TOKENS


def test_every_eighth_text_is_held_out_however_many_a_batch_has():
    batches = [torch.zeros(texts, 1) for texts in (2, 8, 3, 2, 8)]
    held = [_is_held_out(batch, row, batches) for batch, texts in enumerate(batches) for row in range(len(texts))]
    assert held == [int((text + 1) % 8 == 0) for text in range(23)]
