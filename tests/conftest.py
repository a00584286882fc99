"""A tiny model with a tokenizer, the command line, and what a folder holds."""

import gc
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import pytest
from click.testing import CliRunner, Result

import effconvert
from effconvert.cli import main
from effconvert.families import CONVERTIBLE

ALWAYS = {"llama", "gpt2", "bert"}  # families that every test goes through
FAMILY = {kind: index for index, kind in enumerate(CONVERTIBLE)}
MANY = 8  # families of a test that goes through all that it can
SHARDS = 5  # of the tiny model, at least
os.environ["HF_EVALUATE_OFFLINE"] = "1"  # else metrics of lm-eval ask the network for what is here
os.environ["TRITON_INTERPRET"] = "1"  # kernels run without a GPU; triton reads it when it is imported, which torch may do at any time


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow most of the tests that are alike.

    Of a test over many families run ALWAYS and a twelfth of the others, another twelfth for each technique: what a family does in a way of its own shows with
    any technique, and what a technique does in any family. All tests of a technique go through the same families, which are converted once. Tests of the
    families themselves are marked `families`. Of a test that is marked `few(N)` the first case runs, and one in N of the others.
    """
    over, few = defaultdict[str, list[tuple[str, str, pytest.Item]]](list), defaultdict[str, list[pytest.Item]](list)
    for item in items:
        options = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        name, kind = options.get("done") or (options.get("name"), options.get("kind"))
        test = item.nodeid.partition("[")[0]
        if kind in FAMILY and not item.get_closest_marker("families"):
            over[f"{test} {name}"].append((name or test, kind, item))
        if item.get_closest_marker("few") and kind not in ALWAYS:
            few[test].append(item)
    for cases in over.values():
        for key, kind, item in cases:
            if len(cases) >= MANY and kind not in ALWAYS and (crc32(key.encode()) + FAMILY[kind]) % 12:
                item.add_marker(pytest.mark.slow)
    for alike in few.values():
        for item in alike[1:]:
            (every,) = item.get_closest_marker("few").args  # type: ignore[union-attr]  # all of these have it
            if crc32(item.nodeid.encode()) % every:  # not every Nth: crossed parameters would give the same value of one of them each time
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking through all that was imported, again and again: a tenth of the time."""
    gc.freeze()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 4 KV heads in several shards, and a byte-level tokenizer. Nobody may change it: copy it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("source") / "tiny"
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says while a fixture is made is not what is tested
        model.save_pretrained(folder, max_shard_size="20KB")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) >= SHARDS
    return folder


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in its own folder, with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFCONVERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run bfloat16 as CPUs with instructions for it do, so that tests have the same numbers and words on all."""
    monkeypatch.setattr("effconvert.modeling.precision.computes", lambda _: True)
    monkeypatch.setattr("effconvert.modeling.precision.multiplies_bfloat16", lambda: False)


@pytest.fixture(autouse=True, scope="session")
def _no_flushing() -> Iterator[None]:
    """Do not wait for the disk, which takes a tenth of the time: no test cuts the power. Processes that tests start do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _large_batches() -> Iterator[None]:
    """Run eight windows at a time where users run one: the same text in fewer calls of each layer, and in fewer steps of `transfer`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("effconvert.heal._calibration.BATCH", 8)
        yield


@pytest.fixture
def one_window_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one window at a time, as users do: for tests of how it is done, and of what `transfer` learns."""
    monkeypatch.setattr("effconvert.heal._calibration.BATCH", 1)


@pytest.fixture
def command() -> Callable[..., Result]:
    """Run a command line in this process."""
    return lambda *args: CliRunner().invoke(main, list(map(str, args)), prog_name="effconvert")


@pytest.fixture
def contents() -> Callable[[Path], dict[str, str]]:
    """Map each file below a folder to the hash of its bytes."""
    return lambda folder: {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()
    }


@pytest.fixture
def environment() -> dict[str, str]:
    """What a subprocess needs to find the effconvert that is tested."""
    package = str(Path(effconvert.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}  # compiled once, not by every command


@pytest.fixture
def with_technique(tmp_path: Path, environment: dict[str, str], python: str) -> Callable[..., Callable[..., subprocess.CompletedProcess[str]]]:
    """Return the command line of the package with one file more among its techniques, and nothing else changed."""

    def added(name: str, text: str) -> Callable[..., subprocess.CompletedProcess[str]]:
        site = tmp_path / "site"
        shutil.copytree(Path(effconvert.__file__).parent, site / "effconvert", ignore=shutil.ignore_patterns("__pycache__"))
        (site / f"effconvert/surgery/{name}.py").write_text(text)
        own = {**environment, "PYTHONPATH": str(site)}
        held = {"env": own, "capture_output": True, "text": True, "timeout": 100}
        return lambda *arguments: subprocess.run([python, "-m", "effconvert", *map(str, arguments)], **held)

    return added


@pytest.fixture
def python() -> str:
    """The interpreter that runs the tests."""
    return sys.executable
