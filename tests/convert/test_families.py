import json
import re
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DynamicCache

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.parts import Deferred
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.replaced import read
from effconvert.convert.plan import plan
from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.modeling.caches import kv_bytes
from effconvert.surgery.mixing.linear import Linear
from tests.mixers.mixing import with_cache
from tests.models import DECODERS, GROUPING, SETTINGS, on_disk, save, tiny

pytestmark = pytest.mark.families  # all of them, each time


def bare(kind):
    """The model without its language-model head, built as such: it may have parts that the other lacks (BERT's pooler)."""
    return getattr(transformers, FAMILIES[kind].base)(tiny(kind).config)


def places(name, family, prefix):
    """Every (place, part) of the row that claims the parameter `name`."""
    base = rf"{re.escape(prefix)}{re.escape(family.layers)}\.\d+\."
    modules = {part: re.escape(module).replace(r"\*", r"\d+") for part, module in family.parts.items()}
    found = [("layer", part) for part, module in modules.items() if re.fullmatch(base + module + ("" if part in family.loose else r"\.(weight|bias)"), name)]
    found += [("outer", part) for part, module in family.outer.items() if name.startswith(f"{prefix}{module}.")]
    return found + [("head", part) for part, module in family.head.items() if name.startswith(f"{module}.")]


def fused_with(family, part):
    return {other for other, module in family.parts.items() if module == family.parts[part]}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("whole", [True, False], ids=["lm", "base"])
def test_every_parameter_has_exactly_one_place(kind, whole, tmp_path):
    family = FAMILIES[kind]
    model, prefix = (tiny(kind), f"{family.prefix}.") if whole else (bare(kind), "")
    stored = on_disk(save(model, tmp_path))
    assert sum(tensor.numel() for tensor in stored.values()) >= model.num_parameters()
    for name in stored if family.experts_key else dict(model.named_parameters(remove_duplicate=False)):
        found = places(name, family, prefix)
        assert found, name
        place, part = found[0]
        allowed = {(place, other) for other in fused_with(family, part)} if place == "layer" else {found[0]}
        assert set(found) == allowed, name


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_part_of_a_row_is_somewhere_in_a_layer(kind, tmp_path):
    checkpoint = open_checkpoint(save(tiny(kind), tmp_path))
    seen = {part for index in range(checkpoint.config.layers) for part in checkpoint.layer(index, "meta")}
    assert {re.sub(r"^experts\.\d+", "experts.*", part) for part in seen if not part.endswith(".bias")} == set(FAMILIES[kind].parts)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_and_transformers_agree_on_what_is_tied_by_default(kind):
    tied = FAMILIES[kind].defaults.get("tie_word_embeddings", False)
    assert tied == getattr(transformers, FAMILIES[kind].lm).config_class().tie_word_embeddings


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_config_is_read_as_transformers_reads_it(kind, tmp_path):
    model = tiny(kind)
    config, theirs = read_config(save(model, tmp_path)), model.config
    assert (config.kind, config.architecture) == (kind, FAMILIES[kind].lm)
    assert (config.layers, config.hidden) == (theirs.num_hidden_layers, theirs.hidden_size)
    assert config.tied == theirs.tie_word_embeddings
    if not FAMILIES[kind].attention:
        assert config.heads == 0
        return
    assert config.heads == theirs.num_attention_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.kv_heads == (FAMILIES[kind].fixed_kv_heads or 4)


def expected_parts(kind, state, module, part, config):
    """Weight and bias of `part` in [out, in] orientation, cut out by hand from what transformers calls `module`."""
    heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
    if part in config.family.loose:
        yield part, state[module]
    for suffix in ("weight", "bias"):
        if f"{module}.{suffix}" not in state:
            continue
        tensor = state[f"{module}.{suffix}"]
        if kind == "gpt2" and suffix == "weight" and "ln" not in module:
            tensor = tensor.t()
        fused = fused_with(config.family, re.sub(r"^experts\.\d+", "experts.*", part))
        if config.family.experts_stacked and part.startswith("experts."):
            tensor = tensor[int(part.split(".")[1])]
            fused = {other.removeprefix("experts.*.") for other in fused}
        if fused == {"q", "k", "v"}:
            if kind in ("gpt_neox", "bloom"):
                at = "qkv".index(part)
                rows = [(3 * head + at) * width + i for head in range(heads) for i in range(width)]
            elif kind == "codegen":  # four blocks
                own, at = heads // 4 * width, "qvk".index(part)
                rows = [(3 * block + at) * own + i for block in range(4) for i in range(own)]
            else:
                start = {"q": 0, "k": heads * width, "v": (heads + kv_heads) * width}[part]
                rows = list(range(start, start + (heads if part == "q" else kv_heads) * width))
            assert len(tensor) == (heads + 2 * kv_heads) * width
            tensor = tensor[rows]
        elif fused == {"gate", "up"}:
            half = len(tensor) // 2
            tensor = tensor[:half] if part.endswith("gate") else tensor[half:]
        yield part + (".bias" if suffix == "bias" else ""), tensor


@pytest.mark.parametrize(("kind", "kv_heads"), [(kind, 4) for kind in FAMILIES] + [(kind, 2) for kind in GROUPING])
def test_a_layer_gives_every_part_as_a_plain_matrix(kind, kv_heads, tmp_path):
    model = tiny(kind, num_key_value_heads=kv_heads) if kind in GROUPING else tiny(kind)
    checkpoint, family = open_checkpoint(save(model, tmp_path)), FAMILIES[kind]
    state = on_disk(tmp_path)
    for index in range(checkpoint.config.layers):
        layer = checkpoint.layer(index, "cpu")
        expected = {}
        for part, module in checkpoint.config.parts.items():
            expected |= expected_parts(kind, state, f"{family.prefix}.{family.layers}.{index}.{module}", part, checkpoint.config)
        assert set(layer) == set(expected)
        assert len(layer) == len(expected)
        for part, tensor in expected.items():
            assert torch.equal(layer[part], tensor), part
            assert checkpoint.layer(index, "meta")[part].shape == tensor.shape


@pytest.mark.parametrize("kind", FAMILIES)
def test_splitting_a_layer_and_joining_it_again_changes_no_bit(kind, tmp_path):
    checkpoint = open_checkpoint(save(tiny(kind), tmp_path))
    for index in range(checkpoint.config.layers):
        layer = checkpoint.layer(index, "cpu")
        for part in layer:
            layer[part] = layer[part]
        written = {name: (origin, tensor.compute() if isinstance(tensor, Deferred) else tensor) for name, origin, tensor in layer.tensors()}
        assert set(written) == set(checkpoint.layers[index])
        for name, (origin, tensor) in written.items():
            assert origin.name == checkpoint.layer_prefix(index) + name
            assert name in checkpoint.config.family.buffers or torch.equal(tensor, checkpoint.layers[index][name].read("cpu")), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_layer_that_nobody_touched_is_left_as_bytes(kind, tmp_path):
    checkpoint = open_checkpoint(save(tiny(kind), tmp_path))
    assert all(tensor is None for _, _, tensor in checkpoint.layer(0, "cpu").tensors())


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3", "modernbert", "gpt_bigcode"])
def test_changing_one_part_of_a_fused_tensor_leaves_its_neighbours(kind, tmp_path):
    checkpoint = open_checkpoint(save(tiny(kind), tmp_path))
    layer, original = checkpoint.layer(1, "cpu"), checkpoint.layer(1, "cpu")
    layer["k"] = layer["k"] + 1
    module = checkpoint.config.family.parts["k"]
    changed = {name: tensor for name, _, tensor in layer.tensors() if tensor is not None}
    assert set(changed) == {f"{module}.weight"}
    difference = changed[f"{module}.weight"] - checkpoint.layers[1][f"{module}.weight"].read("cpu")
    assert (difference != 0).sum() == original["k"].numel()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_checkpoint_saved_without_the_prefix_of_the_base_model_opens(kind, tmp_path):
    base = tiny(kind).base_model
    checkpoint = open_checkpoint(save(base, tmp_path))
    assert (checkpoint.prefix, checkpoint.config.architecture) == ("", FAMILIES[kind].base)
    assert {tensor.name for tensor in checkpoint.stored} == set(on_disk(tmp_path))
    assert plan(checkpoint, ()).before.parameters == base.num_parameters()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_plan_counts_the_parameters_that_the_model_has(kind, tmp_path):
    model = tiny(kind)
    planned = plan(open_checkpoint(save(model, tmp_path)), ())
    assert planned.before.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert planned.after == planned.before


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_tied_head_is_counted_once_and_an_untied_one_too(kind, tied, tmp_path):
    model = tiny(kind, tie_word_embeddings=tied)
    planned = plan(open_checkpoint(save(model, tmp_path)), ())
    assert planned.before.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert planned.checkpoint.config.tied == tied


def test_a_tied_head_that_an_old_file_stored_all_the_same_is_not_counted_again(tmp_path):
    model = tiny("gpt2")
    state = {**model.state_dict(), "lm_head.weight": model.state_dict()["transformer.wte.weight"].clone()}
    save(model, tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert plan(open_checkpoint(tmp_path), ()).before.parameters == sum(parameter.numel() for parameter in model.parameters())


CACHES = [(kind, {}) for kind in DECODERS] + [
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("phi3", {"sliding_window": 8}),
    ("llama", {"num_key_value_heads": 2}),
    ("phi3", {"num_key_value_heads": 1}),
    ("mixtral", {"sliding_window": 8}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
]


@pytest.mark.parametrize(("kind", "changes"), CACHES)
def test_the_planned_kv_bytes_are_those_of_the_real_cache(kind, changes, tmp_path):
    model = tiny(kind, **changes)
    checkpoint = open_checkpoint(save(model, tmp_path))
    measured = {}
    for tokens in (1, 7, 8, 9, 20):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.arange(3, 3 + tokens)[None], use_cache=True, **with_cache(model, cache))
        measured[tokens] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert {tokens: kv_bytes(checkpoint.config, 4, tokens) for tokens in measured} == measured
    assert plan(checkpoint, ()).before.kv_bytes == measured[1]


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if not FAMILIES[kind].decoder])
def test_an_encoder_has_no_kv_cache(kind, tmp_path):
    assert kv_bytes(read_config(save(tiny(kind), tmp_path)), 4, 20) == 0


WINDOWS = [
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {}),
    ("llama", {}),
    ("gemma", {}),
    ("gemma2", {"sliding_window": 8}),
    ("gemma2", {}),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 3}),
    ("gemma3_text", {"sliding_window": 8}),
    ("gemma3_text", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 4}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 8}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 3}),
    ("qwen2", {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 3}),
    ("qwen2", {"sliding_window": 8, "max_window_layers": 3}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True}),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 3}),
    ("phi3", {"sliding_window": 8}),
    ("phi3", {"sliding_window": None}),
    ("mixtral", {"sliding_window": 8}),
    ("mixtral", {}),
    ("qwen2_moe", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
    ("qwen2_moe", {"sliding_window": 8, "use_sliding_window": True}),
    ("qwen2_moe", {"sliding_window": 8, "max_window_layers": 3}),
    ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
    ("qwen3_moe", {"sliding_window": 8}),
    ("smollm3", {"sliding_window": 8}),
    ("smollm3", {"sliding_window": 8, "use_sliding_window": True}),
    ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "no_rope_layer_interval": 3, "max_window_layers": 2}),
    ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [1, 0, 0, 1, 1, 1, 0, 1]}),
    ("olmo3", {"sliding_window": 8}),
    ("olmo3", {}),
    ("cohere2", {"sliding_window": 8, "sliding_window_pattern": 3}),
    ("cohere2", {}),
    ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 3}),
    ("exaone4", {}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 8}),
    ("starcoder2", {"sliding_window": 8}),
    ("starcoder2", {}),
    ("ministral3", {"sliding_window": 8}),
    ("ministral3", {}),
]


@pytest.mark.parametrize(("kind", "keys"), WINDOWS)
def test_the_windows_of_an_older_config_are_those_that_transformers_makes_of_it(kind, keys, tmp_path):
    switches = ("layer_types", "sliding_window", "no_rope_layers", "use_sliding_window")
    old = {key: value for key, value in SETTINGS[kind].items() if key not in switches}
    raw = {**old, "model_type": kind, "num_hidden_layers": 8, **keys}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = [getattr(layer, "sliding_window", None) if layer.is_sliding else None for layer in DynamicCache(config=theirs).layers]
    assert Config(raw, FAMILIES[kind]).windows() == expected


TURNED = [
    ("smollm3", {}),
    ("smollm3", {"no_rope_layer_interval": 3}),
    ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 1, 1, 0, 1, 1]}),
    ("cohere2", {}),
    ("cohere2", {"sliding_window_pattern": 3}),
    ("exaone4", {}),
    ("exaone4", {"layer_types": ["full_attention"] * 8}),
    ("exaone4", {"layer_types": ["full_attention"] * 8, "sliding_window": None}),
    ("olmo3", {}),
]


@pytest.mark.parametrize(("kind", "keys"), TURNED)
def test_the_layers_that_rope_turns_are_those_where_transformers_calls_it(kind, keys, tmp_path, monkeypatch):
    old = {key: value for key, value in SETTINGS[kind].items() if key not in ("layer_types", "no_rope_layers", "sliding_window", "use_sliding_window")}
    raw = {**old, "model_type": kind, "vocab_size": 128, "pad_token_id": 0, "num_hidden_layers": 8, **keys}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    model = getattr(transformers, FAMILIES[kind].lm)(AutoConfig.from_pretrained(tmp_path)).eval()
    file, at, turned = sys.modules[type(model).__module__], [], set()
    rotate = file.apply_rotary_pos_emb
    monkeypatch.setattr(file, "apply_rotary_pos_emb", lambda *args, **kwargs: (turned.add(at[-1]), rotate(*args, **kwargs))[1])
    for index, layer in enumerate(model.base_model.get_submodule(FAMILIES[kind].layers)):
        layer.register_forward_pre_hook(lambda *_, index=index: at.append(index))
    model(torch.arange(3, 9)[None])
    config = Config(raw, FAMILIES[kind])
    assert {index for index in range(8) if config.rotary_of(index)} == turned


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_what_old_versions_stored_in_a_layer_is_carried_along_and_not_counted(kind, tmp_path):
    family, model = FAMILIES[kind], tiny(kind)
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for buffer in family.buffers:
        tensors[f"{family.prefix}.{family.layers}.0.{buffer}"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert plan(checkpoint, ()).before.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert set(family.buffers) <= {name for name, _, _ in checkpoint.layer(0, "cpu").tensors()}


def test_a_part_that_a_layer_lacks_is_named_with_those_it_has(tmp_path):
    layer = open_checkpoint(save(tiny("gpt2"), tmp_path)).layer(0, "cpu")
    assert "gate" not in layer
    with pytest.raises(ModelError, match=r"has no part 'gate'; it has q, q\.bias, k, k\.bias"):
        layer["gate"]


def test_a_deleted_part_is_gone_and_an_assigned_one_is_back(tmp_path):
    layer = open_checkpoint(save(tiny("llama"), tmp_path)).layer(0, "cpu")
    bias = layer["k.bias"]
    del layer["k.bias"]
    assert "k.bias" not in layer
    assert "self_attn.k_proj.bias" not in {name for name, _, _ in layer.tensors()}
    layer["k.bias"] = bias
    assert "k.bias" in layer


def test_a_config_that_leaves_its_layers_out_says_how_many_once_a_technique_is_in_it():
    config = Linear().config(Config({"model_type": "llama"}, FAMILIES["llama"]))
    again, *records = read(config.content)
    assert (again["num_hidden_layers"], len(records[1][0].layers)) == (32, 32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 1}, "says num_hidden_layers = 1"),
        ({"num_key_value_heads": 2}, "k_proj.weight is 32 x 32"),
        ({"vocab_size": 127}, "vocab_size = 127. makes it 127 x 32"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two'"),
        ({"model_type": "lama"}, "the nearest is 'llama'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(changes, sentence, tmp_path):
    save(tiny("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=sentence):
        open_checkpoint(tmp_path)


def test_a_checkpoint_without_one_of_its_layers_is_refused(tmp_path):
    save(tiny("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "bloom", "mpt", "distilbert"])
def test_the_usual_names_of_keys_are_read_as_well(kind, tmp_path):
    """As bigscience/bloom-560m has them. The output has the class's own names, and opens."""
    family, path = FAMILIES[kind], tmp_path / "config.json"
    usual = {
        family.heads_key: "num_attention_heads",
        family.layers_key: "num_hidden_layers",
        family.hidden_key: "n_embed" if kind == "bloom" else "hidden_size",
    }
    save(tiny(kind), tmp_path)
    before = read_config(tmp_path)
    path.write_text(json.dumps({usual.get(key, key): value for key, value in json.loads(path.read_text()).items()}))
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == before.hidden
    config = open_checkpoint(tmp_path).config
    assert config.raw == before.raw


def test_a_multi_head_gpt_bigcode_is_refused(tmp_path):
    model = transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=128, multi_query=False))
    with pytest.raises(ModelError, match="multi_query = False"):
        open_checkpoint(save(model, tmp_path))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_defaults_of_a_row_are_those_of_transformers(kind):
    stock = AutoConfig.for_model(kind)
    for key, value in FAMILIES[kind].defaults.items():
        if key == FAMILIES[kind].rotary_key and not FAMILIES[kind].rotary_counts:
            assert stock.rope_parameters["partial_rotary_factor"] == value, key
        elif key == "rope_theta":
            assert stock.rope_parameters[key] == value, key
        elif not key.startswith("sliding_window"):  # where each layer's window comes from is held above
            assert getattr(stock, key) == value, key
