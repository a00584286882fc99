"""KV heads that query heads share, in families whose own classes cannot have them."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.reading import read_config
from effconvert.convert.inspection import inspect
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import cache_bytes
from effconvert.families import FAMILIES
from effconvert.heal.refit import Refit
from effconvert.heal.transfer import Transfer
from effconvert.modeling import cache_for
from effconvert.modeling.caches import state_bytes
from effconvert.options import RunOptions
from effconvert.steps import load
from effconvert.surgery.attention.expand_kv import ExpandKv
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.mqa import Mqa
from tests.mixers.mixing import PIECES, SAME, far, in_pieces, keep_no_activations, positions, run, tokens
from tests.models import ATTENDING, DECODERS, alike, attention, characters, hide, save, tiny

ALIKE = ("xlm-roberta", "camembert", "electra")  # laid out as roberta and bert, which are here
KINDS = [kind for kind in ATTENDING if not FAMILIES[kind].kv_heads_key and not FAMILIES[kind].fixed_kv_heads and kind not in ALIKE]
CACHING = [kind for kind in KINDS if kind in DECODERS]
MIXED = [(name, kind) for name in ("streaming", "linear") for kind in KINDS if name == "linear" or kind in DECODERS]


def modules(family):
    """Map each module of a layer to the parts in it."""
    return Config({}, family).modules


MIXERS = {"streaming": {"window": 6, "sinks": 2}, "linear": {"window": 6}}


def mixer(name, kind):
    return load(name)(**(MIXERS[name] if kind in DECODERS else {"feature": "elu"}))


def convert_to(folder, source, *steps, **how):
    """Convert `source`, and return what Auto classes open it as."""
    text = {"calibrate": str(characters(source)), "calibration_tokens": 512}
    outcome = convert(str(source), steps, RunOptions(output=folder, **text, **{"verify": False, **how}))
    return opened(folder), outcome


def opened(folder):
    auto = AutoModelForCausalLM if read_config(folder).family.decoder else AutoModelForMaskedLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of a family and it with two KV heads of four, each made once: the mean of heads that differ."""
    made = {}

    def find(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = tiny(kind)
            made[kind] = (model, convert_to(folder / "out", save(model, folder / "source"), Gqa(groups=2, pool="mean"))[0], folder)
        return made[kind][:2]

    return find


@torch.no_grad()
def repeated(model):
    """What two groups of a model are, as the family itself can say it: each two heads their mean."""
    model = copy.deepcopy(model)
    for held in attention(model):
        for part, rows in held.items():
            if part[0] in "kv":
                rows.copy_(rows.unflatten(0, (2, 2)).mean(1).repeat_interleave(2, 0))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_family_computes_with_heads_that_are_copies(models, kind):
    model, grouped = models(kind)
    expected = run(repeated(model), tokens())
    assert far(run(grouped, tokens()), expected) <= SAME
    assert far(expected, run(model, tokens())) > 1e-3
    other = copy.deepcopy(grouped)
    other.set_attn_implementation("eager")
    assert far(run(other, tokens()), expected) <= SAME


@pytest.mark.parametrize("rule", ["pca", "aligned", "mean", "first"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_become_what_they_were_and_in_bases_of_their_own_where_the_rule_looks(kind, rule, tmp_path):
    model = alike(tiny(kind), (0, 0, 2, 2))
    expected = run(model, tokens())
    hidden = hide(model, gains=rule == "pca") if rule in ("pca", "aligned") else model
    assert far(run(hidden, tokens()), expected) <= 1e-4
    grouped, outcome = convert_to(tmp_path / "out", save(hidden, tmp_path / "source"), Gqa(groups=2, pool=rule), verify=True, context=16, tokens=32)
    assert far(run(grouped, tokens()), expected) <= 1e-4
    assert outcome.report.after.parameters == outcome.plan.after.parameters < outcome.plan.before.parameters
    assert outcome.report.after.kv_bytes * 2 == outcome.report.before.kv_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_only_half_of_keys_and_values_lie_on_disk(models, kind, tmp_path):
    model, grouped = models(kind)
    before, after = (load_file(save(each, tmp_path / name) / "model.safetensors") for name, each in (("before", model), ("after", grouped)))
    assert before.keys() == after.keys()
    family = FAMILIES[kind]
    for name in before:
        fused = next((parts for module, parts in modules(family).items() if f".{module}." in name), ())
        share = sum(0.5 if part in "kv" else 1 for part in fused) / len(fused) if fused else 1
        assert after[name].numel() == share * before[name].numel(), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_being_saved_and_loaded(models, kind, tmp_path):
    _, grouped = models(kind)
    again = opened(save(grouped, tmp_path))
    assert type(again).__name__ == f"Effconvert{FAMILIES[kind].lm}"
    assert torch.equal(run(again, tokens()), run(grouped, tokens()))
    config = read_config(tmp_path)
    assert (config.kind, config.heads, config.kv_heads, config.replaced) == (kind, 4, 2, ())
    assert AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 2
    fresh = type(again)(again.config)
    assert {name: each.shape for name, each in fresh.state_dict().items()} == {name: each.shape for name, each in again.state_dict().items()}
    assert run(fresh.eval(), tokens()).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_stock_classes_do_not_open_it(models, kind, tmp_path):
    _, grouped = models(kind)
    with pytest.raises(Exception, match=r"layer_types|rope_parameters"):  # what there is of these for each of the layer_types
        getattr(transformers, FAMILIES[kind].lm).from_pretrained(save(grouped, tmp_path))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CACHING)
def test_the_cache_holds_each_head_once_and_goes_on_from_there(models, kind, implementation):
    grouped = copy.deepcopy(models(kind)[1])
    grouped.set_attn_implementation(implementation)
    expected = run(grouped, tokens())
    found, cache = in_pieces(grouped, tokens(), PIECES)
    assert far(found, expected) <= SAME
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, 20, 8)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes  # and no view of more
    assert cache_bytes(cache) == 2 * grouped.config.num_hidden_layers * layer.keys.nbytes
    assert far(in_pieces(grouped, tokens(), PIECES, cache=DynamicCache())[0], expected) <= SAME  # which keeps the copies


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(models, kind):
    _, grouped = models(kind)
    ids, other = tokens(), tokens(length=5, seed=1)
    right, left = torch.ones(2, 25, dtype=torch.long), torch.ones(2, 25, dtype=torch.long)
    right[:, 20:], left[:, :5] = 0, 0
    expected = run(grouped, ids)
    assert far(run(grouped, torch.cat([ids, other], 1), attention_mask=right)[:, :20], expected) <= SAME
    if kind in DECODERS:
        ids, given = torch.cat([other, ids], 1), positions(grouped, left)
        assert far(run(grouped, ids, attention_mask=left, **given)[:, 5:], expected) <= SAME
        assert far(in_pieces(grouped, ids, (5, *PIECES), left, **given)[0][:, 5:], expected) <= SAME


@pytest.mark.parametrize("kind", CACHING)
def test_what_is_written_is_what_the_family_writes(models, kind):
    model, grouped = models(kind)
    ids, mask = torch.cat([tokens(length=3, seed=1), tokens()], 1), torch.ones(2, 23, dtype=torch.long)
    mask[0, :3] = 0
    for how in ({}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        rows = slice(0, 1) if "prompt_lookup_num_tokens" in how else slice(None)
        asked = {"attention_mask": mask[rows], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **how}
        assert torch.equal(grouped.generate(ids[rows], **asked), repeated(model).generate(ids[rows], **asked)), how


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_copies_added_up(models, kind, checkpointing):
    model, grouped = models(kind)
    wide, grouped = repeated(model), copy.deepcopy(grouped)
    if checkpointing:
        keep_no_activations(grouped)
    for each in (wide, grouped):
        each.train(checkpointing)
        for module in each.modules():
            for name in {"p", "dropout", "attention_dropout"} & vars(module).keys():
                setattr(module, name, 0.0)
        each(tokens(), labels=tokens()).loss.backward()
    family = FAMILIES[kind]
    for one, other in zip(wide.base_model.get_submodule(family.layers), grouped.base_model.get_submodule(family.layers), strict=True):
        for part in ("q", "k", "v", "o"):
            found = other.get_submodule(family.parts[part]).weight.grad
            expected = one.get_submodule(family.parts[part]).weight.grad
            assert found.abs().sum() > 0
            if family.parts["k"] != family.parts["q"] and part in "kv":
                expected = expected.unflatten(0, (2, 2, 8)).sum(1).flatten(0, 1)
            if found.shape == expected.shape:
                assert far(found, expected) <= 1e-4
            else:  # fused
                assert part in "qkv"


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "kind"), MIXED, ids=map("-".join, MIXED))
def test_mixers_see_each_head_once(models, name, kind, tmp_path):
    model, grouped = models(kind)
    source = save(grouped, tmp_path / "source")
    mixed, outcome = convert_to(tmp_path / "out", source, mixer(name, kind), verify=True, context=16, tokens=32)
    wide, _ = convert_to(tmp_path / "wide-out", save(repeated(model), tmp_path / "wide"), mixer(name, kind))
    assert far(run(mixed, tokens()), run(wide, tokens())) <= SAME
    assert far(run(mixed, tokens()), run(grouped, tokens())) > 1e-3
    if kind in DECODERS:
        assert far(in_pieces(mixed, tokens(), PIECES)[0], run(mixed, tokens())) <= SAME
        assert outcome.plan.after.state_bytes < state_bytes(read_config(tmp_path / "wide-out"), 4)
    at_once, _ = convert_to(tmp_path / "at-once", save(model, tmp_path / "first"), Gqa(groups=2, pool="mean"), mixer(name, kind))
    assert torch.equal(run(at_once, tokens()), run(mixed, tokens()))


@pytest.mark.parametrize("kind", CACHING)
def test_layers_with_and_without_a_mixer_lie_beside_each_other(models, kind, tmp_path):
    _, grouped = models(kind)
    step = load("streaming")(window=6, layers="1")
    mixed, _ = convert_to(tmp_path / "out", save(grouped, tmp_path / "source"), step, verify=True, context=16, tokens=32)
    found, cache = in_pieces(mixed, tokens(), PIECES)
    assert far(found, run(mixed, tokens())) <= SAME
    assert cache.layers[0].keys.shape == (2, 2, 20, 8)
    assert [type(layer).__name__ for layer in cache_for(mixed.config).layers] == ["Grouped", "State"]
    with pytest.raises(ModelError, match="fits 2 KV heads; change their number first"):
        convert_to(tmp_path / "again", tmp_path / "out", Mqa())


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_can_be_repeated_again_and_then_it_is_a_stock_checkpoint(models, kind, tmp_path):
    model, grouped = models(kind)
    back, outcome = convert_to(tmp_path / "out", save(grouped, tmp_path / "source"), ExpandKv(), verify=True, context=16, tokens=32)
    assert type(back).__name__ == FAMILIES[kind].lm
    assert outcome.report.difference <= SAME * run(back, tokens()).abs().max()
    assert not {"num_key_value_heads", "effconvert", "auto_map"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    assert far(run(back, tokens()), run(repeated(model), tokens())) <= SAME


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", KINDS)
def test_two_heads_become_one(models, kind, tmp_path):
    _, grouped = models(kind)
    single, outcome = convert_to(tmp_path / "out", save(alike_again(grouped), tmp_path / "source"), Mqa(pool="mean"), verify=True, context=16, tokens=32)
    assert far(run(single, tokens()), run(alike_again(grouped), tokens())) <= SAME
    assert outcome.plan.config.kind == ("gpt_bigcode" if kind == "gpt2" else kind)
    assert outcome.plan.config.needs_effconvert == (kind != "gpt2")


def alike_again(grouped):
    """Make the second KV head the first."""
    model, kind = copy.deepcopy(grouped), grouped.config.model_type.removeprefix("effconvert_")
    family = FAMILIES[kind]
    for layer in model.base_model.get_submodule(family.layers):
        for module in {family.parts["k"], family.parts["v"]}:
            for _, tensor in layer.get_submodule(module).named_parameters():
                rows = (tensor.data.T if family.transposed and tensor.ndim == 2 else tensor.data).unflatten(0, (-1, 8))
                for first in range(4 if modules(family)[module][0] == "q" else 0, len(rows), 2):
                    rows[first + 1] = rows[first]
    return model


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refit_brings_it_nearer_to_its_original(kind, tmp_path):
    model = tiny(kind)
    source = save(model, tmp_path / "source")
    plain, _ = convert_to(tmp_path / "plain", source, Gqa(groups=2))
    healed, _ = convert_to(tmp_path / "healed", source, Gqa(groups=2), Refit())
    ids = AutoTokenizer.from_pretrained(source)(characters(source).read_text(), return_tensors="pt").input_ids[:, :1024].view(-1, 32)
    expected = run(model, ids)
    assert (run(healed, ids) - expected).square().mean() < (run(plain, ids) - expected).square().mean()


@pytest.mark.usefixtures("one_window_a_batch")
@pytest.mark.few(4)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_on_top_of_it_can_be_taught(kind, tmp_path):
    steps = (Gqa(groups=2, pool="mean"), mixer("linear", kind), Transfer(epochs=1))
    _, outcome = convert_to(tmp_path / "out", save(tiny(kind), tmp_path / "source"), *steps)
    assert set(outcome.layer_errors) == {"0", "1"}
    assert all(said["after"] <= said["before"] for said in outcome.layer_errors.values())


def test_a_head_of_ones_own_comes_along(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(tiny("bert").config).eval()
    convert(str(save(model, tmp_path / "source")), (Gqa(groups=2, pool="mean"),), RunOptions(output=tmp_path / "out", verify=False))
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(found).__name__ == "EffconvertBertForSequenceClassification"
    assert torch.equal(found.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_says_that_it_can_be_done(models, kind, tmp_path):
    model, grouped = models(kind)
    told = inspect(open_checkpoint(save(model, tmp_path / "before")))
    assert (told.allowed_options["gqa"], told.allowed_options["mqa"]) == ("--groups 1, 2, 4", "as it is")
    assert "has a KV head for each" in told.refusals["expand-kv"]
    told = inspect(open_checkpoint(save(grouped, tmp_path / "after")))
    assert (told.allowed_options["gqa"], told.allowed_options["expand-kv"]) == ("--groups 1, 2", "--groups 4")
    assert told.kv_bytes[4096] == (4096 * 2 * 2 * 2 * 8 * 4 if kind in DECODERS else 0)


@pytest.mark.parametrize("count", [3, 0, "two"])
def test_a_number_of_heads_that_makes_no_sense_is_refused(models, count, tmp_path):
    folder = save(models("gpt2")[1], tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_key_value_heads": count}))
    with pytest.raises(ModelError, match="makes no sense"):
        read_config(folder)


def test_a_key_that_a_stock_config_has_for_nothing_counts_for_nothing(tmp_path):
    folder = save(tiny("gpt2", num_key_value_heads=2), tmp_path)
    assert (read_config(folder).kv_heads, read_config(folder).family.shares_kv_in_our_class) == (4, False)


def test_more_groups_than_heads_are_refused(tmp_path):
    with pytest.raises(OptionError, match=r"--groups 8 is more than this model's 4 KV heads; give 1 or 2 or 4$"):
        convert_to(tmp_path / "out", save(tiny("gpt2"), tmp_path / "source"), Gqa(groups=8))


def test_the_families_are_those_without_a_key():
    encoders = {"bert", "roberta", "distilbert", "nomic_bert", "modernbert", "jina_embeddings_v3"}
    assert set(KINDS) == {"gpt2", "gpt_neox", "opt", *encoders}


class Adapted(torch.nn.Module):
    """A projection with a change of low rank beside it, as PEFT's LoRA puts one."""

    def __init__(self, base, turned):
        super().__init__()
        self.base_layer = base
        rows, columns = base.weight.shape[::-1] if turned else base.weight.shape
        draw = torch.Generator().manual_seed(rows)
        self.change = torch.randn(rows, 1, generator=draw) @ torch.randn(1, columns, generator=draw) / 10

    def forward(self, rows):
        return self.base_layer(rows) + rows @ self.change.T


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_may_be_put_around_projections_and_merged(models, kind):
    model, family = copy.deepcopy(models(kind)[1]), FAMILIES[kind]
    before = run(model, tokens())
    names = [name for name, parts in modules(family).items() if {"k", "v"} & {*parts}]
    layers = model.get_submodule(f"{family.prefix}.{family.layers}")
    for layer in layers:
        for name in names:
            layer.set_submodule(name, Adapted(layer.get_submodule(name), family.transposed))
    made = run(model, tokens())
    assert far(made, before) > 10 * SAME
    for layer in layers:
        for name in names:
            adapted = layer.get_submodule(name)
            with torch.no_grad():
                adapted.base_layer.weight += adapted.change.T if family.transposed else adapted.change
            layer.set_submodule(name, adapted.base_layer)
    assert far(run(model, tokens()), made) <= SAME
