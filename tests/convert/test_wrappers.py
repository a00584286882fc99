"""Models that look at images: the language model inside is converted in place, and what looks at images stays as it is, to the bit."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.wrappers import PREFIXES, SHAPES, WRAPPERS
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.heal.refit import Refit
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.depth.prune_layers import PruneLayers
from effconvert.surgery.mixing.linear import Linear
from tests.heal.healing import letters, prose

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
EYE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
QWEN_EYE = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
TURNS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
SETTINGS = {  # model_type -> class, config of the language model, of the eye, of the whole
    "gemma3": ("Gemma3", {"model_type": "gemma3_text"}, {**EYE, "model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4, "image_token_index": 5}),
    "llava": ("Llava", {"model_type": "llama"}, {**EYE, "model_type": "clip_vision_model", "projection_dim": 16}, {"image_token_index": 5}),
    "mistral3": ("Mistral3", {"model_type": "mistral"}, {**EYE, "model_type": "pixtral", "head_dim": 8}, {"image_token_index": 5}),
    "smolvlm": ("SmolVLM", {"model_type": "llama"}, {**EYE, "model_type": "smolvlm_vision"}, {"image_token_id": 5, "scale_factor": 2}),
    "qwen2_vl": ("Qwen2VL", TURNS, {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}, {"image_token_id": 5}),
    "qwen2_5_vl": ("Qwen2_5_VL", TURNS, QWEN_EYE, {"image_token_id": 5}),
    "qwen3_vl": ("Qwen3VL", TURNS, {**QWEN_EYE, "deepstack_visual_indexes": [0]}, {"image_token_id": 5}),
}


def put(kind):
    name, text, eye, whole = SETTINGS[kind]
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, **text}, vision_config=eye, **whole)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw) + (parameter.ndim == 1))
    model.save_pretrained("model")
    letters().save_pretrained("model")
    Path("text.txt").write_text(prose())
    return opened("model")


def opened(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def to(*steps, **more):
    return convert("model", steps, RunOptions(output=Path("out"), tokens=64, context=32, calibrate="text.txt", calibration_tokens=256, **more))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@torch.inference_mode()
def logits(model):
    return model(torch.arange(6, 26)[None]).logits


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_language_model_is_converted_and_nothing_else_changes(kind):
    model = put(kind)
    outcome = to(Gqa(groups=2, pool="mean"))
    converted, before, after = opened("out"), weights("model"), weights("out")
    assert type(converted) is type(model)
    assert converted.config.get_text_config().num_key_value_heads == 2
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if name.startswith(PREFIXES) and ("self_attn.k_" in name or "self_attn.v_" in name) and "vision" not in name} - {
        name for name in before if "norm" in name
    }
    assert outcome.report.after.parameters == sum(parameter.numel() for parameter in converted.parameters())
    assert outcome.report.after.quality is not None


@pytest.mark.parametrize("kind", SETTINGS)
def test_as_many_heads_as_there_are_change_no_logit(kind):
    model = put(kind)
    outcome = to(Gqa(groups=4))
    assert outcome.report.difference is not None
    torch.testing.assert_close(logits(opened("out")), logits(model))


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl"])
def test_what_layers_compute_is_looked_at_inside(kind):
    put(kind)
    to(Gqa(groups=2, pool="pca"), Refit())
    assert torch.isfinite(logits(opened("out"))).all()


@pytest.mark.parametrize("kind", ["gemma3", "smolvlm", "qwen2_vl"])
def test_layers_are_dropped_inside(kind):
    put(kind)
    to(PruneLayers(layers="1"))
    converted = opened("out")
    assert converted.config.get_text_config().num_hidden_layers == 2


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_names_as_they_are_in_memory_are_read_as_well(kind):
    model = put(kind)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight" or kind == "llava"}, "model/model.safetensors"
    )
    to(Gqa(groups=4))
    torch.testing.assert_close(logits(opened("out")), logits(model))


def test_what_needs_another_class_is_refused():
    put("gemma3")
    for step in (Linear(), PruneLayers(layers="1", only="attention")):
        with pytest.raises(ModelError, match="gemma3_text is inside a gemma3 here, whose own class has no place for that"):
            to(step)
    assert not Path("out").exists()


def test_inspect_and_eval_take_it(command):
    put("llava")
    result = command("inspect", "model")
    assert result.exit_code == 0, result.output
    for technique in ("linear", "streaming"):  # one that needs no option, and one that does
        assert re.search(rf"^{technique} +does not apply: llama is inside a llava here", result.output, re.MULTILINE)
    result = command("eval", "model", "--text", "text.txt", "--tokens", "64", "--context", "32", "-o", "results.json")
    assert result.exit_code == 0, result.output


def test_every_wrapper_is_one_of_transformers():
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    assert all(kind in known for kind in WRAPPERS)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_config_without_a_text_config_as_they_are_published_stays_one(kind):
    model = put(kind)
    content = json.loads(Path("model/config.json").read_text())
    text = content.pop("text_config")
    Path("model/config.json").write_text(json.dumps({**text, **content}))
    assert opened("model").config.get_text_config().num_hidden_layers == 3
    to(Gqa(groups=2, pool="mean"), PruneLayers(layers="1"))
    converted, written = opened("out"), json.loads(Path("out/config.json").read_text())
    assert type(converted) is type(model)
    assert (converted.config.get_text_config().num_key_value_heads, converted.config.get_text_config().num_hidden_layers) == (2, 2)
    assert written["vision_config"] == content["vision_config"]
    assert "text_config" not in written
    assert written.keys() <= {*text, *content}


@pytest.mark.parametrize("kind", SHAPES)
def test_the_shape_that_an_old_config_leaves_out_is_that_of_transformers(kind):
    stock = transformers.AutoConfig.for_model(kind)
    assert all(getattr(stock, key) == value for key, value in SHAPES[kind].items())


def test_what_an_old_config_leaves_out_is_filled_in():
    """As google/gemma-3-4b-it: its heads are transformers' default."""
    raw = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}}
    Path("config.json").write_text(json.dumps(raw))
    theirs, ours = transformers.AutoConfig.from_pretrained(".").get_text_config(), read_config(Path("."))
    assert (ours.hidden, ours.layers, ours.heads, ours.kv_heads, ours.ffn) == (2560, 34, 8, 4, 9216)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.intermediate_size) == (8, 4, 9216)


def test_a_language_model_inside_that_nobody_knows_is_refused():
    put("llava")
    content = json.loads(Path("model/config.json").read_text())
    content["text_config"]["model_type"] = "internlm2"
    Path("model/config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="names the family 'internlm2', which effconvert does not know"):
        open_checkpoint(Path("model"))


@pytest.mark.parametrize("place", ["", "text_config", "vision_config"])
def test_a_kernel_from_the_hub_is_refused_wherever_the_config_names_it(place):
    put("llava")
    content = json.loads(Path("model/config.json").read_text())
    (content[place] if place else content)["_attn_implementation"] = "somebody/kernel"
    Path("model/config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="asks for the attention kernel 'somebody/kernel' from the Hub"):
        open_checkpoint(Path("model"))


def test_a_leftover_of_quantisation_is_seen_in_the_config_of_the_whole():
    put("llava")
    content = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**content, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match=r"says that it is quantised \(awq\), and its tensors are plain numbers"):
        open_checkpoint(Path("model"))
