"""Every mistake that a person or a damaged download can make: a sentence, an exit code, and nothing broken."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import effconvert
import effconvert.convert.run
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.shards import header
from effconvert.cli import main
from effconvert.convert import output, verify
from effconvert.convert.plan import plan
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.text import Text
from effconvert.families import FAMILIES
from effconvert.modeling import precision
from effconvert.modeling.stock import read_by
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from tests.models import save, tiny

ASKER, MODEL = 2, 1  # exit codes: whose fault it is
EASY = ("--tokens", "60", "--context", "20")
INDEX = "model.safetensors.index.json"
Check = Callable[..., str]
Command = Callable[..., Result]
Contents = Callable[[Path], dict[str, str]]


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def shard_of(model: Path, name: str) -> Path:
    return model / json.loads((model / INDEX).read_text())["weight_map"][name]


def poison(model: Path, name: str, value: float) -> Path:
    file = shard_of(model, name)
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return file


@contextlib.contextmanager
def nobody(tmp_path: Path, closed: str = "") -> Iterator[None]:
    """Be somebody whom permissions stop, and who may read the test's files but for the `closed` one."""
    for file in tmp_path.rglob("*.safetensors"):  # which the library makes for its owner alone
        file.chmod(0o644)
    if closed:
        (tmp_path / closed).chmod(0)
    if os.geteuid() != 0:
        yield
        return
    opened = [(folder, folder.stat().st_mode) for folder in (tmp_path, *tmp_path.parents) if folder.stat().st_mode & 0o055 != 0o055]
    for folder, mode in opened:
        folder.chmod(mode | 0o055)
    os.seteuid(65534)
    try:
        if not os.access(effconvert.__file__, os.R_OK, effective_ids=True):
            pytest.skip("effconvert lies where only root may read it")
        yield
    finally:
        os.seteuid(0)
        for folder, mode in opened:
            folder.chmod(mode)


def gqa(model: object, *more: object, groups: object = 2) -> tuple[object, ...]:
    return ("gqa", "--groups", groups, "--pool", "mean", model, "-o", "out", "--no-verify", *more)


# The model that is named


def test_a_folder_that_does_not_exist_is_the_askers_mistake(refused: Check, tmp_path: Path) -> None:
    told = refused(ASKER, *gqa(tmp_path / "nowhere"))
    assert "nowhere does not exist" in told


def test_a_folder_without_a_model_is_the_askers_mistake(refused: Check, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty holds no model: there is no config.json" in refused(ASKER, *gqa(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("modules.json", "a sentence-transformers model in parts; give the folder of its part"),
        ("model_index.json", "a diffusers pipeline"),
        ("params.json", "a model in its author's own format; take the copy for transformers"),
        ("tiny-q4_k_m.gguf", "GGUF files; give the path of one of them"),
    ],
)
def test_a_folder_with_something_else_says_what_that_is(refused: Check, tmp_path: Path, file: str, told: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / file).write_text("{}")
    assert f"other has no config.json, and holds {told}" in refused(ASKER, *gqa(tmp_path / "other"))


def test_a_config_without_a_family_is_told_the_one_of_its_class(refused: Check, model: Path) -> None:
    edit(model / "config.json", model_type=None)
    assert "its class is LlamaForCausalLM, so write model_type = 'llama' into it" in refused(MODEL, *gqa(model))


def test_an_unknown_family_that_is_quantised_as_well_says_both(refused: Check, model: Path) -> None:
    edit(model / "config.json", model_type="gpt_oss", quantization_config={"quant_method": "mxfp4"})
    assert "does not know; its weights are quantised too ('mxfp4'); it knows llama" in (sentence := refused(MODEL, *gqa(model)))
    assert sentence.endswith("; take a model of one of these, or only measure this one (effconvert eval)")


def test_a_file_instead_of_a_folder_is_the_askers_mistake(refused: Check, model: Path) -> None:
    told = refused(ASKER, *gqa(model / "config.json"))
    assert "config.json is a file" in told


def test_a_revision_of_a_folder_is_the_askers_mistake(refused: Check, model: Path) -> None:
    assert "--revision" in refused(ASKER, *gqa(model, "--revision", "main"))


def test_an_unknown_family_is_named_with_the_known_ones(refused: Check, model: Path) -> None:
    edit(model / "config.json", model_type="lama")
    told = refused(MODEL, *gqa(model))
    assert "'lama'" in told
    assert "the nearest is 'llama'" in told
    assert "gpt2" in told


@pytest.mark.parametrize("kind", ["t5", "led", "whisper"])
def test_a_family_that_cannot_be_converted_yet_is_refused_by_what_stands_in_the_way(refused: Check, tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
    told = "it is an encoder-decoder (is_encoder_decoder = True); take a"
    assert f"names the family '{kind}', which effconvert does not know: {told}" in refused(MODEL, *gqa(kind))


@pytest.mark.parametrize("content", ["{", "", "\ufeff[]", '"llama"', "[1]", "null"])
def test_a_config_that_is_not_a_json_object_is_the_models_fault(refused: Check, model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    assert "config.json" in refused(MODEL, *gqa(model))


def test_a_config_in_another_encoding_is_the_models_fault(refused: Check, model: Path) -> None:
    (model / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert "config.json is not JSON" in refused(MODEL, *gqa(model))


@pytest.mark.parametrize("value", [0, -4, "four", 4.0, True, [4]])
def test_a_config_whose_numbers_are_none_is_the_models_fault(refused: Check, model: Path, value: object) -> None:
    edit(model / "config.json", num_attention_heads=value)
    assert "num_attention_heads" in refused(MODEL, *gqa(model))


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, -1, 0, 1.5, True], ids=repr)
def test_no_strange_value_of_any_key_of_the_config_ends_in_a_traceback(command: Command, model: Path, value: object) -> None:
    config = model / "config.json"
    original = config.read_text()
    broke = []
    for key in [*json.loads(original), "sliding_window", "layer_types", "max_window_layers", "quantization_config", "tie_word_embeddings"]:
        config.write_text(original)
        edit(config, **{"sliding_window": 16, key: value})
        error = command(*gqa(model, "--dry-run")).exception
        if error is not None and not isinstance(error, SystemExit):
            broke.append(f"{key}: {error!r}")
    assert not broke


def test_json_that_is_nested_too_deep_is_the_models_fault(refused: Check, model: Path) -> None:
    (model / "config.json").write_text("[" * 100_000)
    assert "config.json" in refused(MODEL, *gqa(model))


def test_a_quantised_model_is_refused_by_the_name_of_the_method(refused: Check, model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised (gptq)" in refused(MODEL, *gqa(model))


def test_codes_in_the_place_of_weights_are_not_taken_for_plain_numbers(refused: Check, model: Path) -> None:
    tensors = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name in [name for name, tensor in tensors.items() if "layers" in name and tensor.dim() == 2]:
        tensors[name.replace(".weight", ".W_q")] = tensors.pop(name).to(torch.uint8)  # as of HQQ
    for file in [*model.glob("*.safetensors*")]:
        file.unlink()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    edit(model / "config.json", quantization_config={"quant_method": "hqq"})
    assert "is quantised (hqq), and surgery needs the numbers themselves" in refused(MODEL, *gqa(model))


def test_a_class_that_wants_another_package_is_no_reason_to_mend_the_file() -> None:
    def build() -> None:
        raise ImportError("pip install bitsandbytes")

    with pytest.raises(ModelError, match=r"pip install bitsandbytes\); install that package"):
        read_by("LlamaForCausalLM", build, {})


def test_outputs_as_tuples_are_refused(refused: Check, model: Path) -> None:
    edit(model / "config.json", return_dict=False)
    assert "return_dict = False, where true is needed; mend the file" in refused(MODEL, *gqa(model))


@pytest.mark.parametrize("value", ["gptq", ["gptq"], 4])
def test_a_strange_quantization_config_is_refused_as_well(refused: Check, model: Path, value: object) -> None:
    edit(model / "config.json", quantization_config=value)
    assert "quantised" in refused(MODEL, *gqa(model))


def test_an_adapter_is_refused_with_how_to_merge_it(refused: Check, model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refused(MODEL, *gqa(model))


def test_a_model_with_an_adapters_tensors_in_it_is_refused(refused: Check, model: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.lora_A.weight"
    file = model / "model-lora.safetensors"
    save_file({name: torch.zeros(2, 32)}, file)
    where = json.loads((model / INDEX).read_text())["weight_map"]
    edit(model / INDEX, weight_map={**where, name: file.name})
    assert name in refused(MODEL, *gqa(model))


def test_a_checkpoint_that_is_only_pickle_is_refused_and_not_opened(refused: Check, model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    told = refused(MODEL, *gqa(model))
    assert "only as pickle (pytorch_model.bin)" in told
    assert not Path("opened").exists()


def test_code_that_comes_with_a_model_is_never_run(command: Command, model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (model / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: ...\n")
    edit(model / "config.json", auto_map=dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil"))
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"]})
    result = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", *EASY)
    assert not marker.exists()
    assert result.exit_code == 0, result.output  # the family is known, so its own class is used
    assert Path("out/modeling_evil.py").is_file()


def test_code_of_a_tokenizer_is_not_run_even_when_somebody_would_say_yes(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (model / "tokenization_evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: ...\n")
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}))
    result = CliRunner().invoke(main, ["gqa", "--groups", "2", "--pool", "mean", str(model), "-o", "out", "--tokens", "64"], input="y\ny\ny\n")
    assert not marker.exists()
    assert result.exit_code in (0, MODEL), result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("damage", ["{", '{"model": 3}'])
def test_a_damaged_tokenizer_is_refused_before_anything_is_written(refused: Check, model: Path, damage: str) -> None:
    (model / "tokenizer.json").write_text(damage)
    assert "tokenizer" in refused(MODEL, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out")


def test_trained_weights_under_the_same_names_are_not_replaced(command: Command, model: Path) -> None:
    assert command(*gqa(model)).exit_code == 0
    shard = sorted(Path("out").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes() + b"trained")
    result = command(*gqa(model, "--overwrite"))
    assert result.exit_code == ASKER
    assert shard.name in result.stderr
    assert shard.read_bytes().endswith(b"trained")


def test_code_that_comes_with_a_model_of_an_unknown_family_is_never_run(refused: Check, model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (model / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: ...\n")
    edit(model / "config.json", model_type="evil", auto_map={"AutoConfig": "modeling_evil.Evil"})
    refused(MODEL, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out")
    assert not marker.exists()


# Damaged weights


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_shard_is_named(refused: Check, model: Path, keep: int) -> None:
    file = sorted(model.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file.name} is damaged" in refused(MODEL, *gqa(model))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * 8 + data[8:],  # a header of 16 exabytes
        lambda data: data[:8] + b"?" + data[9:],
        lambda data: data.replace(b'"BF16"', b'"QF16"', 1),
        lambda data: data.replace(b'"data_offsets":[0', b'"data_offsets":[2', 1),
        lambda data: data.replace(b'"shape":[', b'"shape":"', 1).replace(b"]", b'"', 1),
        lambda data: data + b"\0\0",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n",
        lambda data: (2).to_bytes(8, "little") + b"[]",
        lambda data: (11).to_bytes(8, "little") + b'{"a": null}',
    ],
    ids=["huge header", "no JSON", "unknown type", "a hole", "shape is text", "a tail", "LFS pointer", "a list", "null"],
)
def test_a_corrupt_shard_is_named(refused: Check, model: Path, damage: Callable[[bytes], bytes]) -> None:
    file = sorted(model.glob("*.safetensors"))[1]
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    assert f"{file.name} is damaged" in refused(MODEL, *gqa(model))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_named(refused: Check, model: Path, content: str) -> None:
    (model / INDEX).write_text(content)
    assert INDEX in refused(MODEL, *gqa(model))


def test_a_missing_shard_is_named(refused: Check, model: Path) -> None:
    file = sorted(model.glob("*.safetensors"))[1]
    file.unlink()
    assert f"{file.name!r}, which is missing" in refused(MODEL, *gqa(model))


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "sub/../../elsewhere.safetensors", "..\\elsewhere.safetensors"])
def test_an_index_that_leads_out_of_the_folder_is_refused(refused: Check, model: Path, place: str) -> None:
    shutil.copyfile(sorted(model.glob("*.safetensors"))[0], model.parent / "elsewhere.safetensors")
    where = json.loads((model / INDEX).read_text())["weight_map"]
    edit(model / INDEX, weight_map={**where, "lm_head.weight": place})
    assert f"{place!r}, which is outside the folder" in refused(MODEL, *gqa(model))


def test_an_index_that_seeks_a_tensor_in_the_wrong_shard_is_named_with_the_tensor(refused: Check, model: Path) -> None:
    where = json.loads((model / INDEX).read_text())["weight_map"]
    first, last = where["model.embed_tokens.weight"], where["model.norm.weight"]
    assert first != last
    edit(model / INDEX, weight_map={**where, "model.norm.weight": first})
    told = refused(MODEL, *gqa(model))
    assert "model.norm.weight" in told
    assert first in told


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("num_attention_heads", 8, "num_attention_heads = 8"),
        ("num_attention_heads", 2, "num_attention_heads = 2"),
        ("num_key_value_heads", 2, "num_key_value_heads = 2"),
        ("head_dim", 16, "head_dim = 16"),
        ("hidden_size", 64, "hidden_size = 64"),
        ("num_hidden_layers", 2, "num_hidden_layers = 2"),
        ("num_hidden_layers", 4, "model.layers.3."),
        ("num_hidden_layers", 3 * 10**7, "num_hidden_layers = 30000000, and no model has more"),
        ("num_hidden_layers", 10**30, "num_hidden_layers = 1"),
        ("num_attention_heads", 10**9, "num_attention_heads = 1000000000"),
        ("num_key_value_heads", 10**9, "num_key_value_heads = 1000000000"),
        ("head_dim", 10**9, "head_dim = 1000000000"),
        ("hidden_size", 10**9, "hidden_size = 1000000000"),
        ("intermediate_size", 10**9, "intermediate_size = 1000000000"),
        ("vocab_size", 10**9, "vocab_size = 1000000000"),
        ("vocab_size", 300, "vocab_size = 300"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused_by_the_key(refused: Check, model: Path, key: str, value: int, named: str) -> None:
    edit(model / "config.json", **{key: value})
    assert named in refused(MODEL, *gqa(model))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "roberta", "distilbert"])
def test_more_positions_than_the_table_has_are_refused(kind: str, refused: Check, tmp_path: Path) -> None:
    """Loading would make a buffer as long as that."""
    folder = save(tiny(kind), tmp_path / kind)
    edit(folder / "config.json", **{FAMILIES[kind].positions_key: 10**12})
    assert f"{FAMILIES[kind].positions_key} = {10**12}" in refused(MODEL, "inspect", folder)


def test_a_width_of_the_mlp_that_contradicts_the_config_is_refused_at_the_latest_by_verification(refused_late: Check, model: Path) -> None:
    edit(model / "config.json", intermediate_size=64)
    assert "mlp" in refused_late(MODEL, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", *EASY)


COMMANDS = {
    "gqa": ("--groups", "2", "-o", "out"),
    "refit": ("--teacher", "model", "-o", "out"),
    "streaming": ("--window", "8", "-o", "out"),
    "inspect": (),
    "eval": EASY,
    "bench": ("--context", "12", "--new-tokens", "2"),
}


def retype(model: Path, part: str, dtype: torch.dtype) -> None:
    """Store the tensors whose name holds `part` in another type."""
    for file in model.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) if part in name else tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", COMMANDS)
def test_weights_of_a_type_that_nobody_computes_in_are_refused_by_every_command(refused: Check, model: Path, name: str) -> None:
    """Of those who quantise by hand: no quantization_config says so."""
    retype(model, ".", torch.float8_e4m3fn)
    assert "is stored as F8_E4M3" in refused(MODEL, name, *COMMANDS[name], model)


@pytest.mark.parametrize("name", ["inspect", "gqa"])
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head", "norm", "0.self_attn.k_proj", "2.mlp.down_proj"])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8], ids=str)
def test_one_weight_of_a_type_that_nobody_computes_in_is_named(refused: Check, model: Path, name: str, part: str, dtype: torch.dtype) -> None:
    retype(model, part, dtype)
    told = refused(MODEL, name, *COMMANDS[name], model)
    assert part in told
    assert "give an unquantised checkpoint" in told


@pytest.mark.parametrize("name", COMMANDS)
def test_a_type_of_less_than_a_byte_is_named(refused: Check, model: Path, name: str) -> None:
    file = shard_of(model, "model.layers.1.mlp.down_proj.weight")
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F4"  '))
    assert "is stored as F4" in refused(MODEL, name, *COMMANDS[name], model)


def test_a_buffer_that_comes_first_may_be_of_any_type(command: Command, tmp_path: Path) -> None:
    """As mergekit and MLX order tensors: by name, and gpt_neox had a mask in each layer, which nobody reads."""
    folder = save(tiny("gpt_neox"), tmp_path / "neox")
    masks = {f"gpt_neox.layers.{index}.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for index in range(2)}
    tensors = dict(sorted({**load_file(folder / "model.safetensors"), **masks}.items()))
    head = header({name: ("U8" if name in masks else "F32", tuple(tensor.shape)) for name, tensor in tensors.items()})
    (folder / "model.safetensors").write_bytes(head + b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    for name, options in (("inspect", ()), ("gqa", ("--groups", "2", "--pool", "mean", "-o", "out"))):
        done = command(name, *options, folder)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_no_number_is_named_whether_the_surgery_reads_it_or_not(refused_late: Check, model: Path, name: str, value: float) -> None:
    file = poison(model, name, value)
    told = refused_late(MODEL, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", *EASY)
    assert name in told
    assert file.name in told


def test_a_model_that_computes_infinity_is_refused_by_verification(refused_late: Check, model: Path) -> None:
    for file in model.glob("*.safetensors"):
        tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
        for name in tensors:
            if "layers.1.self_attn.v_proj" in name:
                tensors[name][:] = 65504.0
        save_file(tensors, file, metadata={"format": "pt"})
    edit(model / "config.json", dtype="float16")
    told = refused_late(MODEL, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", *EASY)
    assert "NaN or infinity" in told


# Options


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        (3, "does not divide this model's 4 KV heads; give 1 or 2 or 4"),
        (8, "is more than this model's 4 KV heads"),
        *((wrong, repr(wrong)) for wrong in ("0", "-1", "3.7", "abc", "")),
    ],
)
def test_groups_that_cannot_be_are_refused_with_what_can(refused: Check, model: Path, groups: object, named: str) -> None:
    told = refused(ASKER, *gqa(model, groups=groups))
    assert "--groups" in told
    assert named in told


def test_missing_groups_are_asked_for_by_their_option(refused: Check, model: Path) -> None:
    assert "--groups is needed" in refused(ASKER, "gqa", model, "-o", "out")


def test_a_missing_model_is_the_askers_mistake(refused: Check) -> None:
    assert "MODEL" in refused(ASKER, "gqa", "--groups", "2", "--pool", "mean")


def test_an_unknown_option_is_named_with_the_nearest(refused: Check, model: Path) -> None:
    told = refused(ASKER, "gqa", "--group", "2", model)
    assert "--group" in told
    assert "--groups" in told.replace("--group'", "", 1)


def test_an_unknown_command_is_named_with_the_nearest(refused: Check, model: Path) -> None:
    assert "no command 'gpa'; did you mean 'gqa'?" in refused(ASKER, "gpa", "--groups", "2", model)


def test_an_unknown_command_like_no_other_is_told_which_there_are(refused: Check) -> None:
    told = refused(ASKER, "xyzzy")
    assert "'xyzzy'" in told
    assert "expand-kv" in told


def test_a_choice_that_is_none_is_refused_with_the_choices(refused: Check, model: Path) -> None:
    told = refused(ASKER, *gqa(model, "--pool", "median"))
    assert "'median'" in told
    assert "'mean' or 'first'" in told


@pytest.mark.parametrize(("option", "value"), [("--tokens", "1"), ("--context", "0"), ("--tokens", "many")])
def test_a_number_out_of_bounds_is_refused_by_its_option(refused: Check, model: Path, option: str, value: str) -> None:
    told = refused(ASKER, *gqa(model, option, value))
    assert option in told
    assert repr(value) in told


# The text


def test_a_text_that_is_not_there_is_the_askers_mistake(refused: Check, model: Path) -> None:
    assert "missing.txt cannot be read" in refused(ASKER, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--text", "missing.txt")


@pytest.mark.parametrize(("content", "why"), [(b"caf\xe9 au lait", "not UTF-8"), (b" \n", "is empty")])
def test_a_text_that_is_none_is_the_askers_mistake(refused: Check, model: Path, content: bytes, why: str) -> None:
    Path("text.txt").write_bytes(content)
    told = refused(ASKER, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--text", "text.txt")
    assert "text.txt" in told
    assert why in told


@pytest.mark.parametrize("context", [20, 512])
def test_a_text_of_three_words_is_measured_in_one_short_window_only_where_few_tokens_were_asked_for(command: Command, model: Path, context: int) -> None:
    Path("text.txt").write_text("Three short words")
    asked = ("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--text", "text.txt", "--context", context)
    result = command(*asked)
    assert result.exit_code == 2
    assert f"text.txt has 17 tokens, and at least {min(context, 32)} are needed" in " ".join(result.output.split())
    result = command(*asked, "--tokens", 17)
    assert result.exit_code == 0, result.output  # and the report says so
    assert "16 tokens in windows of 17" in result.stdout


@pytest.mark.parametrize("more", [("--context", 10**9, "--tokens", 100), ("--tokens", 10**9)], ids=lambda more: more[0])
def test_more_tokens_than_the_text_has_need_no_memory_or_disk(command: Command, model: Path, more: tuple[object, ...]) -> None:
    Path("text.txt").write_text("Three short words " * 20)
    result = command("gqa", "--groups", 2, "--pool", "mean", model, "--text", "text.txt", "--dry-run", *more)
    assert result.exit_code == 0, result.output


def test_too_little_room_for_logits_is_refused_by_the_option_that_asks_for_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text("text", "Three short words " * 20)
    monkeypatch.setattr(precision, "computes", lambda _: True)
    conversion = plan(open_checkpoint(model), (Gqa(groups=2, pool="mean"),))
    material = verify.prepare(conversion, text, RunOptions())
    token = 2 * 258 * 2  # bytes of its logits, twice
    available = material.memory - 10 * token  # of a window of 64
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=10**12))
    with pytest.raises(OptionError, match=r"with windows of 64 tokens, and [\d.]+ GB are free; give --context 32$"):
        verify.prepare(conversion, text, RunOptions())
    verify.prepare(conversion, text, RunOptions(context=32))
    scratch = verify.scratch_bytes(conversion, material)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: SimpleNamespace(free=conversion.disk + scratch - 1))
    with pytest.raises(OptionError, match=r"or fewer --tokens: [\d.]+ GB are for logits$"):
        output.check(conversion, Path("out"), False, scratch)


def test_a_text_of_one_token_is_refused(refused_late: Check, model: Path) -> None:
    Path("text.txt").write_text("a")
    assert "text.txt has 1 tokens" in refused_late(ASKER, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--text", "text.txt")


def test_a_tokenizer_of_another_model_is_the_models_fault(refused_late: Check, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 999
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = refused_late(MODEL, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", *EASY)
    assert "999" in told
    assert "258" in told


# The place to write


def test_an_output_that_exists_is_refused_without_overwrite(refused: Check, model: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("ten years")
    assert "out exists" in refused(ASKER, *gqa(model))


def test_an_output_that_is_a_file_is_refused(refused: Check, model: Path) -> None:
    Path("out").write_text("ten years")
    assert "out exists" in refused(ASKER, *gqa(model))
    refused(ASKER, *gqa(model, "--overwrite"))


def test_a_folder_that_effconvert_did_not_write_is_never_overwritten(refused: Check, model: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("ten years")
    assert "thesis.txt" in refused(ASKER, *gqa(model, "--overwrite"))


def test_an_output_of_effconverts_own_is_replaced_when_asked(command: Command, contents: Contents, model: Path) -> None:
    assert command(*gqa(model)).exit_code == 0
    first = contents(Path("out"))
    assert command(*gqa(model, groups=1)).exit_code == 2
    assert contents(Path("out")) == first
    assert command(*gqa(model, "--overwrite", groups=1)).exit_code == 0
    assert json.loads(Path("out/config.json").read_text())["num_key_value_heads"] == 1
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out"]


@pytest.mark.parametrize("added", ["thesis.txt", "sub/thesis.txt"])
def test_an_output_to_which_somebody_added_a_file_is_never_overwritten(command: Command, refused: Check, model: Path, added: str) -> None:
    assert command(*gqa(model)).exit_code == 0
    Path("out", added).parent.mkdir(exist_ok=True)
    Path("out", added).write_text("ten years")
    assert added in refused(ASKER, *gqa(model, "--overwrite"))


def test_what_lies_where_the_output_is_built_is_never_deleted(command: Command, model: Path) -> None:
    Path("out.partial").mkdir()
    Path("out.partial/thesis.txt").write_text("ten years")
    result = command(*gqa(model))
    assert result.exit_code == ASKER
    assert "out.partial" in result.stderr
    assert Path("out.partial/thesis.txt").read_text() == "ten years"


def test_what_lies_where_the_old_output_waits_is_never_deleted(command: Command, model: Path) -> None:
    assert command(*gqa(model)).exit_code == 0
    Path("out.replaced").mkdir()
    Path("out.replaced/thesis.txt").write_text("ten years")
    result = command(*gqa(model, "--overwrite"))
    assert result.exit_code == ASKER
    assert "out.replaced" in result.stderr
    assert Path("out.replaced/thesis.txt").read_text() == "ten years"


@pytest.mark.parametrize("output", ["model", "model/converted", "model/../model"])
def test_an_output_in_the_source_or_around_it_is_refused(refused: Check, model: Path, output: str) -> None:
    for more in ((), ("--overwrite",)):
        told = refused(ASKER, "gqa", "--groups", "2", "--pool", "mean", model, "-o", output, "--no-verify", *more)
        assert "one inside the other" in told


def test_an_output_in_the_source_by_way_of_a_link_is_refused(refused: Check, model: Path) -> None:
    Path("link").symlink_to(model)
    assert "one inside the other" in refused(ASKER, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "link/converted", "--no-verify")


def test_an_output_that_is_a_link_to_nowhere_does_not_end_in_a_traceback(command: Command, model: Path) -> None:
    Path("out").symlink_to("gone")
    result = command(*gqa(model))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)


def test_an_output_below_a_file_is_refused(refused: Check, model: Path) -> None:
    Path("file").write_text("")
    assert "file is not a folder that you may write to" in refused(ASKER, "gqa", "--groups", "2", "--pool", "mean", model, "-o", "file/out", "--no-verify")


def test_a_place_that_is_read_only_is_refused(refused: Check, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o555)
    with nobody(tmp_path):
        told = refused(ASKER, "gqa", "--groups", "2", "--pool", "mean", model, "-o", place / "out", "--no-verify")
    assert "locked is not a folder that you may write to" in told


@pytest.mark.parametrize("closed", ["model", "model/config.json", "model/" + INDEX, "model/tokenizer.json", "model/README.md", "model/1_Pooling"])
def test_a_model_that_may_not_be_read_is_refused_by_name(command: Command, model: Path, tmp_path: Path, closed: str) -> None:
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "1_Pooling").mkdir()
    Path("place").mkdir(mode=0o777)
    Path("place").chmod(0o777)
    with nobody(tmp_path, closed):
        result = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "place/out", "--no-verify")
    (tmp_path / closed).chmod(0o755)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (ASKER, MODEL)
    assert closed in result.stderr
    assert not Path("place/out").exists()


def test_an_output_in_a_folder_that_may_not_be_entered_is_refused(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    with nobody(tmp_path):
        result = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "locked/out", "--no-verify")
    (tmp_path / "locked").chmod(0o755)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == ASKER
    assert "locked" in result.stderr


# The disk


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(refused: Check, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effconvert.convert.write.shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000))
    told = refused(ASKER, *gqa(model))
    assert "out needs" in told
    assert "make room" in told


COPYING = "effconvert.convert.write.copy_run"


@pytest.mark.parametrize(("call", "times"), [(COPYING, 1), (COPYING, 6), ("os.fsync", 1), ("os.fsync", 4)])
def test_a_disk_that_fills_up_leaves_what_the_same_command_goes_on_from(
    command: Command, contents: Contents, refused_late: Check, model: Path, monkeypatch: pytest.MonkeyPatch, call: str, times: int
) -> None:
    source = contents(model)
    assert command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "unbroken", "--no-verify").exit_code == 0
    real, left = resolve_name(call), [times]

    def full(*args: object) -> object:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        told = refused_late(MODEL, *gqa(model))
    assert left[0] <= 0, "nothing called it"
    assert "no room left for out" in told
    assert not list(Path("out.partial").glob("*draft"))
    result = command(*gqa(model))
    assert result.exit_code == 0, result.output
    assert ("shards were there" in result.stdout) == (times > 1)
    assert contents(Path("out")) == contents(Path("unbroken"))
    assert contents(model) == source


def test_an_error_of_the_disk_that_is_not_lack_of_room_is_told_as_it_is(refused_late: Check, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    told = refused_late(MODEL, *gqa(model))
    assert os.strerror(errno.EIO) in told
    assert "out" in told


def test_a_conversion_never_changes_its_source(command: Command, contents: Contents, model: Path) -> None:
    before = contents(model)
    result = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", *EASY)
    assert result.exit_code == 0, result.output
    assert contents(model) == before
    assert sorted(path.name for path in Path().iterdir()) == ["model", "out"]


@pytest.mark.parametrize("output", [".", "", "..", "model/.."])
def test_an_output_without_a_name_is_refused(refused: Check, model: Path, output: str) -> None:
    told = refused(ASKER, "gqa", "--groups", "2", "--pool", "mean", model, "-o", output, "--no-verify")
    assert "is not the name of a new folder" in told or "one inside the other" in told


def test_a_model_trained_on_in_its_own_folder_is_not_replaced_though_its_sizes_are_the_same(command: Command, model: Path) -> None:
    assert command(*gqa(model)).exit_code == 0
    shard = sorted(Path("out").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = command(*gqa(model, "--overwrite"))
    assert result.exit_code == ASKER
    assert shard.name in result.stderr
    assert shard.read_bytes() == data


@pytest.mark.parametrize("name", ["out/effconvert.json", ".out.lock", "out.partial/effconvert.json", "out.replaced/effconvert.json"])
def test_a_file_of_somebody_elses_under_a_name_of_ours_stays(command: Command, model: Path, name: str) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    for more in ((), ("--overwrite",)):
        assert command(*gqa(model, *more)).exit_code == ASKER
        assert path.read_text() == "mine"


@pytest.mark.parametrize("architecture", ["Bogus", "[/red]", "AutoImageProcessor", "LlamaForCausalLM.evil"])
def test_a_class_that_is_none_of_the_familys_is_refused_in_the_plan(refused: Check, model: Path, architecture: str) -> None:
    edit(model / "config.json", architectures=[architecture])
    assert architecture in refused(MODEL, *gqa(model), "--dry-run")


def test_an_attention_kernel_from_the_hub_is_refused(refused: Check, model: Path) -> None:
    edit(model / "config.json", attn_implementation="evil/kernel")
    assert "evil/kernel" in refused(MODEL, *gqa(model), "--dry-run")
