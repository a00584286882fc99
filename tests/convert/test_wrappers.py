"""Models that look at images: the language model inside is converted in place, and what looks at images stays as it is, to the bit."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.wrappers import WRAPPERS
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.eval.quality.perplexity import sees_later
from effconvert.families import FAMILIES
from effconvert.heal._layerwise import LayerRunner
from effconvert.heal._tensors import stored_tensors
from effconvert.heal.refit import Refit
from effconvert.modeling.loading import load
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
CLIP = {**EYE, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = {**EYE, "model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = {**EYE, "model_type": "pixtral", "head_dim": 8}
LAYER_KEYS = ("vision_feature_layer", "vision_feature_layers")  # VipLlava's, in newer and in older versions of transformers
CUTS = {"image_token_index": 5, "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
GOT_EYE = {**EYE, "image_size": 32, "output_channels": 8, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [0]}
RESAMPLER = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1, "hidden_size": 32}
SETTINGS = {  # model_type -> class, config of the language model, of the eye, of the whole
    "gemma3": ("Gemma3", {"model_type": "gemma3_text"}, SIGLIP, {"mm_tokens_per_image": 4, "image_token_index": 5}),
    "llava": ("Llava", {"model_type": "llama"}, CLIP, {"image_token_index": 5}),
    "mistral3": ("Mistral3", {"model_type": "mistral"}, PIXTRAL, {"image_token_index": 5}),
    "smolvlm": ("SmolVLM", {"model_type": "llama"}, {**EYE, "model_type": "smolvlm_vision"}, {"image_token_id": 5, "scale_factor": 2}),
    "qwen2_vl": ("Qwen2VL", TURNS, {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}, {"image_token_id": 5}),
    "qwen2_5_vl": ("Qwen2_5_VL", TURNS, QWEN_EYE, {"image_token_id": 5}),
    "qwen3_vl": ("Qwen3VL", TURNS, {**QWEN_EYE, "deepstack_visual_indexes": [0]}, {"image_token_id": 5}),
    "llava_next": ("LlavaNext", {"model_type": "mistral"}, CLIP, CUTS),
    "llava_next_video": ("LlavaNextVideo", {"model_type": "mistral"}, CLIP, CUTS),
    "llava_onevision": ("LlavaOnevision", {"model_type": "qwen2"}, SIGLIP, {**CUTS, "video_token_index": 4}),
    "vipllava": ("VipLlava", {"model_type": "llama"}, CLIP, {"image_token_index": 5, **dict.fromkeys(LAYER_KEYS, (-1, -2))}),
    "video_llava": ("VideoLlava", {"model_type": "llama"}, CLIP, {"image_token_index": 5, "video_token_index": 4}),
    "paligemma": ("PaliGemma", {"model_type": "gemma"}, SIGLIP, {"image_token_index": 5, "projection_dim": 32, "hidden_size": 32}),
    "paligemma-2": ("PaliGemma", {"model_type": "gemma2", "sliding_window": 8}, SIGLIP, {"image_token_index": 5, "projection_dim": 32, "hidden_size": 32}),
    "idefics2": ("Idefics2", {"model_type": "mistral"}, EYE, {"image_token_id": 5, "perceiver_config": RESAMPLER}),
    "idefics3": ("Idefics3", {"model_type": "llama"}, EYE, {"image_token_id": 5, "scale_factor": 2}),
    "internvl": ("InternVL", {"model_type": "qwen2"}, {**EYE, "image_size": [8, 8], "patch_size": [4, 4]}, {"image_token_id": 5}),
    "aya_vision": ("AyaVision", {"model_type": "cohere2"}, SIGLIP, {"image_token_index": 5}),
    "cohere2_vision": ("Cohere2Vision", {"model_type": "cohere2"}, SIGLIP, {"image_token_id": 5, "alignment_intermediate_size": 32}),
    "got_ocr2": ("GotOcr2", {"model_type": "qwen2"}, GOT_EYE, {"image_token_index": 5}),
    "lighton_ocr": ("LightOnOcr", {"model_type": "qwen3"}, PIXTRAL, {"image_token_id": 5}),
    "ovis2": (
        "Ovis2",
        {"model_type": "qwen2"},
        {**EYE, "vocab_size": 64},
        {"image_token_id": 5, "visual_indicator_token_ids": [4] * 5, "hidden_size": 32, "vocab_size": 128},
    ),
    "deepseek_vl": ("DeepseekVL", {"model_type": "llama"}, SIGLIP, {"image_token_id": 5}),
    "video_llama_3": ("VideoLlama3", {"model_type": "qwen2"}, EYE, {"image_token_id": 5}),
}
GRID = {"pixels": (4, 96), "image_grid_thw": [[1, 2, 2]], "tokens": 1}
CUT = {"pixels": (1, 3, 3, 8, 8), "image_sizes": [[8, 16]], "tokens": 14}
IMAGES = {  # model_type -> the shape of an image, how many tokens it takes, and what else is told of it; others: one of 8 x 8 with 4 tokens
    "mistral3": {"pixels": (1, 3, 16, 16), "image_sizes": [[16, 16]], "tokens": 4},
    "smolvlm": {"pixels": (1, 1, 3, 8, 8), "tokens": 1},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), GRID),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), CUT),
    "idefics2": {"pixels": (1, 1, 3, 8, 8), "tokens": 4},
    "idefics3": {"pixels": (1, 1, 3, 8, 8), "tokens": 1},
    **{kind: {"tokens": 1} for kind in ("internvl", "aya_vision", "cohere2_vision")},
    "got_ocr2": {"pixels": (1, 3, 32, 32), "tokens": 4},
    "lighton_ocr": {"image_sizes": [[8, 8]], "tokens": 1},
    "video_llama_3": {"pixels": (4, 48), "image_grid_thw": [[1, 2, 2]], "image_merge_sizes": [2], "tokens": 1},
}


def put(kind, alike=False):
    """Write a tiny wrapper; `alike` with KV heads that are copies of each other in pairs."""
    name, text, eye, whole = SETTINGS[kind]
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, **text}, vision_config=eye, **whole)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw) + (parameter.ndim == 1))
            if alike and re.search(r"(language|text)_model\.layers.*self_attn\.[kv]_proj", name):
                heads = parameter.unflatten(0, (4, 8))
                heads.copy_(heads[[0, 0, 2, 2]])
    model.save_pretrained("model")
    letters().save_pretrained("model")
    Path("text.txt").write_text(prose())
    return opened("model")


def opened(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[wrong] for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if config.get_text_config().model_type in ("gemma", "gemma2"):
        model.set_attn_implementation("eager")
    return model.eval()


def to(*steps, **more):
    return convert("model", steps, RunOptions(output=Path("out"), tokens=64, context=32, calibrate="text.txt", calibration_tokens=256, **more))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@torch.inference_mode()
def logits(model):
    return model(torch.arange(6, 26)[None]).logits


@torch.inference_mode()
def logits_with_image(model, kind):
    """What a model makes of an image and a few words."""
    image = {"pixels": (1, 3, 8, 8), "tokens": 4, **IMAGES.get(kind, {})}
    ids = torch.tensor([[6, 7, *[5] * image.pop("tokens"), 8, 9, 10]])
    pixels = torch.randn(image.pop("pixels"), generator=torch.Generator().manual_seed(1))
    given = {name: torch.tensor(value) for name, value in image.items()}
    more = {"mm_token_type_ids": (ids == 5).int()} if kind.startswith("qwen") else {"token_type_ids": (ids > 7).int()} if kind.startswith("paligemma") else {}
    name = "pixel_values_images" if kind == "video_llava" else "pixel_values"
    seen, other = (model(ids, **{name: picture}, **given, **more).logits for picture in (pixels, pixels.flip(-1)))
    assert (seen - other).abs().max() > 1e-3  # the image counts
    return seen


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_language_model_is_converted_and_nothing_else_changes(kind):
    """Copies of heads pool to themselves, so that every logit stays, of texts with an image too."""
    model = put(kind, alike=True)
    to(Gqa(groups=2, pool="mean"), verify=False)
    converted, before, after = opened("out"), weights("model"), weights("out")
    assert type(converted) is type(model)
    assert converted.config.get_text_config().num_key_value_heads == 2
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() == after.keys()
    text = re.compile(r"(model\.|language_model\.|text_model\.)+layers\.\d\.self_attn\.[kv]_proj\.(weight|bias)")
    assert changed == {name for name in before if text.fullmatch(name)} != set()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(logits(converted), logits(model), **close)
    torch.testing.assert_close(logits_with_image(converted, kind), logits_with_image(model, kind), **close)


@pytest.mark.parametrize("kind", ["gemma3", "paligemma", "qwen2_vl"])
def test_what_was_converted_is_measured(kind):
    put(kind)
    outcome = to(Gqa(groups=2, pool="mean"))
    assert outcome.report.after.parameters == sum(parameter.numel() for parameter in opened("out").parameters())
    assert outcome.report.after.quality is not None


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["gemma3", "paligemma", "qwen2_vl", "smolvlm"])
def test_as_many_heads_as_there_are_change_no_logit(kind):
    model = put(kind)
    outcome = to(Gqa(groups=4))
    assert outcome.report.difference is not None
    torch.testing.assert_close(logits(opened("out")), logits(model))


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", SETTINGS)
@torch.inference_mode()
def test_the_language_model_reads_text_inside_as_its_family_does_alone(kind):
    """What is calibrated and healed is run in the family's own class."""
    model = put(kind)
    checkpoint = open_checkpoint(Path("model"))
    alone = LayerRunner(checkpoint.config, tensors_of(checkpoint), [torch.arange(6, 26)[None]], torch.device("cpu"))
    states = alone.begin()
    for index in range(checkpoint.config.layers):
        tensors = {name: tensor for name, (_, tensor, _) in stored_tensors(checkpoint.layer(index, "cpu")).items()}
        states = [look.out for look in alone.run(index, tensors, states)]
    whole = model.model(torch.arange(6, 26)[None]).last_hidden_state
    torch.testing.assert_close(alone.model.get_submodule(checkpoint.config.family.outer["final_norm"])(states[0]), whole, rtol=1e-5, atol=1e-5)


def tensors_of(checkpoint):
    """The language model's tensors outside the layers, by their names in it."""
    return {name.removeprefix(checkpoint.prefix): stored.read("cpu") for name, stored in checkpoint.outer.items() if name.startswith(checkpoint.prefix)}


@pytest.mark.parametrize("kind", ["paligemma", "qwen3_vl"])
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


@pytest.mark.parametrize("kind", sorted({text.get("model_type", "qwen2") for _, text, _, _ in SETTINGS.values()}))
def test_sizes_that_a_config_inside_leaves_out_are_those_of_transformers(kind):
    """Older versions of transformers did not write what was the default of the language model's class."""
    ours, theirs = Config({"model_type": kind}, FAMILIES[kind]), transformers.AutoConfig.for_model(kind)
    assert (ours.hidden, ours.ffn, ours.layers, ours.vocabulary) == (theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, theirs.vocab_size)
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


def test_paligemma_is_measured_one_way_as_it_reads_what_follows_a_prompt():
    put("paligemma")
    config, ids = open_checkpoint(Path("model")).config, torch.arange(6, 26)
    assert config.decoder
    assert not sees_later(load(Path("model"), config, torch.float32), ids)
    assert sees_later(transformers.AutoModelForImageTextToText.from_pretrained("model").eval(), ids)  # in sdpa, without a mask of its own


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


SIZED = [kind for kind, family in FAMILIES.items() if "hidden_size" in family.defaults]


@pytest.mark.parametrize("kind", SIZED)
def test_the_sizes_that_an_old_config_leaves_out_are_those_of_transformers(kind):
    stock = transformers.AutoConfig.for_model(kind)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    assert [getattr(stock, key) for key in sizes] == [FAMILIES[kind].defaults[key] for key in sizes]


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
