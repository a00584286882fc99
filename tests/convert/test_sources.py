"""Where models come from: the Hub, as far as a small server of our own can play it, and GGUF files."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result
from gguf import GGUFReader

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.sources import fetch, locate
from effconvert.checkpoint.unpacking import check_complete, restore_rope, restore_scale
from effconvert.errors import EffconvertError, ModelError
from effconvert.eval.quality.text import read_calibration
from effconvert.modeling import loading as stock
from tests.convert.conftest import one_line
from tests.hub import answering, serve, variables
from tests.hub_state import Hub, Repo

Command = Callable[..., Result]
Run = Callable[..., subprocess.CompletedProcess[str]]
Refused = Callable[..., str]
COMMIT, OLDER = "a" * 40, "b" * 40
TOKEN = "hf_" + "t0psecret" * 4
NOTHING = "no-such-model"


@pytest.fixture
def server(llama: Path) -> Iterator[Hub]:
    """A Hub of our own with two models: `lab/tiny`, which is open, and `lab/gated`."""
    newest = {file.name: file.read_bytes() for file in llama.iterdir()}
    newest["pytorch_model.bin"] = b"cos\nsystem\n(S'touch opened'\ntR."
    newest["modeling_tiny.py"] = b"raise SystemExit"
    older = {**newest, "LICENSE": b"of version 1"}
    tiny = Repo({COMMIT: newest, OLDER: older}, {"main": COMMIT, "v1": OLDER})
    with serve(Hub({"lab/tiny": tiny, "lab/gated": Repo(gated=True)}, {TOKEN: ("somebody", "read")})) as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, python: str, environment: dict[str, str], tmp_path: Path) -> Run:
    """Run a conversion of a model of that Hub, as somebody who has never used one before."""

    def run(model: str, *more: str, **changes: str) -> subprocess.CompletedProcess[str]:
        arguments = [python, "-m", "effconvert", "gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--no-verify", *more]
        return subprocess.run(arguments, env={**variables(server, environment, tmp_path), **changes}, capture_output=True, text=True, timeout=100)

    return run


@pytest.fixture
def gives_up(server: Hub, command: Command, tmp_path: Path) -> Refused:
    """Return the one line that the same conversion gives up with, in this process."""

    def run(model: str, *more: str, code: int, endpoint: str = "") -> str:
        with answering(endpoint or server.endpoint, tmp_path):
            done = command("gqa", "--groups", "2", "--pool", "mean", model, "-o", "out", "--no-verify", *more)
        assert done.exit_code == code, done.stderr
        assert not Path("out").exists()
        assert not Path("out.partial").exists()
        return one_line(done)  # no bar of progress either: this is no terminal

    return run


def test_a_model_is_fetched_by_its_id_and_converted_as_from_a_folder(
    server: Hub, hub: Run, llama: Path, command: Command, contents: Callable[[Path], dict[str, str]]
) -> None:
    done = hub("lab/tiny", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert command("gqa", "--groups", "2", "--pool", "mean", llama, "-o", "local", "--no-verify").exit_code == 0
    fetched, local = contents(Path("out")), contents(Path("local"))
    record = json.loads(Path("out/effconvert.json").read_text())
    told = dict.fromkeys(("effconvert.json", "effconvert.yaml", "README.md"), "")  # these say where it came from
    assert {**fetched, **told} == {**local, **told}
    assert record["source"]["model"] == "lab/tiny"

    paths = [request.path for request in server.asked]
    assert any(path.endswith(".safetensors") for path in paths)
    assert not any(path.endswith((".bin", ".py")) for path in paths)  # neither pickle nor code is even fetched
    assert not list(Path("hf").rglob("*.bin"))

    assert {request.authorization for request in server.asked} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    for file in Path("out").rglob("*"):
        assert TOKEN.encode() not in file.read_bytes()

    server.fails, asked = True, len(server.asked)
    again = hub("lab/tiny", "--overwrite")  # from the cache, though the Hub is in trouble
    assert again.returncode == 0, again.stderr
    assert len(server.asked) > asked


@pytest.mark.slow
def test_a_revision_is_fetched_by_its_name(server: Hub, hub: Run) -> None:
    done = hub("lab/tiny", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert Path("out/LICENSE").read_text() == "of version 1"
    assert {request.authorization for request in server.asked} == {""}  # nobody is logged in
    source = json.loads(Path("out/effconvert.json").read_text())["source"]
    assert source["revision"] == "v1"


@pytest.mark.slow
def test_the_commit_that_was_fetched_is_recorded_and_nothing_said_about_progress_to_a_pipe(hub: Run) -> None:
    done = hub("lab/tiny")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert COMMIT in Path("out/effconvert.json").read_text()  # `main` will be another model tomorrow


@pytest.mark.slow
def test_what_is_fetched_leaves_the_process_as_loud_as_it_was(server: Hub, python: str, environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from effconvert.checkpoint.sources import fetch; from tests.convert.test_sources import voices\n"
        "for bars in True, False:\n    before = voices(bars); fetch('lab/tiny', None); assert voices() == before, voices()"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([python, "-c", code], env=variables(server, environment, tmp_path), cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_revision_that_does_not_exist_is_named(gives_up: Refused) -> None:
    told = gives_up("lab/tiny", "--revision", "v2", code=2)
    assert "lab/tiny has no revision 'v2'" in told


def test_a_model_that_does_not_exist_is_named(gives_up: Refused) -> None:
    told = gives_up("lab/tyni", code=2)
    assert "'lab/tyni'" in told
    assert "hf auth login" in told


def test_a_name_without_an_owner_is_sought_on_the_hub_as_well(gives_up: Refused) -> None:
    assert f"{NOTHING!r}" in gives_up(NOTHING, code=2)


def test_a_gated_model_is_named_with_what_to_do(gives_up: Refused) -> None:
    told = gives_up("lab/gated", code=1)
    assert "lab/gated is gated" in told
    assert "hf auth login" in told


def test_a_model_on_the_hub_without_safetensors_is_refused_by_its_id(server: Hub, gives_up: Refused) -> None:
    files = server.repos["lab/tiny"].commits[COMMIT]
    server.repos["lab/tiny"].commits[COMMIT] = {name: data for name, data in files.items() if "safetensors" not in name}
    told = gives_up("lab/tiny", code=1)
    assert "safetensors" in told
    assert "lab/tiny" in told or "lab--tiny" in told


def test_a_model_that_cannot_be_converted_is_refused_before_its_weights_are_fetched(server: Hub, gives_up: Refused, tmp_path: Path) -> None:
    files = server.repos["lab/tiny"].commits[COMMIT]
    config, index = json.loads(files["config.json"]), json.loads(files["model.safetensors.index.json"])
    unknown = {**files, "config.json": json.dumps({**config, "model_type": "mamba", "state_size": 16}).encode()}
    packed = {**index["weight_map"], "model.layers.0.self_attn.q_proj.qweight": "model-00001-of-00002.safetensors"}
    quantised = {**files, "model.safetensors.index.json": json.dumps({**index, "weight_map": packed}).encode()}
    repos = {"lab/mamba": unknown, "lab/measured": unknown, "lab/gptq": quantised, "lab/gguf": {"README.md": b"", "tiny-q4.gguf": b"GGUF"}}
    server.repos |= {name: Repo({COMMIT: content}, {"main": COMMIT}) for name, content in repos.items()}
    told = [gives_up(name, code=1) for name in ("lab/mamba", "lab/gptq", "lab/gguf")]
    with answering(server.endpoint, tmp_path):
        fetch("lab/measured", None)  # measuring needs no known family
    assert "the family 'mamba', which effconvert does not know: it has recurrent layers" in told[0]
    assert "q_proj.qweight, which is of GPTQ or AWQ quantisation" in told[1]
    assert "lab/gguf has no config.json on the Hub, and holds GGUF files; give the path of one of them" in told[2]
    weights = [request.path for request in server.asked if request.path.endswith(".safetensors")]
    assert weights
    assert all("lab/measured" in path for path in weights)


def test_a_hub_that_is_in_trouble_is_an_error_of_one_line(server: Hub, gives_up: Refused) -> None:
    server.fails = True
    told = gives_up("lab/tiny", code=2)
    assert "'lab/tiny'" in told


def test_a_hub_that_cannot_be_reached_is_an_error_of_one_line(gives_up: Refused) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        told = gives_up("lab/tiny", endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}", code=2)
    assert "'lab/tiny'" in told
    assert "cannot be reached" in told


# GGUF


def write_gguf(
    path: Path,
    without: str = "",
    extra: Mapping[str, Sequence[float]] | None = None,
    scaling: str = "",
    factor: float = 4.0,
    theta: float = 10000.0,
    parts: int = 1,
) -> Path:
    """Write a random Llama of one layer with 4 KV heads in float32, with the alphabet of bytes as its tokenizer.

    Args:
        path: of the file.
        without: a tensor that it lacks.
        extra: more tensors.
        scaling: of RoPE.
        factor: of the scaling; 0 leaves it out.
        theta: of RoPE.
        parts: number of files.
    """
    import numpy
    from gguf import GGUFWriter, RopeScalingType, TokenType
    from tokenizers import pre_tokenizers

    width, inner, heads = 32, 48, 4
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
    writer = GGUFWriter(path, "llama", split_max_tensors=12 // parts if parts > 1 else 0)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 258)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if scaling:
        writer.add_rope_scaling_type(RopeScalingType(scaling))
        if factor:
            writer.add_rope_scaling_factor(factor)
    random = numpy.random.default_rng(0)
    shapes = {
        "token_embd": (len(pieces), width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "output_norm": (width,),
        "output": (len(pieces), width),
    }
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(numpy.float32) + (len(shape) == 1))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, numpy.array(values, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write such a file, which nobody may change."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"without": "blk.0.attn_k"}, "has no tensors for model.layers.0.self_attn.k_proj.weight; it is damaged"),
        ({"extra": {"blk.0.attn_q.bias": [1.0] * 32}}, "has 32 numbers that transformers"),
        ({"extra": {"rope_freqs.weight": [1.0, 2.0, 2.5, 7.0]}}, "scales RoPE (rope_freqs.weight)"),
        ({"extra": {"rope_factors_long.weight": [1.0, 2.0, 2.5, 7.0]}}, "scales RoPE (longrope)"),
        ({"scaling": "yarn"}, "scales RoPE (yarn)"),
        ({"scaling": "linear", "factor": 0.0}, "scales RoPE (linear)"),
    ],
)
def test_what_transformers_would_make_up_or_leave_out_of_a_gguf_file_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        locate(str(write_gguf(Path("other.gguf"), **change)))
    assert not list(Path("cache/gguf").iterdir())


def test_one_part_of_a_gguf_model_is_refused() -> None:
    write_gguf(Path("tiny.gguf"), parts=3)
    with pytest.raises(ModelError, match="is one of 3 parts of a model; join them into one file first"):
        locate(str(*Path().glob("tiny-00001-of-*.gguf")))


def test_the_scaled_frequencies_of_llama_3_are_written_into_the_config() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theta, scaling = 500000.0, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters={"rope_theta": theta, "rope_type": "llama3", **scaling})
    scaled = LlamaRotaryEmbedding(config).inv_freq
    factors = theta ** (-torch.arange(0, 8, 2) / 8) / scaled  # as llama.cpp stores them
    assert len(set(factors.tolist())) == 3  # short waves as they are, one between, long ones divided by 8
    folder = locate(str(write_gguf(Path("scaled.gguf"), extra={"rope_freqs.weight": factors.tolist()}, theta=theta)))
    torch.testing.assert_close(transformers.AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq, scaled)


def test_a_linear_scaling_is_written_into_the_config() -> None:
    folder = locate(str(write_gguf(Path("linear.gguf"), scaling="linear", theta=500.0)))
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(("width", "scale"), [(256, 256), (128, 168)])
def test_large_gemmas_divide_their_scores_by_the_width_of_a_share_of_the_stream(width: int, scale: int) -> None:
    config = transformers.Gemma3TextConfig(hidden_size=5376, num_attention_heads=32, num_key_value_heads=16, head_dim=width)
    restore_scale(config)
    assert config.query_pre_attn_scalar == scale


def test_a_base_of_rope_that_transformers_does_not_read_is_restored(gguf: Path) -> None:
    config = transformers.Gemma3TextConfig()
    restore_rope(gguf, GGUFReader(write_gguf(Path("base.gguf"), theta=500.0)), config)
    assert (config.rope_parameters["full_attention"]["rope_theta"], config.rope_parameters["sliding_attention"]["rope_theta"]) == (500.0, 10000.0)


def test_a_head_that_is_stored_beside_the_same_embedding_is_no_number_too_many(gguf: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=True))
    table = SimpleNamespace(name="token_embd.weight", shape=(32, 260))
    check_complete(gguf, SimpleNamespace(tensors=[table, SimpleNamespace(name="output.weight", shape=(32, 260))]), model, [])
    others = sum(parameter.numel() for parameter in model.parameters()) - 32 * 260
    rest = SimpleNamespace(name="blk.0.ffn_up.weight", shape=(others,))
    check_complete(gguf, SimpleNamespace(tensors=[table, rest, SimpleNamespace(name="output.weight", shape=(32, 260))]), model, [])
    with pytest.raises(ModelError, match="has 1 numbers that"):
        check_complete(gguf, SimpleNamespace(tensors=[table, rest, SimpleNamespace(name="blk.0.attn_q.bias", shape=(1,))]), model, [])


def test_factors_of_one_scale_nothing() -> None:
    folder = locate(str(write_gguf(Path("plain.gguf"), extra={"rope_freqs.weight": [1.0] * 4})))
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"


def test_files_beside_a_gguf_file_are_not_taken_for_its_own(gguf: Path, llama: Path, contents: Callable[[Path], dict[str, str]]) -> None:
    alone = contents(locate(str(gguf)))
    shutil.copy(gguf, "tiny.gguf")
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(zip(tokenizer["model"]["vocab"], reversed(tokenizer["model"]["vocab"].values()), strict=True))
    Path("tokenizer.json").write_text(json.dumps(tokenizer))
    Path("generation_config.json").write_text('{"temperature": 0.1, "do_sample": true}')
    assert contents(locate("tiny.gguf")) == alone


def test_what_a_killed_unpacking_left_is_removed(gguf: Path) -> None:
    folder = locate(str(gguf))
    shutil.rmtree(folder)
    folder.with_name(f"{folder.name}.abc").mkdir()
    assert locate(str(gguf)) == folder
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_a_gguf_file_is_unpacked_once_and_converted(gguf: Path, command: Command, contents: Callable[[Path], dict[str, str]]) -> None:
    result = command("gqa", "--groups", "2", "--pool", "mean", gguf, "--tokens", "60", "--context", "20")
    assert result.exit_code == 0, result.output
    config = json.loads(Path("tiny-gqa-2/config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", 2)
    assert "perplexity" in result.stdout
    kept = contents(Path("cache"))
    assert kept
    again = command("gqa", "--groups", "2", "--pool", "mean", gguf, "--no-verify", "-o", "again")
    assert again.exit_code == 0, again.output
    assert contents(Path("cache")) == kept


def test_a_gguf_file_keeps_its_numbers(gguf: Path, command: Command) -> None:
    import torch
    from gguf import GGUFReader
    from safetensors import safe_open

    assert command("gqa", "--groups", "4", "--pool", "mean", gguf, "--no-verify", "-o", "out").exit_code == 0
    held = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(gguf).tensors}
    (file,) = Path("out").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert torch.equal(opened.get_tensor("model.layers.0.mlp.down_proj.weight"), held["blk.0.ffn_down.weight"].bfloat16())
        assert torch.equal(opened.get_tensor("model.layers.0.self_attn.v_proj.weight"), held["blk.0.attn_v.weight"].bfloat16())


def test_of_two_unpackings_at_once_the_first_one_stays(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def after_another(draft: Path, folder: Path) -> Path:
        """Put the folder there as another process does after this one has looked."""
        shutil.copytree(draft, folder)
        (folder / "first").touch()
        return rename(draft, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", after_another)
        folder = locate(str(gguf))
    assert {"first", "config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    assert locate(str(gguf)) == folder


def test_something_in_the_place_of_an_unpacked_file_is_named(gguf: Path) -> None:
    folder = locate(str(gguf))
    (folder / "config.json").unlink()
    with pytest.raises(EffconvertError, match=f"{folder} is in the way"):
        locate(str(gguf))


@pytest.fixture
def as_loud_as_before() -> Iterator[None]:
    """Leave libraries as other tests expect them."""
    bars = voices()["datasets"]
    yield
    voices(bool(bars))


def voices(bars: bool | None = None) -> dict[str, object]:
    """How loud the libraries are in this process, after bars of progress were turned on or off, where that is asked."""
    import datasets
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    if bars is not None:
        for library in (datasets.utils, hub):
            (library.enable_progress_bars if bars else library.disable_progress_bars)()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        logging.set_verbosity(logging.WARNING if bars else logging.CRITICAL)
    return {
        "hub": not hub.are_progress_bars_disabled(),
        "transformers": logging.is_progress_bar_enabled(),
        "datasets": not datasets.utils.are_progress_bars_disabled(),
        "verbosity": (hub.logging.get_verbosity(), logging.get_verbosity()),
    }


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("what", ["gguf", "damaged gguf", "dataset", "damaged dataset", "load"])
def test_a_library_that_was_kept_quiet_has_its_voice_back(what: str, bars: bool, gguf: Path, llama: Path, as_loud_as_before: None) -> None:
    Path("text.jsonl").write_text(json.dumps({"text": "a text"}))
    Path("damaged.jsonl").write_text("{")
    Path("damaged.gguf").write_bytes(gguf.read_bytes()[:1000])
    config = open_checkpoint(llama).config
    calls: dict[str, Callable[[], object]] = {
        "gguf": lambda: locate(str(gguf)),
        "damaged gguf": lambda: locate("damaged.gguf"),
        "dataset": lambda: read_calibration("text.jsonl"),
        "damaged dataset": lambda: read_calibration("damaged.jsonl"),
        "load": lambda: stock.load(llama, config, torch.float32),
    }
    before = voices(bars)
    with contextlib.suppress(EffconvertError):
        calls[what]()
    assert voices() == before


def test_hub_bars_that_were_off_alone_stay_off(llama: Path, as_loud_as_before: None) -> None:
    """Transformers turns those of huggingface_hub on with its own."""
    import huggingface_hub.utils as hub

    voices(True)
    hub.disable_progress_bars()
    before = voices()
    stock.load(llama, open_checkpoint(llama).config, torch.float32)
    assert voices() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:3],
        lambda data: data[:200],
        lambda data: data[:-400],
        lambda data: b"GGML" + data[4:],
        lambda data: data[:8] + b"\xff" * 8 + data[16:],
        lambda data: b"<html>404</html>" * 10,
    ],
    ids=["empty", "3 bytes", "200 bytes", "a tensor cut short", "another format", "endless tensors", "a page"],
)
def test_a_damaged_gguf_file_is_the_models_fault(gguf: Path, command: Command, damage: Callable[[bytes], bytes]) -> None:
    Path("damaged.gguf").write_bytes(damage(gguf.read_bytes()))
    result = command("gqa", "--groups", "2", "--pool", "mean", "damaged.gguf", "-o", "out", "--no-verify")
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert "damaged.gguf cannot be unpacked" in result.stderr
    assert not Path("out").exists()
    assert not Path("out.partial").exists()
    assert not [path for path in Path("cache/gguf").rglob("*") if path.is_file()]


def test_a_gguf_file_whose_tokenizer_contradicts_itself_is_the_models_fault(gguf: Path, command: Command) -> None:
    data = gguf.read_bytes()
    assert data.count(b"a b") == 1
    Path("damaged.gguf").write_bytes(data.replace(b"a b", b"a c"))  # a merge into a token that is not there
    result = command("gqa", "--groups", "2", "--pool", "mean", "damaged.gguf", "-o", "out", "--no-verify")
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert "damaged.gguf cannot be unpacked" in result.stderr


def test_a_gguf_file_that_is_not_there_is_the_askers_mistake(command: Command) -> None:
    result = command("gqa", "--groups", "2", "--pool", "mean", "gone.gguf", "-o", "out")
    assert result.exit_code == 2
    assert "there is no file gone.gguf" in result.stderr


# Adapters


@pytest.fixture
def with_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers look for adapters, as it does where peft is installed, and fail where it finds one."""
    from transformers import modeling_utils
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    for module in (peft, auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda: True)
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "load_adapter", lambda *_, **__: pytest.fail("an adapter was put on top of the weights"))


def test_an_adapter_beside_whole_weights_is_not_put_on_top_of_them(with_peft: None, model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    loaded = stock.load(model, open_checkpoint(model).config, torch.float32, "cpu")
    with pytest.raises(pytest.fail.Exception):
        type(loaded).from_pretrained(model)


def test_an_adapter_beside_a_gguf_file_is_not_taken_for_it(with_peft: None, gguf: Path, tmp_path: Path) -> None:
    shutil.copy(gguf, tmp_path / "tiny.gguf")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert (locate(str(tmp_path / "tiny.gguf")) / "config.json").is_file()
