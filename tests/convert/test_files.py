"""Which files go along with a model: by a list of what belongs, the same from a folder and from the Hub; nothing else is copied, and nothing is an error."""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from click.testing import Result
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import utils

from effconvert.checkpoint.belonging import KNOWN, belongs, code, modules, stems_of
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.plan import Plan, plan
from effconvert.convert.run import convert
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.mixing.fnet import Fnet
from tests.convert.test_bad_input import edit, nobody
from tests.models import save, tiny

Command = Callable[..., Result]
Contents = Callable[[Path], dict[str, str]]
COMMIT = "c" * 40
OURS = {"effconvert.json", "effconvert.yaml", "README.md", "config.json", "model.safetensors.index.json"}
HALF = Gqa(groups=2, pool="mean")
SECRET = "WANDB_API_KEY=0123"


def put(folder: Path, *names: str, text: str = SECRET) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def planned(folder: Path) -> Plan:
    return plan(open_checkpoint(folder), (HALF,))


def converted(model: object, output: str = "out", *, verify: bool = False) -> set[str]:
    """Convert, and return what was written but for what every output has."""
    convert(str(model), (HALF,), RunOptions(output=Path(output), verify=verify, tokens=60, context=20))
    names = {file.relative_to(output).as_posix() for file in Path(output).rglob("*") if file.is_file()}
    assert names >= {"effconvert.json", "config.json"}
    return {name for name in names - OURS if not re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)}


def note(notes: Iterable[str], start: str) -> str:
    """Return the one remark that begins so."""
    (said,) = [remark for remark in notes if remark.startswith(start)]
    return said


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], set[str]]:
    """Put a folder on a Hub as `lab/model`; return the names of what is fetched from it, which grow. Its cache is laid out as huggingface_hub's."""

    def offer(source: Path) -> set[str]:
        repo, fetched = tmp_path / "hub" / "models--lab--model", set()
        snapshot, blobs = repo / "snapshots" / COMMIT, repo / "blobs"

        def snapshot_download(model: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
            assert (model, revision) in (("lab/model", None), ("lab/model", COMMIT))
            snapshot.mkdir(parents=True, exist_ok=True)
            blobs.mkdir(exist_ok=True)
            files = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
            for name in set(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)) - fetched:
                fetched.add(name)
                blob = blobs / f"blob-{len(fetched)}"
                shutil.copyfile(source / name, blob)
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / name).symlink_to(blob)
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return fetched

    return offer


# The list


def test_every_file_that_a_tokenizer_of_transformers_or_transformers_itself_names_belongs() -> None:
    sources = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    tables = [table for file in sources for table in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", file.read_text(encoding="utf-8"), re.DOTALL)]
    names = {name for table in tables for name in re.findall(r"""["']([\w.-]+\.\w+)["']""", table)}
    assert len(names) > 15
    names |= {utils.GENERATION_CONFIG_NAME, utils.PROCESSOR_NAME, utils.FEATURE_EXTRACTOR_NAME, utils.VIDEO_PROCESSOR_NAME, utils.AUDIO_TOKENIZER_NAME}
    names |= {utils.CHAT_TEMPLATE_FILE, utils.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, f"{utils.CHAT_TEMPLATE_DIR}/tool_use.jinja"}
    assert {name for name in names if not belongs(name, KNOWN)} == set()


BELONG = {
    "llama": "LICENSE.txt USE_POLICY.md generation_config.json special_tokens_map.json tokenizer.json tokenizer_config.json tokenizer.model",
    "mistral": "tekken.json tokenizer.model.v3 chat_template.jinja",
    "qwen": "LICENSE NOTICE merges.txt vocab.json qwen.tiktoken",
    "gemma": "added_tokens.json chat_template.json preprocessor_config.json processor_config.json",
    "qwen-vl": "video_preprocessor_config.json",
    "whisper": "normalizer.json",
    "bert": "vocab.txt",
    "deberta, t5, xlm-r": "spm.model spiece.model sentencepiece.bpe.model",
    "all-MiniLM": "modules.json config_sentence_transformers.json sentence_bert_config.json",
    "command-r": "additional_chat_templates/rag.jinja",
    "chatglm": "MODEL_LICENSE",
}
LEFT = {
    "llama": "original/params.json original/consolidated.00.pth original/tokenizer.model",
    "mistral": "consolidated.safetensors params.json SYSTEM_PROMPT.txt",
    "all-MiniLM": "data_config.json train_script.py onnx/model.onnx onnx/tokenizer.json openvino/openvino_model.xml tf_model.h5 rust_model.ot",
    "trainer": "training_args.bin trainer_state.json optimizer.pt runs/events.out.tfevents.0 wandb/debug.log checkpoint-500/tokenizer.json latest",
    "hidden": ".env .gitattributes .git/config .tiktoken",
    "pickle by a known name": "tokenizer.model.pkl LICENSE.bin",
    "others": "model-q4.gguf adapter_config.json adapter_model.safetensors figures/loss.png modelcard.json handler.py requirements.txt old/vocab.txt",
}


@pytest.mark.parametrize("model", BELONG)
def test_what_models_on_the_hub_have_belongs(model: str) -> None:
    assert [name for name in BELONG[model].split() if not belongs(name, KNOWN)] == []


@pytest.mark.parametrize("model", LEFT)
def test_what_lies_beside_models_on_the_hub_does_not_belong(model: str) -> None:
    assert [name for name in LEFT[model].split() if belongs(name, KNOWN)] == []


# What is left


def test_of_a_trainers_folder_only_the_model_goes_along_and_the_rest_is_one_remark(model: Path, command: Command) -> None:
    before = converted(model, "clean", verify=True)
    put(model, "wandb/debug.log", "runs/events.out.tfevents.0", "train.py", "data.parquet", "notes.sqlite", "checkpoint-500/config.json", ".env")
    put(model, "openvino/openvino_model.xml", "trainer_state.json", "optimizer.pt", "rng_state_0.pth", "params.json", "original/params.json")
    assert converted(model, verify=True) == before
    assert not any(SECRET.encode() in file.read_bytes() for file in Path("out").rglob("*") if file.is_file())
    sent = command("push", "out", "lab/pushed", "--dry-run")
    assert sent.exit_code == 0, sent.output
    assert "left alone" not in sent.stdout
    assert not any(name in sent.stdout for name in ("wandb", "train", "params.json", "notes", "openvino"))

    said = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "other", "--dry-run").stdout
    told = [line.removeprefix("note").strip() for line in said.splitlines() if line.startswith("note")]
    assert len(told) == 3
    assert note(told, "left out, as no part of the model").endswith("checkpoint-500/, data.parquet, notes.sqlite, openvino/, runs/, train.py and 2 more")
    assert "training starts anew" in note(told, "optimizer.pt, rng_state_0.pth, trainer_state.json:")
    assert "not converted" in note(told, "original/, params.json:")


def test_of_a_clean_folder_nothing_is_said(model: Path) -> None:
    put(model, "LICENSE", "README.md", "effconvert.yaml")
    assert planned(model).notes == []


def test_an_adapter_beside_whole_weights_is_said_and_left(model: Path) -> None:
    before = converted(model, "clean")
    put(model, "adapter_config.json", text=json.dumps({"peft_type": "LORA", "base_model_name_or_path": "somebody/else", "r": 4}))
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}, model / "adapter_model.safetensors")
    said = note(planned(model).notes, "adapter_config.json, adapter_model.safetensors: ")
    assert "what is converted and measured are those weights without it" in said
    assert "peft" in said
    assert "merge_and_unload" in said
    assert converted(model) == before


def test_whatever_lies_in_a_folder_is_no_error(model: Path, command: Command) -> None:
    before = converted(model, "clean")
    os.mkfifo(model / "pipe")
    os.mkfifo(model / "tokenizer.model")  # of a known name: to be left, and not waited for
    here, name = Path.cwd(), f"{model.name}/socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name)
    (model / "loop").symlink_to("loop")
    (model / "gone").symlink_to("nowhere")
    (model / "log.txt").symlink_to("/dev/null")
    (model / "vocab.txt").symlink_to("/dev/null")
    (model / "README.md").symlink_to("nowhere")
    (model / "latest").symlink_to(here)
    (model / "above").symlink_to("..")
    put(model, "two\nlines [bold]", os.fsdecode(b"latin-\xe9"), os.fsdecode(b"tokenizer-\xe9.json"), "LICENSE.d/a", "-rf")
    try:
        done = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--no-verify")
    finally:
        listener.close()
    assert done.exit_code == 0, done.output
    assert converted(model, "again") == before
    (line,) = [line for line in done.stdout.splitlines() if "left out, as no part" in line]
    assert "LICENSE.d/, above/, gone" in line
    assert "README.md, tokenizer.model, vocab.txt: left out, since there is no file of that name" in done.stdout
    everything = " ".join(planned(model).notes)
    assert everything.isprintable()


@pytest.mark.parametrize("closed", ["wandb", "checkpoint-500", "notes.txt", "pytorch_model.bin"])
def test_what_does_not_belong_may_be_closed(model: Path, tmp_path: Path, command: Command, closed: str) -> None:
    put(model, "wandb/debug.log", "checkpoint-500/config.json", "notes.txt", "pytorch_model.bin")
    Path("place").mkdir()
    Path("place").chmod(0o777)
    with nobody(tmp_path, f"{model.name}/{closed}"):
        result = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "place/out", "--no-verify")
    (model / closed).chmod(0o755)
    assert result.exit_code == 0, result.output
    assert "left out, as no part of the model: checkpoint-500/, notes.txt, pytorch_model.bin, wandb/" in result.stdout


# Links


def test_a_link_of_a_known_name_is_followed_and_said_where_it_leads_out(model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (model / "tokenizer.json").rename(base / "tokenizer.json")
    (model / "tokenizer.json").symlink_to(base / "tokenizer.json")
    put(model, "COPYING")
    (model / "LICENSE").symlink_to("COPYING")
    assert converted(model, verify=True) >= {"tokenizer.json", "LICENSE", "COPYING"}
    assert not Path("out/tokenizer.json").is_symlink()
    assert Path("out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    (said,) = planned(model).notes
    assert said.startswith("tokenizer.json: copied from outside the folder")


def test_a_link_of_another_name_is_left(model: Path, tmp_path: Path) -> None:
    put(tmp_path, "secret.txt")
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert "notes.txt" not in converted(model)
    assert planned(model).notes == ["left out, as no part of the model: notes.txt"]


@pytest.mark.parametrize("named", ["credentials", "1_Pooling"])
def test_what_a_model_names_itself_may_not_lead_out_of_its_folder(model: Path, tmp_path: Path, named: str) -> None:
    put(tmp_path / "home", "config.json", "keys.py")
    put(model, "modules.json", text=json.dumps([{"path": named, "type": "keys.Module"}]))
    (model / named).symlink_to(tmp_path / "home")
    (model / "keys.py").symlink_to(tmp_path / "home" / "keys.py")
    (model / "linked").symlink_to("inside")
    assert not {name for name in converted(model) if name.startswith((named, "keys"))}
    assert planned(model).notes == [f"left out, as no part of the model: {', '.join(sorted([f'{named}/', 'keys.py', 'linked']))}"]


def test_a_linked_module_inside_the_folder_goes_along(model: Path) -> None:
    put(model, "inside/config.json")
    put(model, "modules.json", text=json.dumps([{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]))
    (model / "1_Pooling").symlink_to("inside")
    assert "1_Pooling/config.json" in converted(model)


# The same from a folder and from the Hub


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    """A sentence-transformers model with two modules behind the transformer: one without weights, one with them."""
    folder = save(tiny("bert"), tmp_path / "embedder")
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    entries = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)]
    put(folder, "modules.json", text=json.dumps(entries))
    put(folder, "1_Pooling/config.json", text='{"pooling_mode_mean_tokens": true}')
    put(folder, "2_Dense/config.json", text='{"in_features": 64, "out_features": 16, "bias": false}')
    save_file({"linear.weight": torch.randn(16, 64)}, folder / "2_Dense" / "model.safetensors")
    return folder


def test_modules_of_sentence_transformers_come_with_their_weights(
    embedder: Path, hub: Callable[[Path], set[str]], contents: Contents, command: Command
) -> None:
    put(embedder, "3_Old/config.json", "2_Dense/notes.md", "2_Dense/deep/config.json")
    want = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert converted(embedder, "local", verify=True) >= want
    assert contents(Path("local"))["2_Dense/model.safetensors"] == contents(embedder)["2_Dense/model.safetensors"]
    assert planned(embedder).notes == ["left out, as no part of the model: 2_Dense/deep/, 2_Dense/notes.md, 3_Old/"]
    hub(embedder)
    assert converted("lab/model", "fetched") == converted(embedder, "again")
    assert contents(Path("fetched"))["2_Dense/model.safetensors"] == contents(embedder)["2_Dense/model.safetensors"]
    sent = command("push", "local", "lab/pushed", "--dry-run")
    assert sent.exit_code == 0, sent.output
    assert all(name in sent.stdout for name in want)
    assert "3_Old" not in sent.stdout


@pytest.mark.parametrize("pickled", [True, False], ids=["pickle", "nothing"])
def test_a_module_without_weights_that_can_be_taken_is_said(embedder: Path, hub: Callable[[Path], set[str]], pickled: bool) -> None:
    (embedder / "2_Dense" / "model.safetensors").unlink()
    if pickled:
        put(embedder, "2_Dense/pytorch_model.bin", text="cos\nsystem\n(S'touch opened'\ntR.")
    (said,) = planned(embedder).notes
    assert said.startswith("2_Dense: the weights of this module are " + ("only pickle (2_Dense/pytorch_model.bin)" if pickled else "not there as safetensors"))
    local = converted(embedder, "local")
    assert {"2_Dense/config.json"} == {name for name in local if name.startswith("2_Dense")}
    fetched = hub(embedder)
    assert converted("lab/model", "fetched") == local
    assert not any(name.endswith(".bin") for name in fetched)
    assert not Path("opened").exists()


def test_a_transformer_in_a_folder_of_its_own_is_said(embedder: Path) -> None:
    put(embedder, "modules.json", text=json.dumps([{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]))
    put(embedder, "0_Transformer/config.json")
    assert "not converted" in note(planned(embedder).notes, "0_Transformer: ")


def test_a_folder_full_of_everything_gives_the_same_from_the_hub(model: Path, hub: Callable[[Path], set[str]], contents: Contents) -> None:
    put(model, *(name for names in BELONG.values() for name in names.split() if not (model / name).exists() and name != "modules.json"), text="{}")
    put(model, *(name for names in LEFT.values() for name in names.split()))
    put(model, "README.md", text="---\nlicense: mit\n---\n")
    put(model, "modules.json", text=json.dumps([{"path": "1_[a]*", "type": "custom_st.Module"}]))
    put(model, "1_[a]*/config.json", "custom_st.py", "configuration_own.py", "unused.py")
    put(model, "modeling_own.py", text="from .layers_own import Layer\nraise SystemExit\n")
    put(model, "layers_own.py", text="import .configuration_own\nraise SystemExit\n")
    edit(model / "config.json", auto_map={"AutoModel": "modeling_own.Model", "AutoConfig": "lab/other--configuration.Config"})
    local = converted(model, "local")
    assert local >= {"custom_st.py", "modeling_own.py", "layers_own.py", "configuration_own.py", "1_[a]*/config.json", "tekken.json"}
    assert not local & {name for names in LEFT.values() for name in names.split()}
    fetched = hub(model)
    assert converted("lab/model", "fetched") == local
    told = dict.fromkeys(("effconvert.json", "effconvert.yaml", "README.md"), "")  # these say where it came from
    assert {**contents(Path("fetched")), **told} == {**contents(Path("local")), **told}
    assert "license: mit" in Path("fetched/README.md").read_text()
    assert fetched - local - OURS - {file.name for file in model.glob("model-*.safetensors")} == {
        "adapter_config.json",
        ".tiktoken",
    }  # the first to say that it is there
    assert converted("local", "twice") == local  # what was taken once is taken again


# Code


def test_entries_of_auto_map_without_their_code_are_dropped_as_if_transformers_ignored_them(model: Path) -> None:
    put(model, "tokenization_own.py", text="class Own: ...\n")
    put(model, "modeling_half.py", text="from .gone import Gone\n")
    there = {"AutoModelForSequenceClassification": "lab/other--modeling.Model"}
    edit(model / "config.json", auto_map={"AutoConfig": "configuration_gone.Config", "AutoModelForCausalLM": "modeling_half.Model", **there})
    kept = {"AutoTokenizer": ["tokenization_own.Own", None]}
    edit(model / "tokenizer_config.json", auto_map={**kept, "AutoProcessor": "processing_gone.Own"})
    with pytest.raises(OSError, match=r"configuration_gone\.py"):
        transformers.AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)

    names = converted(model)
    assert "tokenization_own.py" in names
    assert "modeling_half.py" not in names
    assert json.loads(Path("out/config.json").read_text())["auto_map"] == there
    tokenizer, before = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (Path("out"), model))
    assert tokenizer == {**before, "auto_map": kept}
    assert type(transformers.AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)) is transformers.LlamaForCausalLM
    notes = planned(model).notes
    assert "configuration_gone.py, gone.py is not there" in note(notes, "config.json: AutoConfig, AutoModelForCausalLM of auto_map dropped")
    assert "processing_gone.py is not there" in note(notes, "tokenizer_config.json: AutoProcessor of auto_map dropped")

    again = convert(str(model), (HALF,), RunOptions(output=Path("out"), verify=False), reuse=True)
    assert again.already_there


def test_where_no_entry_stays_there_is_no_auto_map(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoConfig": "configuration_gone.Config"})
    edit(model / "tokenizer_config.json", auto_map=["tokenization_gone.Slow", "tokenization_gone.Fast"])  # as it was written long ago
    converted(model)
    assert not any("auto_map" in json.loads(Path(f"out/{name}.json").read_text()) for name in ("config", "tokenizer_config"))


@pytest.mark.parametrize("value", [3, "modeling.Model", [3], {"AutoModel": 3}, {"AutoModel": ["x", [["y.Z"]]]}, {"AutoModel": "../up.Model"}, {}, None])
def test_an_auto_map_that_makes_no_sense_stays_as_it_is(model: Path, value: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": value}))
    made = planned(model)
    assert made.config.content["auto_map"] == value
    assert made.notes == []


def test_code_of_the_family_that_a_model_was_is_dropped(tmp_path: Path) -> None:
    source = save(tiny("bert"), tmp_path / "source")
    put(source, "modeling_own.py", text="class Model: ...\n")
    edit(source / "config.json", auto_map={"AutoModel": "modeling_own.Model"})
    made = plan(open_checkpoint(source), (Fnet(),))
    assert made.config.kind == "fnet"
    assert "auto_map" not in made.config.content
    assert "modeling_own.py" not in made.files
    assert note(made.notes, "config.json: AutoModel of auto_map").endswith("that code is of a bert")


def test_code_that_imports_itself_ends(tmp_path: Path) -> None:
    put(tmp_path, "a.py", text="from .b import B\n")
    put(tmp_path, "b.py", text="from .a import A\nfrom . import c\nfrom .. import d\nimport os\n")
    assert code(tmp_path, "a") == {"a.py", "b.py"}
    assert stems_of({"AutoModel": "a.A", "AutoTokenizer": ["b.B", None], "AutoConfig": "lab/x--c.C", "AutoX": "d.e.F"}) == {"a", "b"}


@pytest.mark.parametrize("place", ["../base", "/etc", ".ssh", "a/../../b", "a\\b", 3, None, {}])
def test_modules_outside_the_folder_are_none(tmp_path: Path, place: object) -> None:
    put(tmp_path, "modules.json", text=json.dumps([{"path": place, "type": "sentence_transformers.models.Dense"}, {"path": "ok/", "type": "x.Y"}, 3]))
    assert modules(tmp_path) == {"ok": "x.Y"}


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"path": "x"}', "3", "\x00"])
def test_a_damaged_list_of_modules_names_none(model: Path, content: str) -> None:
    put(model, "modules.json", text=content)
    assert "modules.json" in planned(model).files


# Pushing


def test_what_an_earlier_version_copied_from_a_cluttered_folder_is_not_pushed(model: Path, command: Command) -> None:
    from effconvert.checkpoint.digest import file_hash

    converted(model, verify=True)
    put(Path("out"), "wandb/debug.log")
    manifest = json.loads(Path("out/effconvert.json").read_text())
    manifest["files"]["wandb/debug.log"] = len(SECRET)
    manifest["sha256"]["wandb/debug.log"] = file_hash(Path("out/wandb/debug.log"))
    Path("out/effconvert.json").write_text(json.dumps(manifest))
    done = command("push", "out", "lab/pushed", "--dry-run")
    assert done.exit_code == 1
    assert "names wandb/debug.log, which is no part of a model; convert again" in done.stderr
