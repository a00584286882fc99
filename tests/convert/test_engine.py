"""What the engine promises whatever the technique: types, shards, windows, shortened models, and a config that is read once."""

import builtins
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import effconvert
from effconvert import steps
from effconvert.checkpoint import replaced
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.convert.plan import plan
from effconvert.convert.run import convert
from effconvert.errors import OptionError
from effconvert.heal.refit import Refit
from effconvert.options import RunOptions
from effconvert.recipe import step
from effconvert.surgery.attention.expand_kv import ExpandKv
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.mixing.retnet import Retnet
from effconvert.surgery.mixing.streaming import Streaming
from tests.convert.test_seam import Plain
from tests.mixers.mixing import names
from tests.models import characters, logits, save, tiny

PLAIN = {"attention_bias": False, "mlp_bias": False}


class Keep(Plain):
    """Keeps some layers."""

    kept: tuple[int, ...] = ()

    def config(self, config):
        return config.with_layers(self.kept)

    def rewrite(self, model):
        model.layers = [model.layers[index] for index in self.kept]


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("kind", "changes", "became"),
    [("llama", PLAIN, "mistral"), ("qwen2", {}, "qwen2"), ("qwen3", {}, "qwen3"), ("mistral", {"sliding_window": None}, "mistral")],
)
@pytest.mark.parametrize("window", [2, 5, 24])
def test_a_window_shorter_than_the_prompt_is_verified_as_the_converted_model_has_it(kind, changes, became, window, tmp_path):
    source = save(tiny(kind, **changes), tmp_path / "source")
    outcome = convert(str(source), (Streaming(window=window, sinks=0),), RunOptions(output=tmp_path / "out"))
    config = json.loads((outcome.output / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == (became, window)
    assert outcome.plan.after.kv_bytes == outcome.plan.before.kv_bytes


@pytest.mark.parametrize("buffer", [torch.ones(4), torch.ones(1, 1, 8, 8, dtype=torch.uint8)], ids=["float32", "uint8"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_new_tensors_are_of_the_type_of_the_weights_whatever_buffers_come_first(kind, buffer, tmp_path):
    model = tiny(kind).to(torch.bfloat16)
    source = save(model, tmp_path / "source")
    held = load_file(source / "model.safetensors")
    at = {"llama": "model.layers.{}.self_attn.rotary_emb.inv_freq", "gpt_neox": "gpt_neox.layers.{}.attention.bias"}[kind]
    buffers = {at.format(index): buffer.clone() for index in range(2)}
    save_file({**buffers, **held}, source / "model.safetensors", {"format": "pt"})
    order = list(json.loads((source / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}"))
    assert {*order} >= buffers.keys()
    out = convert(str(source), (Retnet(decay="paper"),), RunOptions(output=tmp_path / "out", verify=False)).output
    new = {name: tensor.dtype for name, tensor in tensors(out).items() if ".effconvert." in name}
    assert {*new.values()} == {torch.bfloat16}


def test_a_layer_dropped_at_the_end_is_made_up_for_in_a_model_that_was_shortened_before(tmp_path):
    teacher = save(tiny("llama", num_hidden_layers=6), tmp_path / "teacher")
    characters(teacher)
    (tmp_path / "text.txt").write_text("sun and moon, hill and tree. " * 60)
    student = convert(str(teacher), (Keep(kept=(0, 1, 4, 5)),), RunOptions(output=tmp_path / "student", verify=False)).output
    seen = []

    class Watched(Refit):
        def _heal(self, layer, originals):
            seen.append((layer.index, originals))

    planned = plan(open_checkpoint(student), (Keep(kept=(0, 1, 2)), Watched()), open_checkpoint(teacher))
    seen.clear()
    for layer in planned.models("cpu")[-1].layers:
        list(layer)
    assert seen == [(0, range(0, 1)), (1, range(1, 4)), (2, range(4, 6))]  # the last one stands for layer 5, too


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2", "modernbert"])
def test_what_config_json_says_of_layers_goes_with_them(kind, tmp_path):
    kinds = {"layer_types": (["full_attention", "sliding_attention"] * 3)[:6], "sliding_window": 8}
    changes = {"llama": {}, "modernbert": {"layer_types": kinds["layer_types"]}, "qwen2": {"use_sliding_window": True, "max_window_layers": 0, **kinds}}.get(
        kind, kinds
    )
    source = save(tiny(kind, num_hidden_layers=6, **changes), tmp_path / "source")
    mixer = step({"linear": {"feature": "elu", "layers": "2,5"}} if kind != "gemma2" else {"streaming": {"window": 5, "sinks": 2, "layers": "2,5"}}, "step")
    config = mixer.config(open_checkpoint(source).config)
    kept = config.with_layers((0, 2, 3, 5))
    assert kept.windows() == [config.windows()[index] for index in (0, 2, 3, 5)]
    assert names(kept) == [names(config)[index] for index in (0, 2, 3, 5)]
    assert (kept.layers, kept.replaced[0].layers) == (4, (1, 3))
    out = convert(str(source), (mixer, Keep(kept=(0, 2, 3, 5))), RunOptions(output=tmp_path / "out", verify=False)).output
    assert open_checkpoint(out).config.content == kept.content
    auto = transformers.AutoModelForCausalLM if config.family.decoder else transformers.AutoModelForMaskedLM
    assert logits(auto.from_pretrained(out)).isfinite().all()


def test_where_windows_followed_from_numbers_of_layers_they_are_written_down(tmp_path):
    source = save(tiny("gemma2", num_hidden_layers=6, layer_types=None), tmp_path / "source")
    written = json.loads((source / "config.json").read_text())
    written.pop("layer_types")
    (source / "config.json").write_text(json.dumps(written))
    config = open_checkpoint(source).config
    assert config.with_layers((1, 3, 5)).windows() == [config.windows()[index] for index in (1, 3, 5)]


def test_a_file_that_would_grow_beyond_the_usual_size_becomes_several_with_an_index(tmp_path, monkeypatch):
    model = tiny("llama", num_key_value_heads=1, num_hidden_layers=3)
    source = save(model, tmp_path / "source")
    whole = convert(str(source), (ExpandKv(groups=4),), RunOptions(output=tmp_path / "whole")).output
    assert [file.name for file in whole.glob("*.safetensors*")] == ["model.safetensors"]
    monkeypatch.setattr("effconvert.convert.plan.LARGEST", 1)  # the source's own file is larger, so that is the limit
    small = convert(str(source), (Gqa(groups=1),), RunOptions(output=tmp_path / "small")).output
    assert [file.name for file in small.glob("*.safetensors*")] == ["model.safetensors"]
    parts = convert(str(source), (ExpandKv(groups=4),), RunOptions(output=tmp_path / "parts")).output
    assert sorted(file.name for file in parts.glob("*.safetensors*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert {name: tensor.tolist() for name, tensor in tensors(parts).items()} == {name: tensor.tolist() for name, tensor in tensors(whole).items()}
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(whole).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(whole).values())
    torch.testing.assert_close(logits(transformers.AutoModelForCausalLM.from_pretrained(parts)), logits(model), rtol=1e-5, atol=1e-5)


def test_a_forward_reads_no_file_and_parses_no_config(tmp_path, monkeypatch):
    source = save(tiny("llama"), tmp_path / "source")
    out = convert(str(source), (Linear(window=6),), RunOptions(output=tmp_path / "out", verify=False)).output
    parsed, made = [], []
    real = replaced.decode
    monkeypatch.setattr("effconvert.modeling.converted_config.decode", lambda given: parsed.append(given) or real(given))
    monkeypatch.setattr("effconvert.checkpoint.replaced.decode", lambda given: parsed.append(given) or real(given))
    begin = Linear.__init__
    monkeypatch.setattr(Linear, "__init__", lambda self, **given: made.append(given) or begin(self, **given))
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert len(made) <= 1
    parsed.clear()
    made.clear()

    def refused(*args, **kwargs):
        raise AssertionError(f"a forward opened {args[0]}")

    ids = torch.arange(3, 12)[None]
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refused)
        patch.setattr(Path, "open", refused)
        patch.setattr("os.scandir", refused)
        patch.setattr("os.listdir", refused)
        with torch.inference_mode():
            model(ids)
            model(ids, use_cache=False)
            model.generate(ids, max_new_tokens=3, do_sample=False)
    assert not made
    assert len(parsed) <= 1


def test_healing_has_no_layers_to_choose():
    with pytest.raises(OptionError) as refusal:
        steps.load("refit")(layers="3")
    assert "no option --layers" in str(refusal.value)
    assert "technique" not in str(refusal.value)


def test_the_package_converts_when_it_is_called(tmp_path):
    source = save(tiny("llama"), tmp_path / "source")
    done = effconvert.convert(source, Gqa(groups=2, pool="mean"), output=tmp_path / "out", verify=False)
    assert isinstance(done.plan.config, Config)
