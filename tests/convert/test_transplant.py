"""An instruct model's tensors in a model converted from its base: exact copies, what stays, files, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import effconvert
from effconvert.convert import write as writing
from effconvert.convert.transplant import _chosen
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal.refit import Refit
from effconvert.heal.transplant import Transplant
from effconvert.hub.card_data import history
from effconvert.recipe import read
from effconvert.replay import replay
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.ffn.moe import Moe
from effconvert.surgery.mixing.linear import Linear
from tests.heal.healing import opened, prose, put, run, tensors
from tests.surgery.test_prune_layers import deep

BOTH = Transplant(base="base", instruct="instruct")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def pair(kind="llama", **changes):
    """A base and a model that it was trained on to, with another end of text, a chat template and a licence of its own."""
    put(Path("base"), kind, **changes)
    put(Path("instruct"), kind, noise=0.5, only="weight", **changes)
    config = json.loads(Path("instruct/config.json").read_text())
    Path("instruct/config.json").write_text(json.dumps({**config, "eos_token_id": 3}))
    Path("instruct/generation_config.json").write_text(json.dumps({"eos_token_id": 3, "max_length": 60}))
    Path("instruct/chat_template.jinja").write_text(TEMPLATE)
    Path("base/LICENSE").write_text("base")
    Path("instruct/LICENSE").write_text("instruct")


def rewrite(place, factor):
    """Multiply all weights of a model."""
    save_file({name: factor * tensor for name, tensor in tensors(Path(place)).items()}, Path(place, "model.safetensors"), {"format": "pt"})


def same(one, other):
    one, other = tensors(Path(one)), tensors(Path(other))
    assert one.keys() == other.keys()
    return {name for name in one if torch.equal(one[name], other[name])}


def told(place="out"):
    return json.loads(Path(place, "effconvert.json").read_text())["transplant"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_where_all_was_kept_it_is_the_instruct_model_converted(kind):
    pair(kind, **deep(kind))
    dropping = PruneLayers(layers="1")
    run("base", dropping, place="converted")
    run("instruct", dropping, place="expected")
    run("converted", BOTH)
    assert same("out", "expected") == {*tensors(Path("expected"))}
    assert told()["left"] == []
    assert told()["parameters"] == sum(tensor.numel() for tensor in tensors(Path("out")).values())


def test_experts_that_are_copies_of_an_ffn_get_the_instruct_models():
    pair(attention_bias=False, mlp_bias=False)
    for place in ("base", "instruct"):
        run(place, Moe(experts=4, top_k=2), place=f"{place}-moe")
    run("base-moe", BOTH)
    routers = {name for name in tensors(Path("out")) if ".gate." in name}
    assert {*told()["left"]} == routers
    assert same("out", "instruct-moe") >= {*tensors(Path("out"))} - routers


@pytest.mark.parametrize("technique", [Gqa(groups=1, pool="mean"), Linear()])
def test_what_the_conversion_changed_stays_and_is_listed(technique):
    pair()
    run("base", technique, place="converted")
    outcome = run("converted", BOTH, verify=True, tokens=64, context=16)
    record, everything = told(), {*tensors(Path("out"))}
    base, out = tensors(Path("base")), tensors(Path("out"))
    changed = {name for name in everything if name not in base or not torch.equal(base[name], tensors(Path("converted"))[name])}
    assert {*record["left"]} == changed
    assert changed
    assert same("out", "converted") >= changed
    assert all(torch.equal(out[name], tensors(Path("instruct"))[name]) for name in everything - changed)
    assert (record["tensors"], record["of"]) == (len(everything - changed), len(everything))
    note = next(note for note in outcome.plan.notes if "become those of instruct" in note)
    assert f"{len(everything - changed)} of {len(everything)} tensors" in note
    assert outcome.report.after.parameters == outcome.report.before.parameters
    opened("out")


def test_neighbours_in_files_of_the_same_layout():
    pair()
    shutil.copytree("base", "converted")
    changed = sorted(tensors(Path("base")))[::2]
    save_file({name: tensor + (name in changed) for name, tensor in tensors(Path("base")).items()}, "converted/model.safetensors", {"format": "pt"})
    run("converted", BOTH)
    assert sorted(told()["left"]) == changed
    assert same("out", "converted") >= {*changed}
    assert same("out", "instruct") >= {*tensors(Path("base"))} - {*changed}


def test_biases_of_zero_are_told_apart_by_the_tensors_beside_them():
    weights = {"layers.0.w": ["layers.1.w"], "layers.0.b": ["layers.0.b", "layers.1.b"], "norm": ["norm", "other"], "twins": ["one", "two"]}
    base = {f"layers.{index}.{name}": (index, name) for index in (0, 1) for name in "wb"}
    found = _chosen(weights, {"layers.0.w": (0, "w"), "layers.0.b": (0, "b")}, base)
    assert found == {"layers.0.w": "layers.1.w", "layers.0.b": "layers.1.b", "norm": "norm"}


def test_tokenizer_template_generation_and_special_tokens_are_the_instruct_models():
    pair()
    run("base", Gqa(groups=1, pool="mean"), place="converted")
    run("converted", BOTH)
    assert Path("out/chat_template.jinja").read_text() == TEMPLATE
    assert json.loads(Path("out/generation_config.json").read_text())["eos_token_id"] == 3
    config, before = (json.loads(Path(place, "config.json").read_text()) for place in ("out", "converted"))
    assert config.pop("eos_token_id") == 3
    before.pop("eos_token_id")
    assert config == before
    assert Path("out/LICENSE").read_text() == "base"


def test_the_record_the_recipe_and_the_card():
    pair()
    run("base", Gqa(groups=1, pool="mean"), place="converted")
    run("converted", BOTH)
    manifest = json.loads(Path("out/effconvert.json").read_text())
    assert [*history(manifest).techniques] == ["gqa", "transplant"]
    assert not history(manifest).healed
    (recipe,) = read(Path("out/effconvert.yaml"), output="again")
    assert (recipe.model, recipe.steps) == ("converted", (BOTH,))
    assert effconvert.transplant("converted", base="base", instruct=Path("instruct"), output="again", verify=False).output == Path("again")
    assert same("again", "out") == {*tensors(Path("out"))}


def test_a_run_that_was_killed_goes_on_and_one_that_is_done_is_known(monkeypatch):
    pair()
    run("base", Gqa(groups=1, pool="mean"), place="converted")

    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_others", dying)
        with pytest.raises(KeyboardInterrupt):
            run("converted", BOTH)
    assert run("converted", BOTH).resumed == 1
    outcome = effconvert.convert.run.convert("converted", (BOTH,), effconvert.options.RunOptions(output=Path("out"), verify=False), reuse=True)
    assert outcome.already_there
    rewrite("instruct", 1.5)
    with pytest.raises(OptionError, match="out exists"):
        effconvert.convert.run.convert("converted", (BOTH,), effconvert.options.RunOptions(output=Path("out"), verify=False), reuse=True)


def test_recipes_that_convert_transplant_and_distil_in_one_file():
    pair()
    Path("text.txt").write_text(prose())
    Path("recipes.yaml").write_text("""
model: base
output: converted
verify: false
steps: [{gqa: {groups: 1, pool: mean}}]
---
model: converted
output: moved
verify: false
steps: [{transplant: {base: base, instruct: instruct}}]
---
model: moved
output: trained
verify: false
steps: [{distill: {teacher: instruct, data: text.txt, window: 32, batch-tokens: 128, train-tokens: 1024, rate: 0.003}}]
---
model: trained
output: thinner
verify: false
steps: [{streaming: {window: 16}}]
""")
    for dry_run in (True, False):
        assert len(replay(read(Path("recipes.yaml")), dry_run)) == 4
    assert told("moved")["left"]
    assert [*history(json.loads(Path("thinner/effconvert.json").read_text())).techniques] == ["gqa", "transplant", "distill", "streaming"]


def test_a_dry_run_writes_nothing():
    pair()
    run("base", Gqa(groups=1, pool="mean"), place="converted")
    before = {path.name for path in Path().iterdir()}
    assert "become those of instruct" in " ".join(run("converted", BOTH, dry_run=True).plan.notes)
    assert {path.name for path in Path().iterdir()} - {"cache"} == before - {"cache"}


@pytest.mark.parametrize("place", ["base", "instruct"])
def test_an_output_in_place_of_what_it_is_made_from_is_refused(place):
    pair()
    run("base", Gqa(groups=1, pool="mean"), place="converted")
    before = Path(place, "config.json").read_bytes()
    with pytest.raises(OptionError, match="lie one inside the other"):
        run("converted", BOTH, place=place, overwrite=True)
    assert Path(place, "config.json").read_bytes() == before


def renamed():
    shutil.move("base", "other-name")


def without_manifest():
    Path("converted/effconvert.json").unlink()


@pytest.mark.parametrize(
    ("change", "base", "message"), [(renamed, "other-name", "effconvert.json names base as what it was"), (without_manifest, "base", "no effconvert.json")]
)
def test_what_only_the_tensors_say_is_noted(change, base, message):
    pair()
    run("base", Gqa(groups=1, pool="mean"), place="converted")
    change()
    outcome = run("converted", Transplant(base=base, instruct="instruct"))
    assert message in " ".join(outcome.plan.notes)


def trained():
    rewrite("converted", 1.5)


def turned():
    config = json.loads(Path("instruct/config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    Path("instruct/config.json").write_text(json.dumps(config))


def many_heads():
    put(Path("instruct"), num_attention_heads=8, num_key_value_heads=8, head_dim=4)


REFUSALS = [
    (lambda: put(Path("instruct"), vocab_size=256), ModelError, "the base has F32 of 128 x 32 and the instruct model has F32 of 256 x 32"),
    (lambda: put(Path("instruct"), "qwen2"), ModelError, "--base is a llama and --instruct a qwen2"),
    (lambda: put(Path("instruct"), num_hidden_layers=3), ModelError, "the base has none of that name"),
    (lambda: put(Path("instruct"), attention_bias=False), ModelError, "the instruct model has none of that name"),
    (trained, ModelError, "no tensor of converted is that of --base base: its weights were trained since, or it is of another model"),
    (turned, ModelError, "differ in what is computed .*rope_theta.* so the tensors that stay would not fit"),
    (many_heads, ModelError, r"differ in the heads \(\(4, 4, 8\) and \(8, 8, 4\)\), so the tensors that stay would not fit"),
    (lambda: shutil.rmtree("instruct"), OptionError, "instruct"),
]


def plans(refusal):
    """Plan a transplant onto the converted base, which is refused with these words, if any."""
    run("base", Gqa(groups=1, pool="mean"), place="converted")
    if refusal:
        with pytest.raises(ModelError, match=refusal):
            run("converted", BOTH, dry_run=True)
    else:
        assert "become those of instruct" in " ".join(run("converted", BOTH, dry_run=True).plan.notes)


@pytest.mark.parametrize(
    ("kind", "key", "values", "refused"),
    [("gpt_neox", "use_parallel_residual", (True, False), True), ("llama", "head_dim", (8, None), False), ("llama", "attention_dropout", (0.0, 0.1), False)],
)
def test_entries_count_that_change_what_is_computed(kind, key, values, refused):
    pair(kind)
    for folder, value in zip(("base", "instruct"), values, strict=True):
        file = Path(folder, "config.json")
        file.write_text(json.dumps({name: kept for name, kept in {**json.loads(file.read_text()), key: value}.items() if kept is not None}))
    plans("differ in what is computed ." + key if refused else "")


@pytest.mark.parametrize("used", [False, True])
def test_windows_count_only_where_they_are_used(used):
    for folder, most in (("base", 4), ("instruct", 1)):
        put(Path(folder), "qwen2", noise=0.5 * (folder == "instruct"), use_sliding_window=used, sliding_window=8, max_window_layers=most)
        config = json.loads(Path(folder, "config.json").read_text())
        Path(folder, "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "layer_types"}))
    plans(r"differ in the windows of their layers \(\[None, None\] and \[None, 8\]\)" if used else "")


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS)
def test_models_that_do_not_belong_together_are_refused(change, error, message):
    pair()
    run("base", Gqa(groups=1, pool="mean"), place="converted")
    change()
    with pytest.raises(error, match=message):
        run("converted", BOTH)
    assert {path.name for path in Path().iterdir()} <= {"base", "instruct", "converted", "text.txt", "cache"}


def test_another_base_than_the_one_that_was_converted_is_refused():
    pair()
    run("base", Gqa(groups=1, pool="mean"), place="converted")
    put(Path("stranger"), noise=0.2)
    with pytest.raises(OptionError, match=r"converted from base by its effconvert\.json, and only .* of its .* tensors are those of --base stranger"):
        run("converted", Transplant(base="stranger", instruct="instruct"))


@pytest.mark.parametrize("steps", [(BOTH, Refit(teacher="base")), (Gqa(groups=1, pool="mean"), BOTH)])
def test_it_is_a_conversion_of_its_own(steps):
    pair()
    with pytest.raises(OptionError, match="transplant compares a written model with its base, so it is a conversion of its own"):
        run("base", *steps)
