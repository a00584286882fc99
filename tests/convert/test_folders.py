"""Folders as people have them: what transformers reads decides, and whatever is refused is refused in the plan."""

import json
import shutil
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from effconvert.convert.run import convert
from effconvert.errors import EffconvertError, ModelError
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from tests.heal.healing import letters
from tests.models import save, tiny

SMALL = {"tokens": 64, "context": 32}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def dry(folder="model"):
    """Plan the conversion that changes no logit."""
    return convert(str(folder), (Gqa(groups=4),), RunOptions(output=Path("out"), dry_run=True, **SMALL))


def done(folder="model", groups=4):
    """Convert: to as many heads as there are, which changes no logit and is verified, or to fewer."""
    shutil.rmtree("out", ignore_errors=True)
    return convert(str(folder), (Gqa(groups=groups, pool="mean"),), RunOptions(output=Path("out"), **SMALL))


def put(kind="llama", **changes):
    save(tiny(kind, **changes), Path("model"))
    letters().save_pretrained("model")
    return Path("model")


def state(folder="model"):
    return load_file(Path(folder) / WEIGHTS)


def write(tensors, folder="model"):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder) / WEIGHTS, {"format": "pt"})


def say(folder="model", **keys):
    file = Path(folder) / "config.json"
    content = json.loads(file.read_text())
    content |= keys
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def shards(folder="model", **changes):
    """Split the weights over two files; `changes` go to the index: name -> file, None to leave it out."""
    tensors = state(folder)
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, Path(folder) / file, {"format": "pt"})
    where = {name: file for file, inside in files.items() for name in inside} | changes
    (Path(folder) / WEIGHTS).unlink()
    (Path(folder) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {name: file for name, file in where.items() if file}}))
    return files


def stock(folder):
    """The model that transformers opens, its logits or hidden states, and whether anything was missing."""
    content = json.loads((Path(folder) / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, content["architectures"][0]).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info["missing_keys"] or info["mismatched_keys"]


@torch.inference_mode()
def outputs(model):
    given = model.base_model(torch.arange(3, 20)[None])
    return given.last_hidden_state


OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("old", [True, False])
def test_the_layout_of_a_pretrained_bert(kind, old):
    put(kind)
    prefix = kind
    extra = {f"{prefix}.pooler.dense.weight": torch.randn(32, 32), f"{prefix}.pooler.dense.bias": torch.zeros(32)}
    extra |= {"cls.seq_relationship.weight": torch.randn(2, 32), "cls.seq_relationship.bias": torch.zeros(2)} if kind == "bert" else {}
    tensors = state() | extra
    for new, before in OLD.items() if old else ():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    write(tensors)
    model, missing = stock("model")
    assert not missing
    outcome = done(groups=2)
    assert any("pooler" in note and "has a plain copy" in note for note in outcome.plan.notes)
    assert outcome.report.before.parameters == sum(parameter.numel() for parameter in model.parameters())
    written = state("out")
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    assert not [name for name in written if "gamma" in name]


def test_the_same_tensor_under_an_old_and_a_new_name_is_refused():
    put("bert")
    tensors = state()
    name = next(name for name in tensors if name.endswith("LayerNorm.weight"))
    write(tensors | {name.replace("weight", "gamma"): tensors[name] + 1})
    with pytest.raises(ModelError, match=r"twice, as bert.* and as bert.*, and loaders differ in which one they take"):
        dry()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BertForPreTraining", "bert"),
        ("BertForTokenClassification", "bert"),
        ("BertForQuestionAnswering", "bert"),
        ("BertForSequenceClassification", "bert"),
        ("LlamaForTokenClassification", "llama"),
        ("LlamaForQuestionAnswering", "llama"),
        ("LlamaForSequenceClassification", "llama"),
        ("Qwen2ForTokenClassification", "qwen2"),
        ("GPT2ForSequenceClassification", "gpt2"),
        ("RobertaForTokenClassification", "roberta"),
    ],
)
def test_any_head_of_a_known_family(name, kind):
    like = tiny(kind).config.to_dict() | {"architectures": [name], "pad_token_id": 0}
    torch.manual_seed(0)
    model = getattr(transformers, name)(type(tiny(kind).config).from_dict(like))
    save(model, Path("model"))
    outcome = done(groups=2)
    converted = state("out")
    heads = [key for key in converted if not key.startswith((f"{model.base_model_prefix}.",))]
    assert heads or name == "LlamaForQuestionAnswering"
    assert all(torch.equal(converted[key], state("model")[key]) for key in heads)
    assert outcome.report.after.parameters < outcome.report.before.parameters


def test_a_class_that_transformers_does_not_have_is_refused_in_the_plan():
    put()
    say(architectures=["LlamaForSpeechPrediction"])
    with pytest.raises(ModelError, match=r"names the class LlamaForSpeechPrediction, which transformers .* does not have; name one"):
        dry()


def test_a_head_that_is_not_the_embedding_of_a_tied_model_is_refused_in_the_plan():
    put(tie_word_embeddings=True)
    tensors = state()
    write(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    dry()
    write(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1e-6})
    with pytest.raises(ModelError, match=r"lm_head.weight and model.embed_tokens.weight in model differ, .* say false if the head was trained"):
        dry()


def test_a_head_that_is_missing_is_refused_in_the_plan():
    put(tie_word_embeddings=False)
    tensors = state()
    del tensors["lm_head.weight"]
    write(tensors)
    with pytest.raises(ModelError, match=r"has no lm_head.weight, .*say true if the head is the embedding"):
        dry()


def test_a_bias_that_is_missing_is_refused_in_the_plan():
    put("qwen2")
    tensors = state()
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    write(tensors)
    with pytest.raises(ModelError, match=r"has no model.layers.1.self_attn.k_proj.bias, which Qwen2ForCausalLM of transformers .* reads"):
        dry()


def test_what_transformers_does_not_read_in_a_layer_stays_behind():
    put(attention_bias=False, mlp_bias=False)
    plain = state()
    layer = "model.layers.0.self_attn."
    write(plain | {f"{layer}k_proj.bias": torch.randn(32), f"{layer}rotary.cached": torch.randn(4), f"{layer}v_norm.weight": torch.randn(8)})
    model, missing = stock("model")
    assert not missing
    outcome = done()
    assert any("k_proj.bias" in note and "the output leaves that out" in note for note in outcome.plan.notes)
    assert state("out").keys() == plain.keys()
    torch.testing.assert_close(outputs(stock("out")[0]), outputs(model))


def test_names_that_the_index_lacks_are_read_as_transformers_reads_them():
    put()
    name = "model.layers.1.mlp.up_proj.weight"
    shards(**{name: None})
    assert not stock("model")[1]
    outcome = done()
    assert any(name in note and "does not name" in note for note in outcome.plan.notes)
    assert not stock("out")[1]


def test_a_tensor_in_two_shards_is_refused_and_both_are_named():
    put()
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = state()[name]
    files = shards()
    other = next(file for file, names in files.items() if name not in names)
    save_file(load_file(f"model/{other}") | {name: tensor + 1}, f"model/{other}", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"holds {name} twice, as {name} in model-1.safetensors and as {name} in model-2.safetensors"):
        dry()


def test_an_index_that_names_another_shard_is_refused():
    put()
    files = shards()
    name = files["model-1.safetensors"][0]
    index = json.loads(Path("model", INDEX).read_text())
    index["weight_map"][name] = "model-2.safetensors"
    Path("model", INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"is in 'model-2.safetensors', and it is in 'model-1.safetensors'"):
        dry()


KINDS_OF_CHECKPOINTS = {
    "model.layers.0.self_attn.q_proj.lora_A.weight": "LoRA adapter that was not merged",
    "model.layers.0.self_attn.q_proj.base_layer.weight": "PEFT model that was not merged",
    "model.layers.0.self_attn.q_proj.qweight": "GPTQ or AWQ",
    "model.layers.0.self_attn.q_proj.scales": "MLX, GPTQ or AWQ",
    "model.layers.0.self_attn.q_proj.weight.absmax": "bitsandbytes",
    "model.layers.0.self_attn.q_proj.SCB": "bitsandbytes quantisation to 8 bits",
    "model.layers.0.self_attn.q_proj.weight_scale_inv": "fp8 quantisation in blocks",
    "model.layers.0.self_attn.q_proj.weight_scale": "fp8 or int8",
    "model.layers.0.self_attn.q_proj.weight_packed": "compressed-tensors",
}


@pytest.mark.parametrize(("name", "told"), KINDS_OF_CHECKPOINTS.items())
@pytest.mark.parametrize("said", [True, False])
def test_a_checkpoint_that_is_not_of_plain_weights_is_refused_by_its_kind(name, told, said):
    put()
    write(state() | {name: torch.zeros(4)})
    if said:
        say(quantization_config={"quant_method": "some"})
    with pytest.raises(ModelError, match=told):
        dry()


@pytest.mark.parametrize(("before", "told"), [("module.", "DataParallel"), ("_orig_mod.", "torch.compile"), ("base_model.model.", "PEFT")])
def test_names_of_wrappers_are_refused_by_their_kind(before, told):
    put()
    write({before + name: tensor for name, tensor in state().items()})
    with pytest.raises(ModelError, match=told):
        dry()


def test_a_leftover_of_quantisation_is_told_from_quantised_weights():
    put()
    say(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match=r"says that it is quantised \(bitsandbytes\), and its tensors are plain numbers: remove quantization_config"):
        dry()


def test_tensors_that_deepspeed_left_empty_are_refused_by_their_kind():
    put()
    write(state() | {"model.layers.1.mlp.up_proj.weight": torch.empty(0)})
    with pytest.raises(ModelError, match=r"up_proj.weight is empty, as DeepSpeed ZeRO-3 leaves it"):
        dry()


def test_shards_without_an_index_are_said_to_be_that():
    put()
    shards()
    Path("model", INDEX).unlink()
    with pytest.raises(ModelError, match=r"has model-1.safetensors, model-2.safetensors and no model.safetensors.index.json"):
        dry()


@pytest.mark.parametrize(("kind", "near"), [("lama", True), ("phi5", False), ("internlm2", False)])
def test_only_a_misspelling_has_a_nearest_family(kind, near):
    put()
    say(model_type=kind)
    with pytest.raises(ModelError) as refusal:
        dry()
    assert ("the nearest is" in str(refusal.value)) == near


# --- a hundred folders with faults that nobody has thought of together


def _configs(draw, content):
    """Change a key of config.json."""
    key = draw.choice(sorted(content))
    content[key] = draw.choice([None, 0, -1, 1, 2, 7, 10**12, "x", "", True, False, [], {}, ["a"], 0.5, ...])


def _architectures(draw, content):
    stem = content["architectures"][0].partition("For")[0]
    content["architectures"] = [draw.choice([f"{stem}Model", f"{stem}ForSequenceClassification", f"{stem}ForTokenClassification", f"{stem}ForNothing"])]


def _lost(draw, tensors):
    del tensors[draw.choice(sorted(tensors))]


def _extra(draw, tensors):
    name = draw.choice(sorted(tensors))
    tensors[draw.choice([f"{name}.more", name.replace("weight", "scale"), f"extra.{name}", "head.weight", name.replace(".1.", ".2.")])] = torch.randn(3)


def _shape(draw, tensors):
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    tensors[name] = draw.choice([tensor[:-1], tensor[..., :0], tensor.flatten(), torch.cat([tensor, tensor]), tensor.mT if tensor.ndim == 2 else tensor[:1]])


def _dtype(draw, tensors):
    name = draw.choice(sorted(tensors))
    tensors[name] = tensors[name].to(draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn]))


def _prefix(draw, tensors):
    names = sorted(tensors)
    before = names[0].partition(".")[0]
    choice = draw.choice(["", "other.", f"{before}.{before}."])
    for name in names if draw.random() < 0.5 else names[::2]:
        tensors[name.replace(f"{before}.", choice, 1)] = tensors.pop(name)


def _bias(draw, tensors):
    name = draw.choice([name for name in sorted(tensors) if name.endswith("weight") and tensors[name].ndim == 2])
    tensors[name.replace("weight", "bias")] = torch.randn(len(tensors[name]))


CONFIGS, TENSORS = (_configs, _configs, _architectures), (_lost, _extra, _shape, _dtype, _prefix, _bias)


def _index(draw, folder):
    """Split the weights, and do something to the index."""
    tensors = state(folder)
    name = draw.choice(sorted(tensors))
    shards(folder, **draw.choice([{}, {name: None}, {name: "model-9.safetensors"}, {"nothing.weight": "model-1.safetensors"}]))
    if draw.random() < 0.5:
        index = json.loads((folder / INDEX).read_text())
        index["metadata"] = draw.choice([None, "hello", [], {"total_size": "x"}, {"total_parameters": 1}])
        (folder / INDEX).write_text(json.dumps(index))


def mutate(seed, folder):
    """Do one or two things to a folder that somebody's tools may do."""
    draw = Random(seed)
    kind = draw.choice(["llama", "qwen2", "gpt2", "bert", "gemma2", "mistral"])
    save(tiny(kind), folder)
    for _ in range(draw.choice([1, 1, 2])):
        change = draw.choice([*CONFIGS, *TENSORS])
        if change in CONFIGS:
            content = json.loads((folder / "config.json").read_text())
            change(draw, content)
            (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
        else:
            tensors = state(folder)
            change(draw, tensors)
            write(tensors, folder)
    if draw.random() < 0.2:
        _index(draw, folder)


@pytest.mark.few(2)
@pytest.mark.parametrize("seed", range(0, 100, 10))
def test_whatever_is_refused_is_refused_in_the_plan(seed, tmp_path):
    opened = 0
    for number in range(seed, seed + 10):
        folder = tmp_path / str(number)
        mutate(number, folder)
        shutil.rmtree("out", ignore_errors=True)
        try:
            dry(folder)
        except EffconvertError:
            assert not list(tmp_path.glob("out*"))
            continue
        outcome = done(folder, groups=2)
        opened += 1
        _, missing = (None, ()) if outcome.plan.config.needs_effconvert else stock("out")
        assert not missing, number
    assert opened < 10
