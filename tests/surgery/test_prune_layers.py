"""Layers that go, whole or in part: what is left computes what the original does where they add nothing."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

import effconvert.modeling
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.sources import cache
from effconvert.convert import decide
from effconvert.convert.originals import stand_for
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.heal import _forward
from effconvert.heal._activations import Activations
from effconvert.heal._forward import Forward
from effconvert.heal.refit import Refit, after_gaps
from effconvert.modeling.loading import class_of
from effconvert.options import RunOptions
from effconvert.progress import NoProgress
from effconvert.recipe import read
from effconvert.replay import replay
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.mixing.streaming import Streaming
from tests.heal.healing import TOKENS, apart, heldout, killed_saving, prose, put
from tests.mixers.mixing import AS_OTHERS, with_cache
from tests.models import DECODERS, heed_caps, logits, save, tiny

DEPTH = 5
TYPES = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
WITHIN = {kind: family.adds_inside for kind, family in FAMILIES.items()}  # places that add to the stream themselves
ADDING = [  # layers that add to the stream, and are the identity where they add nothing
    kind for kind, family in FAMILIES.items() if not family.norms_stream and "attention" not in WITHIN[kind]
]
PARTS = [(kind, "attention") for kind in ADDING] + [(kind, "mlp") for kind in ADDING if FAMILIES[kind].ffn and "ffn" not in WITHIN[kind]]
PLACES = {"attention": "o", "mlp": "down"}
ALTERNATING = ("gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4")


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def deep(kind, layers=DEPTH):
    """What makes a tiny model that deep."""
    key = FAMILIES[kind].layers_key
    types = {**dict.fromkeys(ALTERNATING, TYPES), "modernbert": ["full_attention", *TYPES[:-1]]}
    listed = {"layer_types": types[kind][:layers]} if kind in types else {"no_rope_layers": [1, 0, 1, 1, 0][:layers]} if kind == "smollm3" else {}
    if kind == "gpt_neo":
        listed = {"attention_types": [[["global", "local"], layers // 2], [["local"], layers % 2]]}
    return {key: layers, **listed}


def layers_of(model):
    return model.base_model.get_submodule(FAMILIES[model.config.model_type].layers)


def silent(model, index, part):
    """Have the attention or the MLP of a layer add nothing."""
    family = FAMILIES[model.config.model_type]
    with torch.no_grad():
        for parameter in layers_of(model)[index].get_submodule(family.ffn if family.experts_key and part == "down" else family.parts[part]).parameters():
            parameter.zero_()


def run(source, *steps, place="out", **more):
    given = {"calibrate": "text.txt", "calibration_tokens": TOKENS, "verify": False, **more}
    return convert(str(source), steps, RunOptions(output=Path(place), **given))


def opened(folder):
    model, info = class_of(read_config(Path(folder))).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return heed_caps(model.eval())


def asked(folder="out"):
    """What the recipe beside the weights says of the step."""
    return yaml.safe_load((Path(folder) / "effconvert.yaml").read_text())["steps"][0]["prune-layers"]


def passing(forward):
    """What a layer answers, a tensor or a tuple, with the hidden states as they came."""

    def passed(hidden, *args, **more):
        answer = forward(hidden, *args, **more)
        return (hidden, *answer[1:]) if isinstance(answer, tuple) else hidden

    return passed


# What is left


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", FAMILIES)
def test_without_whole_layers_a_model_is_its_own_class_and_computes_what_the_others_do(kind):
    source = save(tiny(kind, **deep(kind)), Path("model"))
    outcome = run(source, PruneLayers(layers="1,-2"), verify=True)
    expected = opened(source)
    for layer in (layers_of(expected)[1], layers_of(expected)[3]):
        layer.forward = passing(layer.forward)
    assert read_config(Path("out")).needs_effconvert is False
    torch.testing.assert_close(logits(opened("out")), logits(expected), rtol=1e-5, atol=1e-5)
    assert outcome.plan.after.kv_bytes == outcome.plan.before.kv_bytes * 3 // 5


@pytest.mark.parametrize(("kind", "only"), PARTS, ids=map("-".join, PARTS))
def test_without_attention_or_mlp_a_layer_computes_what_it_does_where_that_adds_nothing(kind, only):
    source = save(tiny(kind, **deep(kind)), Path("model"))
    outcome = run(source, PruneLayers(layers="0,3", only=only))
    expected = opened(source)
    for index in (0, 3):
        silent(expected, index, PLACES[only])
    found = opened("out")
    assert logits(expected).std() > 0.1
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-5)
    assert found.num_parameters() == outcome.plan.after.parameters < expected.num_parameters()


def layers_of_converted(model):
    return model.base_model.get_submodule(FAMILIES[model.config.model_type.removeprefix("effconvert_")].layers)


def test_the_norm_goes_with_what_it_is_for_but_not_where_both_read_it():
    for kind, lacks in {
        "llama": {"attn_norm"},
        "gemma2": {"attn_norm", "attn_post_norm"},
        "cohere": set(),
        "olmo2": {"attn_post_norm", "q_norm", "k_norm"},
    }.items():
        config = read_config(save(tiny(kind), Path(kind))).with_skips("attention", [1])
        assert config.lacks(1) == {"q", "k", "v", "o", *lacks}
        assert config.lacks(0) == set()
    assert read_config(Path("llama")).with_skips("ffn", [1]).lacks(1) == {"gate", "up", "down", "mlp_norm"}
    assert read_config(Path("cohere")).with_skips("ffn", [1]).lacks(1) == {"gate", "up", "down"}


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind in ADDING])
def test_tokens_one_by_one_are_the_whole_text_though_layer_0_does_not_attend(kind):
    source = save(tiny(kind, **deep(kind)), Path("model"))
    run(source, PruneLayers(layers="0,2", only="attention"))
    model, ids = opened("out"), torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = effconvert.modeling.cache_for(model.config)
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        steps = [model(ids[:, at : at + 4], use_cache=True, **with_cache(model, cache)).logits for at in range(0, 16, 4)]
        assert cache.get_seq_length() == 16
        if not any(read_config(Path("out")).windows()):
            cache.crop(-6)
            assert cache.get_seq_length() == 10
            steps = [torch.cat(steps, 1)[:, :10], model(ids[:, 10:16], use_cache=True, **with_cache(model, cache)).logits]
        steps += [model(ids[:, at : at + 1], use_cache=True, **with_cache(model, cache)).logits for at in range(16, 20)]
        written = model.generate(ids[:, :6], max_new_tokens=6, do_sample=False, eos_token_id=None)
        again = ids[:, :6]
        for _ in range(6):
            again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(written, again)


def test_a_cache_that_counts_by_layer_0_is_refused_where_that_does_not_attend():
    run(save(tiny("llama", **deep("llama")), Path("model")), PruneLayers(layers="0", only="attention"))
    model = opened("out")
    with pytest.raises(ValueError, match="takes its length from layer 0"):
        model(torch.tensor([[3, 4, 5]]), **with_cache(model, transformers.DynamicCache(config=model.config)))


def test_a_stock_class_does_not_open_a_model_without_attention_as_one_with():
    run(save(tiny("llama", **deep("llama")), Path("model")), PruneLayers(layers="3", only="attention"))
    assert isinstance(AutoModelForCausalLM.from_pretrained("out"), transformers.LlamaForCausalLM)
    assert type(AutoModelForCausalLM.from_pretrained("out")).__name__ == "EffconvertLlamaForCausalLM"
    with pytest.raises(Exception, match="layer_types"):
        transformers.LlamaForCausalLM.from_pretrained("out")


def test_what_layers_skip_survives_being_saved_by_transformers_and_pruned_again():
    source = save(tiny("llama", **deep("llama", 12)), Path("model"))
    run(source, PruneLayers(layers="3,11", only="attention"))
    save(opened("out"), Path("again"))
    assert set(json.loads(Path("again/config.json").read_text())["per_layer_config"]) == {"03", "11"}
    assert torch.equal(logits(opened("again")), logits(opened("out")))
    run(Path("again"), PruneLayers(layers="5", only="mlp"), place="both")
    run(Path("both"), PruneLayers(layers="0,4,11"), place="short")
    config = read_config(Path("short"))
    assert [config.skips(index) for index in range(9)] == [set(), set(), {"attention"}, {"ffn"}, *[set()] * 5]
    model = opened("both")
    for index in (0, 4, 11):
        layers_of_converted(model)[index].forward = lambda hidden, *_, **__: hidden
    torch.testing.assert_close(logits(opened("short")), logits(model), rtol=1e-5, atol=1e-5)
    run(Path("short"), PruneLayers(layers="2-3"), place="stock")
    assert "per_layer_config" not in json.loads(Path("stock/config.json").read_text())
    assert read_config(Path("stock")).needs_effconvert is False


def test_techniques_in_other_layers_move_with_them():
    source = save(tiny("llama", **deep("llama")), Path("model"))
    run(source, Streaming(window=4, layers="2,4"), PruneLayers(layers="1,4", only="mlp"), PruneLayers(layers="1"), place="out")
    config = read_config(Path("out"))
    assert [(record.technique, record.layers) for record in config.replaced] == [("streaming", (1, 3))]
    assert [config.skips(index) for index in range(4)] == [set(), set(), set(), {"ffn"}]
    model = opened("out")
    assert torch.equal(logits(opened(save(model, Path("again")))), logits(model))


def test_what_follows_on_a_model_without_some_attention_leaves_those_layers_alone():
    source = put(Path("model"), **deep("llama"))
    run(source, PruneLayers(layers="0,3", only="attention"))
    run(Path("out"), Gqa(groups=2), Refit(), place="grouped", verify=True, text=Path("text.txt"), tokens=64, context=32)
    assert read_config(Path("grouped")).kv_heads == 2
    assert list(map(read_config(Path("grouped")).skips, range(DEPTH))) == [{"attention"}, set(), set(), {"attention"}, set()]
    with pytest.raises(OptionError, match=r"layer 0 has no attention, so nothing can be put in its place; leave it out of --layers"):
        run(Path("out"), Streaming(window=8), place="mixed")
    run(Path("out"), Streaming(window=8, layers="1-2,4"), place="mixed", verify=True, text=Path("text.txt"), tokens=64, context=32)


# Config keys that speak of layers


def config_of(kind, **said):
    keys = {"num_hidden_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 128, **said}
    return Config({"model_type": kind, **keys}, FAMILIES[kind])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}),
        ("modernbert", {}),
        ("olmo3", {}),
        ("cohere2", {}),
        ("exaone4", {}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16, "no_rope_layer_interval": 3}),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 0, 1, 1, 0, 1, 1]}),
        ("mistral", {}),
        ("llama", {}),
    ],
)
def test_the_layers_that_are_left_keep_their_windows_and_positions(kind, said, tmp_path):
    config = config_of(kind, **said)
    kept = [0, 1, 3, 6, 7]
    pruned = PruneLayers(layers="2,4-5").config(config)
    assert pruned.layers == 5
    assert pruned.windows() == [config.windows()[index] for index in kept]
    assert [pruned.rotary_of(index) for index in range(5)] == [config.rotary_of(index) for index in kept]
    (tmp_path / "config.json").write_text(json.dumps({**pruned.content, "intermediate_size": 48}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    full = [window is None for window in pruned.windows()]
    assert [kind != "sliding_attention" for kind in getattr(theirs, "layer_types", None) or ["full_attention"] * 5] == full or kind == "mistral"


def test_lists_and_numbers_of_layers_go_with_them():
    config = config_of("qwen3", mlp_only_layers=[2, 6], mlp_layer_types=list("abcdefgh"), per_layer_config={"06": {"skip": ["mlp"]}, "01": {"x": 1}})
    raw = PruneLayers(layers="0,5").config(config).raw
    assert raw["mlp_only_layers"] == [1, 4]
    assert raw["mlp_layer_types"] == list("bcdegh")
    assert raw["per_layer_config"] == {"0": {"x": 1}, "4": {"skip": ["mlp"]}}


def test_the_first_layer_of_a_modernbert_stays():
    source = put(Path("model"), "modernbert", **deep("modernbert"))
    with pytest.raises(OptionError, match="layer 0, in whose place no other can stand: the first alone has no attn_norm"):
        run(source, PruneLayers(layers="0,2"))
    for by in ("influence", "angular"):
        run(source, PruneLayers(drop=3, by=by), place=by, verify=True)
        assert "0" not in str(asked(by)["layers"]).split(",")


# How they are chosen


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "opt", "gpt_neox", "gpt2", "granite"])
@pytest.mark.parametrize("by", ["search", "influence"])
def test_the_layer_that_adds_nothing_is_chosen(kind, by):
    model = tiny(kind, **deep(kind))
    silent(model, 2, "o")
    silent(model, 2, "down")
    save(model, Path("bare"))
    source = put(Path("model"), kind, **deep(kind))
    model.save_pretrained(source)
    run(source, PruneLayers(drop=1, by=by))
    assert asked()["layers"] == "2"
    assert apart(source, Path("out"))[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("kind", "only"),
    [("llama", "attention"), ("llama", "mlp"), ("cohere", "attention"), ("cohere", "mlp"), ("modernbert", "mlp"), ("qwen3_moe", "mlp"), ("granitemoe", "mlp")],
)
@pytest.mark.parametrize("by", ["search", "influence"])
def test_the_attention_or_mlp_that_adds_nothing_is_chosen(kind, only, by):
    if kind == "modernbert" and by == "search":
        return
    source, model = put(Path("model"), kind, **deep(kind)), tiny(kind, **deep(kind))
    for index in (1, 3):
        silent(model, index, PLACES[only])
    model.save_pretrained(source)
    run(source, PruneLayers(drop=2, only=only, by=by))
    assert sorted(asked()["layers"].split(",")) == ["1", "3"]


@pytest.mark.parametrize("kind", ["llama", "bert", "modernbert"])
def test_by_angle_a_run_is_chosen_over_which_the_stream_turns_least(kind):
    source, model = put(Path("model"), kind, **deep(kind)), tiny(kind, **deep(kind))
    with torch.no_grad():
        for index in (2, 3):
            for part in ("o", "down"):
                for parameter in layers_of(model)[index].get_submodule(FAMILIES[kind].parts[part]).parameters():
                    parameter *= 0.01
    model.save_pretrained(source)
    if kind == "bert":  # whose norms turn the stream all the same
        model = opened(source)
        ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states
        turned = [float(torch.cosine_similarity(states[index], states[index + 2], dim=-1).mean()) for index in range(4)]
        best = turned.index(max(turned))
    run(source, PruneLayers(drop=2, by="angular"))
    assert asked()["layers"] == ("2,3" if kind != "bert" else f"{best},{best + 1}")


@pytest.mark.slow
def test_the_search_drops_one_after_the_other_by_what_each_costs_then(monkeypatch):
    source, tried = put(Path("model"), noise=0.3, **deep("llama", 6)), []
    real = Forward.divergence
    monkeypatch.setattr(Forward, "divergence", lambda self, *states: tried.append(real(self, *states)) or tried[-1])
    run(source, PruneLayers(drop=3))
    assert len(tried) == 6 + 1 + 1  # what added more than another one is not tried again before that one is
    gone, model = [], opened(source)
    wanted = [after_each_fourth(model, ids) for ids in calibration()]
    for _ in range(3):  # every layer, each time
        cost = {}
        for index in set(range(6)) - {*gone}:
            model = opened(source)
            for other in (*gone, index):
                layers_of(model)[other].forward = lambda hidden, *_, **__: hidden
            cost[index] = sum(apart_by(one, after_each_fourth(model, ids)) for one, ids in zip(wanted, calibration(), strict=True))
        gone.append(min(cost, key=cost.get))
    assert asked()["layers"] == ",".join(map(str, gone))


def after_each_fourth(model, ids):
    with torch.inference_mode():
        return model(ids).logits[:, 3::4].double().log_softmax(-1)


def apart_by(wanted, found):
    """Sum of KL(wanted || found)."""
    return float((wanted.exp() * (wanted - found)).sum())


def calibration():
    from effconvert.convert.calibration import prepare

    return prepare(plan(open_checkpoint(Path("model")), ()), RunOptions(calibrate="text.txt", calibration_tokens=TOKENS)).batches


def divergence(original, folder):
    """KL in nats after every fourth token of the calibration text, by transformers."""
    models = [opened(place) for place in (original, folder)]
    pairs = [[after_each_fourth(model, ids) for model in models] for ids in calibration()]
    return sum(apart_by(*pair) for pair in pairs) / sum(one[..., 0].numel() for one, _ in pairs)


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", [*(kind for kind in DECODERS if kind not in AS_OTHERS), "untied"])
def test_the_divergence_is_that_of_the_predictions_a_slice_of_the_vocabulary_at_a_time(kind, monkeypatch):
    """Families scale and cap their logits, narrow what the head reads, or keep it under another name."""
    more = {
        "llama": {"tie_word_embeddings": True},
        "gemma2": {"final_logit_softcapping": 2.0},
        "granite": {"logits_scaling": 3.0},
        "cohere": {"logit_scale": 0.3},
        "falcon": {"alibi": True},  # which its class adds twice in eager attention, and once by default
    }
    kind, changes = ("llama", {}) if kind == "untied" else (kind, more.get(kind, {}))
    source = put(Path("model"), kind, **deep(kind, 3), **changes)
    run(source, PruneLayers(layers="1"))
    planned = plan(open_checkpoint(source), ())
    forward = Forward(lambda: planned.models("cpu")[-1], calibration(), None)
    with torch.no_grad():
        arrived = [forward.begin(10**6)]
        for index in range(3):
            arrived.append(forward.layer(index, arrived[-1]))
        last, expected = forward.layer(2, arrived[1]), divergence(source, Path("out"))
        assert expected > 1e-3
        for rows in (50, 1000):
            monkeypatch.setattr(_forward, "ROWS", rows)
            assert forward.divergence(arrived[-1], last) == pytest.approx(expected, rel=1e-4), rows
            assert forward.divergence(last, last) == pytest.approx(0, abs=1e-6), rows


# What was chosen is what everything speaks of


def counting(monkeypatch):
    begun = []
    real = Forward.begin
    monkeypatch.setattr(Forward, "begin", lambda self, tokens: begun.append(tokens) or real(self, tokens))
    return begun


def test_the_recipe_the_manifest_and_a_dry_run_name_the_layers_and_nobody_chooses_twice(monkeypatch, command):
    begun = counting(monkeypatch)
    source = put(Path("model"), **deep("llama"))
    planned = run(source, PruneLayers(drop=2), dry_run=True)
    chosen = planned.plan.recipe[0]["prune-layers"]["layers"]
    assert len(chosen.split(",")) == 2
    run(source, PruneLayers(drop=2))
    assert asked()["layers"] == chosen
    assert asked()["drop"] is None
    manifest = json.loads(Path("out/effconvert.json").read_text())
    assert manifest["recipe"] == planned.plan.recipe
    said = f"prune-layers --drop 2 chose prune-layers --layers {chosen} (by search, on up to 4,096 tokens; text: text.txt, {TOKENS:,} tokens)"
    assert manifest["choices"] == [said]
    assert f"# {said}\n" in Path("out/effconvert.yaml").read_text()
    assert said in Path("out/README.md").read_text()
    assert planned.plan.notes == [f"{said}; the choice is kept in {cache()} for the next run"]
    assert manifest["fingerprint"] == planned.plan.fingerprint
    replay(read(Path("out/effconvert.yaml"), output=Path("again"), verify=False))
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert len(begun) == 1
    run(source, PruneLayers(drop=2), place="other", calibration_tokens=512)
    run(source, PruneLayers(drop=2, only="attention"), place="third")
    assert len(begun) == 3
    result = command("prune-layers", source, "--drop", 2, "--calibrate", "text.txt", "--calibration-tokens", TOKENS, "--no-verify")
    assert result.exit_code == 0, result.output
    assert Path("model-prune-layers-2/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    monkeypatch.setattr(decide, "code_of", lambda _: "of a later version")
    run(source, PruneLayers(drop=2), place="fourth")
    assert len(begun) == 4


def test_a_recipe_may_leave_open_which_ones_and_is_found_done(monkeypatch):
    begun = counting(monkeypatch)
    put(Path("model"), **deep("llama"))
    recipe = {"model": "model", "output": "out", "steps": [{"prune-layers": {"drop": 1, "by": "influence"}}, "refit"], "verify": False}
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "calibrate": "text.txt", "calibration-tokens": TOKENS}))
    first, second = (replay(read(Path("recipe.yaml")))[0].conversions[0] for _ in range(2))
    assert (first.already_there, second.already_there, len(begun)) == (False, True, 1)


def test_layers_are_chosen_of_what_the_steps_before_leave():
    source = put(Path("model"), **deep("llama"))
    run(source, PruneLayers(layers="1"), PruneLayers(drop=2), place="once")
    run(source, PruneLayers(layers="1"), place="one")
    run(Path("one"), PruneLayers(drop=2), place="two")
    assert Path("once/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    run(source, Gqa(groups=2, pool="mean"), PruneLayers(drop=1), place="grouped")
    with pytest.raises(OptionError, match="gqa before it is not fitted yet; convert twice, or put prune-layers first, where gqa can follow"):
        run(source, Gqa(groups=2), PruneLayers(drop=1), place="fitted")
    assert not Path("fitted").exists()


class Bars(NoProgress):
    """Keeps what bars are told: what, of how many, how many are done."""

    def __init__(self):
        self.told = []

    def bar(self, what, total, unit):
        entry = [what, total, 0]
        self.told.append(entry)
        return nullcontext(lambda moved: entry.__setitem__(2, entry[2] + moved))


@pytest.mark.parametrize(("by", "steps"), [("search", DEPTH + 2), ("influence", DEPTH), ("angular", DEPTH)])
def test_a_bar_says_how_far_the_choice_is(by, steps):
    source, bars = put(Path("model"), **deep("llama")), Bars()
    options = RunOptions(output=Path("out"), calibrate="text.txt", calibration_tokens=TOKENS, verify=False)
    convert(str(source), (PruneLayers(drop=2, by=by),), options, bars)
    assert bars.told[0][:2] == ["prune-layers: choosing", steps]
    assert bars.told[0][2] >= DEPTH


# What makes up for them


def changed(one, other):
    """The names in layers whose tensors differ between two models of one layout."""
    before, after = open_checkpoint(Path(one)), open_checkpoint(Path(other))
    pairs = [
        (stored.read("cpu"), after.layers[index][name].read("cpu"), f"{index}.{name}")
        for index in range(after.config.layers)
        for name, stored in before.layers[index].items()
    ]
    return {name for first, second, name in pairs if not torch.equal(first, second)}


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere", "gpt_neox", "granite"])
def test_a_refit_makes_up_for_attention_that_was_dropped(kind):
    source = put(Path("model"), kind, **deep(kind))
    run(source, PruneLayers(layers="2", only="attention"), place="plain")
    run(source, PruneLayers(layers="2", only="attention"), Refit(), place="refitted")
    assert changed("plain", "refitted")
    assert {int(name.partition(".")[0]) for name in changed("plain", "refitted")} <= {1, 2, 3, 4}
    checkpoint = open_checkpoint(source)
    stands = stand_for(open_checkpoint(Path("plain")), checkpoint)
    assert stands == [range(index, index + 1) for index in range(DEPTH)]
    wanted, plain, refitted = (opened(place)(heldout()).logits.log_softmax(-1) for place in (source, "plain", "refitted"))
    assert (wanted.exp() * (plain - refitted)).sum(-1).mean() < 0


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2", "granitemoe"])
def test_the_stream_of_the_original_is_that_of_transformers_between_layers_and_between_their_halves(kind):
    source = put(Path("model"), kind, **deep(kind))
    checkpoint, ids = open_checkpoint(source), calibration()[:2]
    with torch.no_grad():
        walk = Activations(checkpoint, checkpoint, [checkpoint.model("cpu").outer], ids)
        found = [walk.original_stream(step) for step in (0, 2, 3, 6)]
        whole, half = opened(source).base_model, opened(source)
        silent(half, 1, "down")
        for index, batch in enumerate(ids):
            states = [model(batch, output_hidden_states=True).hidden_states for model in (whole, half.base_model)]
            for step, wanted in enumerate((states[0][0], states[0][1], states[1][2], states[0][3])):
                torch.testing.assert_close(found[step][index], wanted, rtol=1e-4, atol=1e-4)


def gaps(source, *steps):
    model = plan(open_checkpoint(source), (*steps, Refit())).models("meta")[-2]
    return after_gaps(model)


def test_from_the_first_gap_on_all_that_writes_is_refitted_to_the_original_where_it_leads():
    source = save(tiny("llama", **deep("llama")), Path("model"))
    assert gaps(source) == [{}] * DEPTH
    assert gaps(source, PruneLayers(layers="2")) == [{}, {"down": 6}, {"o": 7, "down": 8}, {"o": 9, "down": 10}]
    assert gaps(source, PruneLayers(layers="4")) == [{}, {}, {}, {"down": 10}]
    assert gaps(source, PruneLayers(layers="0")) == [{"o": 3, "down": 4}, {"o": 5, "down": 6}, {"o": 7, "down": 8}, {"o": 9, "down": 10}]
    assert gaps(source, PruneLayers(layers="3", only="attention")) == [{}, {}, {"down": 7}, {"down": 8}, {"o": 9, "down": 10}]
    assert gaps(source, PruneLayers(layers="4", only="mlp")) == [{}, {}, {}, {}, {"o": 10}]
    run(source, PruneLayers(layers="3", only="attention"))
    assert gaps(Path("out")) == [{}] * DEPTH  # the teacher is without it too


def test_a_refit_on_its_own_finds_what_was_dropped():
    source = put(Path("model"), **deep("llama"))
    steps = (PruneLayers(layers="1", only="attention"), PruneLayers(layers="3"))
    run(source, *steps, place="plain")
    run(source, *steps, Refit(), place="refitted")
    run(Path("plain"), Refit(teacher=str(source)), place="alone")
    assert Path("alone/model.safetensors").read_bytes() == Path("refitted/model.safetensors").read_bytes()
    assert changed("plain", "alone")


def test_a_refit_that_was_cut_off_goes_on_with_the_stream_of_the_original(monkeypatch):
    source = put(Path("model"), **deep("llama"))
    steps = (PruneLayers(layers="1"), Refit())
    run(source, *steps, place="whole")
    killed_saving(monkeypatch, 2, lambda: run(source, *steps))
    run(source, *steps)
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


# What is refused

REFUSED = {
    "neither": ((), 2, "give either --layers"),
    "both": (("--layers", "1", "--drop", "1"), 2, "give either --layers"),
    "no such layer": (("--layers", "1,5"), 2, "from 0 to 4"),
    "no list": (("--layers", "one"), 2, "--layers is 'one'"),
    "too many": (("--layers", "0-3"), 2, "at least 2 must stay; drop at most 3"),
    "too many chosen": (("--drop", "4"), 2, "at least 2 must stay"),
    "none": (("--drop", "0"), 2, "--drop is '0'"),
    "all attention": (("--layers", "0-4", "--only", "attention"), 2, "at least 1 must stay"),
    "all mlp chosen": (("--drop", "5", "--only", "mlp"), 2, "at least 1 must stay"),
    "a way without a choice": (("--layers", "1", "--by", "search"), 2, "--by search is for --drop"),
    "runs of attention": (("--drop", "2", "--only", "attention", "--by", "angular"), 2, "--by angular chooses a run of whole layers"),
    "no such way": (("--drop", "1", "--by", "luck"), 2, "--by is 'luck'"),
    "no such part": (("--drop", "1", "--only", "norms"), 2, "--only is 'norms'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_one_sentence_and_leaves_nothing(command, name):
    options, code, told = REFUSED[name]
    put(Path("model"), **deep("llama"))
    before = {path.name for path in Path().iterdir()}
    result = command("prune-layers", *options, "model", "-o", "out", "--calibrate", "text.txt", "--calibration-tokens", TOKENS)
    assert result.exit_code == code, result.output
    assert told in result.output
    assert result.output.count("\n") == 1
    assert {path.name for path in Path().iterdir()} - {"cache"} == before


def test_a_folder_that_is_in_the_way_is_refused_before_anything_is_chosen(monkeypatch):
    begun = counting(monkeypatch)
    source = put(Path("model"), **deep("llama"))
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="out exists"):
        run(source, PruneLayers(drop=1))
    assert not begun


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_layers_that_norm_the_stream_go_whole_or_not_at_all(kind):
    source = put(Path("model"), kind, **deep(kind))
    with pytest.raises(ModelError, match=f"{kind} normalises what its layers add to"):
        run(source, PruneLayers(layers="1", only="attention"))
    with pytest.raises(OptionError, match="is an encoder; use --by influence or angular"):
        run(source, PruneLayers(drop=1))


def test_models_that_cannot_be_without_a_part_or_move_up_are_refused_with_the_reason():
    with pytest.raises(ModelError, match="opt normalises what its layers add to"):
        run(put(Path("after"), "opt", do_layer_norm_before=False, **deep("opt")), PruneLayers(layers="1", only="attention"))
    with pytest.raises(ModelError, match="no module of its own for ffn"):
        run(put(Path("opt"), "opt", **deep("opt")), PruneLayers(layers="1", only="mlp"))
    with pytest.raises(ModelError, match="divides scores by the number of the layer"):
        run(put(Path("gpt2"), "gpt2", scale_attn_by_inverse_layer_idx=True, **deep("gpt2")), PruneLayers(layers="1"))
    bare = put(Path("bare"), **deep("llama"))
    tiny("llama", **deep("llama")).base_model.save_pretrained(bare)
    with pytest.raises(OptionError, match="LlamaModel has no language-model head; use --by influence or angular"):
        run(bare, PruneLayers(drop=1))
    run(bare, PruneLayers(drop=1, by="influence"))


def test_what_is_gone_already_or_replaced_does_not_go_again():
    source = put(Path("model"), **deep("llama"))
    run(source, PruneLayers(layers="1", only="attention"), place="one")
    for only, told in (("attention", "which has no attention already"), ("mlp", "of which nothing would be left: drop it whole")):
        with pytest.raises(OptionError, match=f"layer 1, {told}"):
            run(Path("one"), PruneLayers(layers="1-2", only=only))
    run(source, Streaming(window=8, layers="2"), place="mixed")
    with pytest.raises(OptionError, match="layer 2, where streaming stands in place of that"):
        run(Path("mixed"), PruneLayers(layers="2", only="attention"))
    run(Path("mixed"), PruneLayers(layers="2", only="mlp"), place="fine")


@pytest.mark.parametrize(
    "said",
    [[], {"9": {"skip": ["attention"]}}, {"x": {"skip": ["attention"]}}, {"1": {"skip": "attention"}}, {"1": {"skip": ["self_attn"]}}, {"1": ["attention"]}, 3],
    ids=repr,
)
def test_a_config_that_somebody_edited_is_refused_in_a_sentence(command, said):
    source = put(Path("model"), **deep("llama"))
    run(source, PruneLayers(layers="1", only="attention"))
    config = json.loads(Path("out/config.json").read_text())
    Path("out/config.json").write_text(json.dumps({**config, "per_layer_config": said}))
    result = command("gqa", "--groups", 2, "--pool", "mean", "out", "-o", "again")
    assert result.exit_code == 1
    assert "config.json" in result.output
    assert result.output.count("\n") == 1
    assert not Path("again").exists()


def test_a_plan_of_what_is_still_open_is_no_plan():
    source = put(Path("model"), **deep("llama"))
    with pytest.raises(ValueError, match="decide"):
        plan(open_checkpoint(source), (PruneLayers(drop=1),))


def test_inspect_says_how_many_can_go_and_what_is_gone(command):
    source = put(Path("model"), **deep("llama"))
    assert "--drop 1 to 3" in command("inspect", source).output
    run(source, PruneLayers(layers="1,3", only="attention"))
    assert "2 of 5 layers have no attention" in command("inspect", "out").output
