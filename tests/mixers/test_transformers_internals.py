"""What effconvert uses of transformers without its promise: a test for each name, so that a new version is tried by this file first."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers import GenerationMixin, cache_utils, masking_utils, modeling_utils

from effconvert.errors import EffconvertError
from effconvert.families import FAMILIES
from effconvert.modeling import transformers_experts as experts
from effconvert.modeling import transformers_internals as internals
from effconvert.modeling.model import model_class
from effconvert.modeling.state import State
from tests.mixers.mixing import keep_no_activations, tokens, with_cache
from tests.models import ATTENDING, DECODERS, tiny

FILES = [Path(module.__file__) for module in (internals, experts)]
ROOT = Path(__file__).parents[2]
IMPORTS = [
    (file, node.module, alias.name)
    for file in FILES
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and node.module.startswith("transformers.")
    for alias in node.names
    if not alias.name.startswith("modeling_")  # modules, of which one name is used
]
UNROTATED = ("gpt2", "gpt_bigcode", "opt", "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")  # their positions are learned


def attentions(model):
    """The modules of a model that call the attention function."""
    return [module for module in model.modules() if internals.attends(module)]


def told(refusal):
    """Hold that an error says which versions were tried; return what it says is missing."""
    found = re.fullmatch(r".* transformers (\S+) does not have \((.+)\); it was tested with transformers (\S+): pip install '(\S+)'", str(refusal.value))
    assert found, refusal.value
    version, lacking, tested, command = found.groups()
    assert (version, tested, command) == (transformers.__version__, internals.TESTED, f"transformers{tested}")
    return lacking


# Which versions


def test_the_bounds_of_the_package_are_the_tested_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bounds,) = [found.specifier for found in map(Requirement, project["dependencies"]) if found.name == "transformers"]
    assert bounds == SpecifierSet(internals.TESTED)


def test_this_version_is_one_of_them():
    assert transformers.__version__ in SpecifierSet(internals.TESTED)


# What is imported


@pytest.mark.parametrize(("file", "module", "name"), IMPORTS, ids=[name for *_, name in IMPORTS])
def test_a_version_without_a_name_is_told_which_were_tested(file, module, name, monkeypatch):
    monkeypatch.delattr(sys.modules[module], name)
    spec = importlib.util.spec_from_file_location("again", file)
    with pytest.raises(EffconvertError) as refusal:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert told(refusal) == f"cannot import name '{name}' from '{module}'"


@pytest.mark.slow
def test_the_command_line_says_it_in_a_line(model, python, environment, tmp_path):
    code = "import transformers.masking_utils as m\ndel m.eager_mask\nfrom effconvert.__main__ import main\nmain()"
    command = [python, "-W", "ignore", "-c", code, "gqa", "model", "--groups", "2", "--output", "out"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(r"does\s+not\s+have\s+\(cannot\s+import\s+name\s+'eager_mask'", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_other_file_uses_such_a_name():
    names = {
        internals.IMPLEMENTATION,
        experts.EXPERTS,
        experts.CHOOSING,
        *internals.CACHE_NAMES[1:],
        *internals.CHECKPOINTING,
        "_model_mapping",
        "num_key_value_groups",
        "is_causal",
    }
    names |= {"eager_attention_forward", "apply_rotary_pos_emb", *[name for *_, name in IMPORTS]}
    found = []
    for path in {*FILES[0].parents[1].rglob("*.py")} - {*FILES}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                found += [(path.name, node.module)] * (node.module != "transformers.utils")  # whose logging is documented
            used = node.attr if isinstance(node, ast.Attribute) else node.arg if isinstance(node, ast.keyword) else None
            found += [(path.name, used)] * (used in names)
    assert found == []


def test_a_layer_of_a_cache_is_what_caches_expect():
    assert State.__abstractmethods__ == frozenset()
    methods = {name for name, value in vars(cache_utils.CacheLayerMixin).items() if callable(value) and not name.startswith("_")}
    assert methods - {"get_max_cache_shape"} <= {*vars(State)}  # they work on keys and values, which a state has not; that one goes by another
    assert {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length"} <= cache_utils.CacheLayerMixin.__abstractmethods__
    layer = State({"sum": ((4,), "float32")})
    cache = internals.Cache(layers=[layer, internals.DynamicLayer()])
    rows = torch.zeros(2, 1, 3, 4)
    assert all(torch.equal(*pair) for pair in zip(cache.update(rows, rows, 0), (rows, rows), strict=True))
    assert (cache.get_seq_length(0), cache.get_mask_sizes(2, 0), layer.tensors["sum"].shape) == (3, (5, 0), (2, 4))
    assert cache.is_sliding == [False, False]
    config = tiny("llama").config
    assert [type(kept) for kept in internals.DynamicCache(config=config).layers] == [internals.DynamicLayer] * config.num_hidden_layers


def test_functions_are_called_by_the_name_in_the_config(monkeypatch):
    model, calls = tiny("llama"), []

    def attend(module, query, key, value, attention_mask, **kwargs):
        calls.append((module, query.shape, attention_mask, kwargs["scaling"]))
        return internals.sdpa(module, query, key, value, attention_mask, **kwargs)

    def mask(*args, **kwargs):
        return internals.sdpa_mask(*args, **kwargs)

    monkeypatch.setitem(modeling_utils.ALL_ATTENTION_FUNCTIONS, "trial", attend)
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "trial", mask)
    expected = model(tokens()).logits
    assert internals.implementation(model.config) == "sdpa"
    internals.attend_by(model.config, "trial")
    assert internals.implementation(model.config) == "trial"
    assert torch.equal(model(tokens()).logits, expected)
    width = model.config.head_dim
    assert calls == [(module, (2, model.config.num_attention_heads, 20, width), None, width**-0.5) for module in attentions(model)]


def test_experts_are_computed_by_the_name_in_the_config(monkeypatch):
    model = tiny("mixtral")
    modules = [module for module in model.modules() if experts.experts_by(module)]
    assert [experts.experts_by(module) for module in modules] == ["grouped_mm"] * model.config.num_hidden_layers
    assert [experts.gated_by(module) for module in modules] == ["silu"] * len(modules)
    calls, computed = [], experts.experts_function("grouped_mm")
    assert experts.experts_function("eager") is None
    monkeypatch.setattr(experts.ExpertsInterface, "_global_mapping", dict(experts.ExpertsInterface._global_mapping))
    experts.ExpertsInterface.register("trial", lambda module, *given: calls.append(module) or computed(module, *given))
    expected = model(tokens()).logits
    experts.compute_experts_by(modules[0], "trial")  # of all modules with its config
    assert torch.equal(model(tokens()).logits, expected)
    assert calls == modules
    for flag in ("has_bias", "is_transposed"):  # as experts of other classes have
        setattr(modules[0], flag, True)
        assert experts.gated_by(modules[0]) is None
        setattr(modules[0], flag, False)


def test_a_version_in_which_classes_have_no_choice_of_experts_is_told():
    with pytest.raises(EffconvertError) as refusal:
        experts.choose_experts_as(SimpleNamespace(), SimpleNamespace)
    assert told(refusal) == f"{experts.CHOOSING} of SimpleNamespace"


def test_registering_is_what_makes_a_function_known(monkeypatch):
    def trial():
        """Attend, or make a mask."""

    functions = {
        internals.AttentionInterface: modeling_utils.ALL_ATTENTION_FUNCTIONS,
        internals.AttentionMaskInterface: masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
    }
    for interface, known in functions.items():
        assert "trial" not in known
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
        interface.register("trial", trial)
        assert known["trial"] is trial


def test_masks_are_true_where_a_token_is_seen_and_zero_there():
    config = tiny("llama").config
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    for name, seen in (("sdpa", lambda made: made), ("eager", lambda made: made == 0)):
        internals.attend_by(config, name)
        make = masking_utils.create_causal_mask
        given = {"past_key_values" if "past_key_values" in inspect.signature(make).parameters else "cache": None}
        made = seen(make(config=config, inputs_embeds=torch.zeros(2, 5, 8), attention_mask=mask, position_ids=None, **given))
        assert made.shape == (2, 1, 5, 5)
        assert made[0, 0].tolist() == torch.ones(5, 5).tril().bool().tolist()
        assert made[1, 0, 4].tolist() == [False, False, True, True, True]
        assert not made[1, 0, 0, 0]  # padding does not see itself


# What is used of objects


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_takes_a_cache_and_gives_it_back(kind):
    model = tiny(kind)
    cache = internals.DynamicCache(config=model.config)
    for size in (7, 1):
        out = model(tokens()[:, :size], use_cache=True, **with_cache(model, cache))
        assert internals.cache_among(out.values()) is cache
    assert cache.get_seq_length() == 8
    assert internals.cache_among(model(tokens(), use_cache=False).values()) is None


def test_a_model_that_takes_no_cache_is_told():
    class Model:
        def forward(self, input_ids, memory=None):
            """Take no cache that we know."""

    with pytest.raises(EffconvertError) as refusal:
        internals.cache_name(Model())
    assert told(refusal).startswith("an argument cache or past_key_values or cache_params of ")
    assert not internals.takes_cache(Model())
    assert internals.takes_cache(tiny("llama"))


@pytest.mark.parametrize("kind", ATTENDING)
def test_attention_is_called_with_hidden_states_and_angles(kind):
    model, seen = tiny(kind), []
    for module in attentions(model):
        module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(internals.attention_inputs(args, kwargs)), with_kwargs=True)
    model(tokens())
    assert len(seen) == len(attentions(model)) == model.config.num_hidden_layers
    for hidden, angles in seen:
        assert hidden.shape == (2, 20, model.config.hidden_size)
        assert (angles is None) == (kind in UNROTATED)
        if angles is not None:
            cos, sin = angles
            assert cos.shape[-2] == 20
            torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))


def test_attention_that_is_called_otherwise_is_told():
    with pytest.raises(EffconvertError) as refusal:
        internals.attention_inputs((), {"states": torch.zeros(2, 3, 4)})
    assert told(refusal).startswith("hidden_states")


def test_a_config_that_names_its_function_elsewhere_is_told():
    for use in (internals.implementation, lambda config: internals.attend_by(config, "sdpa")):
        with pytest.raises(EffconvertError) as refusal:
            use(SimpleNamespace())
        assert told(refusal) == "_attn_implementation of SimpleNamespace"


@pytest.mark.parametrize("kind", ATTENDING)
def test_every_family_has_an_attention_in_single_steps(kind):
    attention, generator = attentions(tiny(kind))[0], torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8, generator=generator) for _ in range(3))
    attention.num_key_value_groups = 1
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e9)
    out, weights = internals.eager(attention.eval())(attention, query, key, value, mask, scaling=0.3, dropout=0.0)
    expected = (query @ key.transpose(-1, -2) * 0.3 + mask).softmax(-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, (expected @ value).transpose(1, 2))


def test_the_attention_function_of_a_config_is_that_of_its_name():
    assert internals.attention_function(tiny("llama", attn_implementation="sdpa").config) is internals.ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_the_factor_of_scores_is_the_modules_where_it_has_one():
    changes = {"query_pre_attn_scalar": 25}
    assert internals.scaling_of(attentions(tiny("gemma2", **changes))[0], 0.0) == 0.2
    assert internals.scaling_of(torch.nn.Linear(1, 1), 0.25) == 0.25


@pytest.mark.parametrize("kind", [kind for kind in ATTENDING if kind not in UNROTATED])
def test_rope_turns_by_angles(kind):
    query = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(1, 5, 1, generator=torch.Generator().manual_seed(1)).expand(1, 5, 8)  # the same for each pair: families pair numbers in two ways
    rotate = internals.rotary(attentions(tiny(kind))[0])
    turned, key = rotate(query, query, angle.cos(), angle.sin())
    assert torch.equal(turned, key)
    assert not torch.allclose(turned, query, atol=1e-2)
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, turned, angle.cos(), -angle.sin())[0], query)


@pytest.mark.parametrize("use", [internals.eager, internals.rotary])
def test_a_family_without_them_is_told(use):
    with pytest.raises(EffconvertError) as refusal:
        use(torch.nn.Linear(1, 1))
    assert re.fullmatch(r"(eager_attention_forward|apply_rotary_pos_emb) of torch\.nn\.modules\.linear", told(refusal))


def test_torchs_attention_repeats_heads_by_the_modules_number():
    attention, generator = torch.nn.Module(), torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    attention.is_causal = True
    internals.repeat_heads(attention, 2)
    out, _ = internals.sdpa(attention, query, key, value, None, scaling=0.3)
    whole = [rows.repeat_interleave(2, 1) for rows in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *whole, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ATTENDING)
def test_what_attends_is_found_once_a_layer(kind):
    model = tiny(kind)
    attention = FAMILIES[kind].attention
    found = [name for name, module in model.named_modules() if internals.attends(module)]
    layers = getattr(model, FAMILIES[kind].prefix).get_submodule(FAMILIES[kind].layers)
    assert len(found) == len(layers)
    assert all(f"{attention}." in f"{name}." for name in found)
    assert {internals.is_causal(model.get_submodule(name)) for name in found} == {FAMILIES[kind].decoder}


def test_a_model_says_whether_it_keeps_activations():
    model = tiny("llama")
    assert internals.checkpoints(model) is False
    keep_no_activations(model)
    assert internals.checkpoints(model) is True
    with pytest.raises(EffconvertError) as refusal:
        internals.checkpoints(torch.nn.Linear(1, 1))
    assert told(refusal) == "is_activation_checkpointing or is_gradient_checkpointing of Linear"


def test_generation_asks_for_the_cache_by_our_method(monkeypatch):
    model, asked = tiny("llama"), []
    real = GenerationMixin._prepare_cache_for_generation

    def prepare(self, generation_config, model_kwargs, *args, **kwargs):
        asked.append((generation_config.use_cache, generation_config.cache_implementation, internals.cache_among(model_kwargs.values())))
        real(self, generation_config, model_kwargs, *args, **kwargs)
        asked.append(internals.cache_among([model_kwargs[internals.cache_name(model)]]))

    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", prepare)
    model.generate(tokens(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert asked[0] == (True, None, None)
    assert isinstance(asked[1], internals.DynamicCache)


@pytest.mark.parametrize("name", [*internals.OVERRIDDEN, internals.GENERATING])
def test_a_model_without_a_method_that_ours_replace_is_told(name):
    stock = transformers.LlamaForCausalLM
    internals.check_overridden(stock)
    members = {other: getattr(stock, other) for other in (*internals.OVERRIDDEN, internals.GENERATING, "generate") if other != name}
    with pytest.raises(EffconvertError) as refusal:
        internals.check_overridden(type("Llama", (), members))
    assert told(refusal) == f"{name} of Llama"
    internals.check_overridden(transformers.LlamaModel)  # which does not generate


def test_new_modules_are_begun_by_our_method(monkeypatch):
    begun = []
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_init_weights", lambda self, module: begun.append(module))
    made = transformers.LlamaForCausalLM(tiny("llama").config)
    assert {*attentions(made), made.lm_head} <= {*begun}


def test_a_constant_is_computed_as_the_class_begins_with_it():
    base = tiny("marian").model
    positions, expected = base.encoder.embed_positions, base.encoder.embed_positions.weight.clone()
    positions.to("meta")
    internals.compute_constant(base, positions, "cpu")
    assert torch.equal(positions.weight, expected)
    with pytest.raises(EffconvertError) as refusal:
        internals.compute_constant(SimpleNamespace(), positions, "cpu")
    assert told(refusal) == "_init_weights of SimpleNamespace"


def test_a_class_of_ours_has_the_names_on_disk_of_its_family():
    get = internals.get_checkpoint_conversion_mapping
    assert get("GPTNeoXForCausalLM")
    model_class("GPTNeoXForCausalLM")
    patterns = [[(rule.source_patterns, rule.target_patterns) for rule in get(name)] for name in ("GPTNeoXForCausalLM", "EffconvertGPTNeoXForCausalLM")]
    assert patterns[0] == patterns[1]


@pytest.mark.parametrize("kind", FAMILIES)
def test_auto_classes_say_what_they_make_of_a_family(kind):
    found = {opens.__name__: name for opens, name in internals.auto_classes(kind)}
    family = FAMILIES[kind]
    assert found["AutoModel"] == family.base
    assert family.lm in found.values()
    assert all(hasattr(transformers, name) for name in found.values())


def test_the_classes_of_a_family_that_nobody_made_a_row_for_are_known_too():
    assert internals.classes_of("mamba").items() >= {"AutoModel": ("MambaModel",), "AutoModelForCausalLM": ("MambaForCausalLM",)}.items()
    assert internals.classes_of("nonsense") == {}


def test_a_type_that_no_auto_class_knows_is_told():
    with pytest.raises(EffconvertError) as refusal:
        [*internals.auto_classes("nonsense")]
    assert told(refusal) == "an Auto class for nonsense"


def test_a_table_of_auto_classes_that_is_laid_out_otherwise_is_told(monkeypatch):
    from transformers.models.auto import modeling_auto

    monkeypatch.setattr(modeling_auto.AutoModel, "_model_mapping", SimpleNamespace())
    with pytest.raises(EffconvertError) as refusal:
        [*internals.auto_classes("llama")]
    assert told(refusal) == "_model_mapping of SimpleNamespace"


def test_routers_that_are_recorded_are_found_and_a_model_that_does_not_say_is_told(monkeypatch):
    base = tiny("mixtral").model
    assert [*experts.routers(base)] == [f"layers.{index}.mlp.gate" for index in range(len(base.layers))]
    assert experts.routers(tiny("llama").model) == {}
    with pytest.raises(EffconvertError) as refusal:
        experts.routers(SimpleNamespace())
    assert told(refusal) == "_can_record_outputs of SimpleNamespace"
    monkeypatch.delattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func")
    with pytest.raises(EffconvertError) as refusal:
        experts.load_balancing_loss(torch.zeros(2, 4), 2, torch.ones(1, 2))
    assert told(refusal) == "load_balancing_loss_func of transformers.models.mixtral.modeling_mixtral"
