"""Models for which effconvert has no row: whatever transformers opens is measured and looked at, and nothing about it is made up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import effconvert
from effconvert.errors import ModelError
from effconvert.eval import results
from effconvert.eval.speed import passes
from effconvert.eval.speed.bench import bench
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.families import FAMILIES
from effconvert.modeling.unknown import describe, look
from tests.eval.evaluating import measure, put, row, wordpiece
from tests.models import characters, tiny

BASIC = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "num_experts": 2, "expert_layer_period": 2, "num_key_value_heads": 2}
DEBERTA = {**BASIC, **SHAPE, "num_labels": 3}
SETTINGS = {
    "MambaForCausalLM": {**BASIC, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "JambaForCausalLM": {**BASIC, **SHAPE, **HYBRID},
    "XGLMForCausalLM": {**BASIC, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64},
    "RwkvForCausalLM": {**BASIC, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "XLNetLMHeadModel": {**BASIC, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "ErnieForCausalLM": {**BASIC, **SHAPE},
    "DebertaV2ForMaskedLM": DEBERTA,
    "DebertaV2ForSequenceClassification": DEBERTA,
    "T5ForConditionalGeneration": {**BASIC, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "ViTForImageClassification": {**SHAPE, "image_size": 8, "patch_size": 4},
}
QUICK = {"batch": (2,), "context": (12,), "new_tokens": 2, "rounds": 1, "warmup": 0}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Measure the bandwidth of memory on little of it: its value plays no part here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "BUFFER", 2**20)
        yield


def network(name):
    """A random model of that class, with weights that are large enough for tokens to matter."""
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**SETTINGS[name])).eval()
    assert model.config.model_type not in FAMILIES
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def saved(name):
    """Write such a model into a folder, with a tokenizer; return both."""
    model, folder = network(name), Path(name)
    model.save_pretrained(folder)
    characters(folder.absolute())
    return model, folder


def edit(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def of_text(model):
    """The perplexity of what `measured` reads."""
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(model.name_or_path)(Path("calibration.txt").read_text()).input_ids)
    windows = ids[: 60 - 60 % 15].view(-1, 15)
    windows = windows if ids[0] != 1 else None
    with torch.inference_mode():
        return torch.stack([cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]) for window in windows]).mean().exp().item()


def measured(*folders, **options):
    return measure(*folders, text=Path("calibration.txt"), **{"tokens": 60, "context": 15, **options})


# eval


@pytest.mark.parametrize("name", ["MambaForCausalLM", "JambaForCausalLM"])
def test_a_decoder_is_measured_by_its_own_class(name):
    model, folder = saved(name)
    found = measured(folder, generation=True)
    model.name_or_path = str(folder)
    assert row(found, "text", "perplexity").values[0].value == pytest.approx(of_text(model), rel=1e-5)
    assert row(found, "generation", "distinct_2").values[0]
    (subject,) = found.subjects
    assert (subject.architecture, subject.kind, subject.parameters, subject.vocabulary) == (name, model.config.model_type, parameters(model), 128)
    assert not isinstance(subject, results.ShapedSubject)


def test_an_encoder_is_measured_by_its_own_class_and_a_classifier_by_what_is_below_its_head():
    filler = put(Path("filler"), network("DebertaV2ForMaskedLM"), wordpiece())
    Path("prose.txt").write_text("sun moon sea hill " * 12)
    assert row(measure(filler, text=Path("prose.txt")), "masked", "loss").values[0].value > 0
    classifier, other = network("DebertaV2ForSequenceClassification"), network("DebertaV2ForSequenceClassification")
    with torch.no_grad():
        other.classifier.weight.mul_(2)  # the head plays no part
        put(Path("other"), other, wordpiece())
        other.deberta.embeddings.word_embeddings.weight.mul_(-1)
    folders = [put(Path("first"), classifier, wordpiece()), Path("other"), put(Path("moved"), other, wordpiece())]
    found = row(measure(*folders, text=Path("prose.txt")), "states", "cosine")
    assert found.values[1].value == pytest.approx(1)
    assert found.values[2].value < 0.9


def test_what_sees_the_tokens_that_it_is_to_predict_is_refused():
    _, folder = saved("XLNetLMHeadModel")
    with pytest.raises(ModelError, match="XLNetLMHeadModel: each token sees later ones"):
        measured(folder)
    _, folder = saved("ErnieForCausalLM")
    with pytest.raises(ModelError, match="ErnieForCausalLM predicts the next token, and each token sees that, since"):
        measured(folder)
    edit(folder, is_decoder=True)
    assert row(measured(folder), "text", "perplexity")


def test_a_class_that_fails_is_told_of_in_a_line(monkeypatch):
    _, folder = saved("MambaForCausalLM")
    monkeypatch.setattr("effconvert.eval.quality.language.text", lambda *_: [][1])
    with pytest.raises(
        ModelError, match=r"MambaForCausalLM of transformers fails in this measurement \(IndexError: list index out of range\); leave the model"
    ):
        measured(folder)


# bench


def held(cache):
    """The bytes of every tensor in a cache that is no counter."""
    tensors = [value for layer in cache.layers for part in vars(layer).values() for value in (part.values() if isinstance(part, dict) else [part])]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.ndim > 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MambaForCausalLM", 2 * 64 * (4 + 4)),  # layers, inner width, states and taps of the convolution
        ("XGLMForCausalLM", 2 * 2 * 32 * 12),  # layers, keys and values, width, tokens
        ("JambaForCausalLM", 64 * (4 + 4) + 2 * 2 * 8 * 12),  # a layer of the one, and one of the other with 2 heads of 8
    ],
)
def test_the_bytes_of_the_cache_are_those_of_the_cache_that_the_class_made(name, expected):
    model, folder = saved(name)
    found = bench([str(folder)], BenchOptions(**QUICK))
    (cell,) = found.cells
    assert cell.failure == ""
    assert cell.decode is not None
    assert cell.cache_bytes == 2 * 4 * expected  # sequences, float32
    assert found.subjects[0].parameters == parameters(model)
    assert found.notes == (f"effconvert does not know the layout of {name} ({model.config.model_type}), so nothing foresees the memory of a pass",)


def test_a_model_that_hands_on_no_cache_is_measured_to_its_first_token():
    _, folder = saved("RwkvForCausalLM")
    found = bench([str(folder)], BenchOptions(**QUICK))
    (cell,) = found.cells
    assert (cell.failure, cell.decode, cell.cache_bytes, cell.predicted) == ("", None, None, None)
    assert cell.prefill is not None
    assert cell.first is not None
    assert found.notes[1] == "RwkvForCausalLM hands on no cache of transformers: nothing after its first token is measured"


def test_a_classifier_is_measured_in_reading_alone():
    folder = put(Path("classifier"), network("DebertaV2ForSequenceClassification"), wordpiece())
    found = bench([str(folder)], BenchOptions(**QUICK))
    assert found.notes[1] == "classifier is an encoder and writes no tokens: prefill only"
    assert found.cells[0].prefill is not None


def test_results_are_written_and_read_beside_those_of_a_model_with_a_shape():
    _, folder = saved("XGLMForCausalLM")
    tiny("llama").save_pretrained("llama")
    characters(Path("llama").absolute())
    found = measured("llama", folder)
    results.save(found, Path("eval.json"))
    assert results.read(Path("eval.json")) == found
    assert [type(subject) for subject in found.subjects] == [results.ShapedSubject, results.Subject]


# What no row describes, though the family has one


def quantise(folder):
    """Quantise the matrices of a tiny llama to fp8 in blocks of 128, by hand; return what transformers makes of them."""
    model = tiny("llama", hidden_size=128, intermediate_size=128, attention_bias=False, mlp_bias=False)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj.weight" in name]:
        tensors[name.replace("weight", "weight_scale_inv")] = torch.ones(1, 1)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        model.get_parameter(name).data.copy_(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    characters(folder.absolute())
    return model


def test_a_quantised_model_is_measured_where_transformers_opens_it(command):
    model = quantise(Path("quantised"))
    found = measured("quantised", dtype="float32")
    model.name_or_path = "quantised"
    assert row(found, "text", "perplexity").values[0].value == pytest.approx(of_text(model), rel=1e-4)
    assert found.subjects[0].parameters == parameters(model)
    told = command("gqa", "--groups", "2", "quantised", "-o", "out")
    assert (told.exit_code, "fp8 quantisation" in told.stderr) == (1, True)
    assert "cannot be converted: quantised holds" in command("inspect", "quantised").stdout


# load, and inspect


def test_it_is_loaded_as_any_other():
    model, folder = saved("MambaForCausalLM")
    loaded = effconvert.load(folder)
    assert type(loaded.model) is type(model)
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids.to(loaded.model.device)).logits.cpu(), model(ids).logits)


def test_inspect_says_what_can_be_known(command):
    model, folder = saved("MambaForCausalLM")
    told = command("inspect", folder)
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines() == [
        "MambaForCausalLM: mamba (MambaForCausalLM)",
        f"parameters       {parameters(model) / 1e3:.4g} k",
        f"on disk          {4 * parameters(model) / 1e3:.4g} kB, F32",
        "tokenizer        yes",
        "files            config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json",
        "cannot be converted: MambaForCausalLM/config.json names the family 'mamba', which effconvert does not know: "
        "it has recurrent layers, which keep a state instead of keys and values (state_size = 4)",
        "can be measured: effconvert eval, effconvert bench",
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("T5ForConditionalGeneration", "has an encoder and a decoder, which reads one text and writes another"),
        ("ViTForImageClassification", "neither by AutoModelForCausalLM nor by AutoModelForMaskedLM"),
    ],
)
def test_what_is_no_language_model_is_looked_at_and_not_measured(command, name, told):
    network(name).save_pretrained(name)
    seen = command("inspect", name)
    assert seen.exit_code == 0, seen.output
    assert f"cannot be measured: {name if name[0] == 'T' else f'transformers opens {name}'} {told}" in seen.stdout
    for measurement in ("eval", "bench"):
        refused = command(measurement, name)
        assert (refused.exit_code, told in refused.stderr) == (1, True), refused.output


def test_code_of_a_model_is_never_run(command):
    _, folder = saved("MambaForCausalLM")
    edit(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"})
    (folder / "own.py").write_text("open('ran', 'w')")
    told = "has no family 'own' and no class OwnForCausalLM; the folder has code of its own for it (auto_map), which is never run here"
    seen = command("inspect", folder)
    assert (seen.exit_code, told in seen.stdout, "numbers on disk  19.42 k" in seen.stdout) == (0, True, True), seen.output
    for measurement in ("eval", "bench"):
        refused = command(measurement, folder)
        assert (refused.exit_code, told in refused.stderr) == (1, True), refused.output
    assert not Path("ran").exists()


def test_damage_is_refused_as_in_any_other(command):
    _, folder = saved("MambaForCausalLM")
    for damage, told in (
        ({"_attn_implementation": "somebody/kernel"}, "asks for the attention kernel 'somebody/kernel' from the Hub"),
        ({"hidden_size": 48}, "of another shape than config.json gives MambaForCausalLM"),
        ({"num_hidden_layers": 3}, "has no backbone.layers.2."),
    ):
        shutil.rmtree("damaged", ignore_errors=True)
        shutil.copytree(folder, "damaged")
        edit(Path("damaged"), **damage)
        refused = command("eval", "damaged")
        assert (refused.exit_code, told in refused.stderr) == (1, True), refused.output
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    refused = command("inspect", folder)
    assert (refused.exit_code, "only as pickle" in refused.stderr) == (1, True), refused.output


def test_the_class_is_found_with_and_without_architectures():
    _, folder = saved("XGLMForCausalLM")
    for names in (["XGLMForCausalLM"], ["SomebodysForCausalLM"], None):
        edit(folder, architectures=names)
        described = describe(look(folder))
        assert (described.architecture, described.decoder, described.predicts, described.bare) == ("XGLMForCausalLM", True, True, False)
    edit(folder, architectures=["XGLMModel"], model_type="somebodys")
    described = describe(look(folder))
    assert (described.decoder, described.predicts, described.bare) == (True, False, True)
