"""Conversions give the tensors that tests/golden.json records, so a refactor can prove that it changes no number.

    python -m tests.test_golden    # record what the code does now, after a change that is meant to change numbers

Tensors that are copied or averaged have the same bytes on every machine. Those that linear algebra or training gives have the same bytes
only on the machine that recorded them; elsewhere a few statistics of each are compared.
"""

import hashlib
import json
import platform
import random
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import effconvert
from tests.models import characters, save, tiny

RECORD = Path(__file__).with_name("golden.json")
MODEL = Path(effconvert.__file__).parent / "demo" / "model"
EMBEDDED, PRECISE = "embedded", "embedded in float32"  # in bfloat16 linear algebra magnifies what machines round differently
OWN = re.compile(r"\.(mixer|effconvert)\.")  # the module that has a mixer's own tensors: its name is free to change
UNCHANGED = "(unchanged)"  # all tensors that are the source's, in one hash


@dataclass(frozen=True)
class Case:
    """One conversion."""

    steps: tuple[dict[str, Any], ...]
    kind: str = EMBEDDED  # the model: the embedded one, as it is or in float32, or the family of a tiny one
    changes: dict[str, Any] = field(default_factory=dict)  # to the tiny model's config
    options: dict[str, Any] = field(default_factory=dict)
    computed: bool = False  # whether linear algebra or training has a part in it, so that bytes differ between machines
    free: bool = False  # whether machines choose signs of eigenvectors too, so that only singular values are the same
    tolerance: float = 1e-4  # of statistics, in norms of the tensor; other instruction sets differ by 4e-6 in float32


def embedded(*steps: dict[str, Any], computed: bool = False, tolerance: float = 1e-4) -> Case:
    """A conversion of the embedded model."""
    return Case(steps, computed=computed, tolerance=tolerance)


def precise(*steps: dict[str, Any], free: bool = False, tolerance: float = 1e-4, **options: Any) -> Case:
    """A conversion of the embedded model in float32."""
    return Case(steps, PRECISE, options=options, computed=True, free=free, tolerance=tolerance)


def family(kind: str, step: dict[str, Any], computed: bool = False, **changes: Any) -> Case:
    """A conversion of a tiny model."""
    return Case((step,), kind, changes, computed=computed)


ALIGNED = {"gqa": {"groups": 2, "pool": "aligned"}}
CASES = {
    "gqa-mean": embedded({"gqa": {"groups": 2, "pool": "mean"}}),
    "gqa-first": embedded({"gqa": {"groups": 2, "pool": "first"}}),
    "gqa-pca": precise({"gqa": {"groups": 2, "pool": "pca"}}, free=True),
    "gqa-pca-similar": precise({"gqa": {"groups": 2, "pool": "pca", "grouping": "similar"}}, free=True),
    "gqa-aligned": precise(ALIGNED),
    # A refit reads attention in half precision: other instruction sets differ by 3e-2 where the system is ill-conditioned, by 3e-4 where it is not.
    "gqa-aligned-refit": precise(ALIGNED, refit=True, tolerance=0.2),
    "llama-aligned-refit": Case((ALIGNED,), "llama", options={"refit": True}, computed=True, tolerance=2e-3),
    "mqa-mean": embedded({"mqa": {"pool": "mean"}}),
    "streaming": embedded({"streaming": {"window": 64, "sinks": 4}}),
    "linear": embedded({"linear": {"window": 16}}),
    "linear-t2r": embedded({"linear": {"feature": "t2r", "features": 16}}, computed=True),
    "linear-transfer": embedded({"linear": {"window": 16}}, {"transfer": {"epochs": 1}}, computed=True, tolerance=1e-2),
    "linear-transfer-float32": precise({"linear": {"window": 16}}, {"transfer": {"epochs": 2}}, calibration_tokens=2048),
    "performer": embedded({"performer": {"features": 32}}, computed=True),
    "retnet": embedded({"retnet": {"decay": "fitted"}}, computed=True),
    "linformer-causal": embedded({"linformer-causal": {"block": 16, "rank": 4}}),
    "llama-expand-kv": family("llama", {"expand-kv": {}}, num_key_value_heads=2),
    "llama-streaming-mistral": family("llama", {"streaming": {"window": 8, "sinks": 0}}),
    "gpt2-mqa": family("gpt2", {"mqa": {"pool": "mean"}}),
    "bert-gqa": family("bert", {"gqa": {"groups": 2, "pool": "mean"}}),
    "gpt_neox-gqa": family("gpt_neox", {"gqa": {"groups": 2, "pool": "mean"}}),
    "phi3-gqa": family("phi3", {"gqa": {"groups": 2, "pool": "mean"}}),
    "bert-linformer": family("bert", {"linformer": {"rank": 8, "projections": "data"}}, computed=True),
    "bert-nystrom": family("bert", {"nystrom": {"landmarks": 4, "conv": 3}}),
}


@pytest.mark.usefixtures("one_window_a_batch")
@pytest.mark.parametrize("name", CASES)
def test_conversion_is_as_recorded(name, tmp_path):
    case, golden = CASES[name], json.loads(RECORD.read_text())
    assert name in golden["conversions"], f"{name} is not recorded: python -m tests.test_golden"
    exact = not case.computed or golden["machine"] == machine()
    wrong = differences(golden["conversions"][name], measured(case, tmp_path), 0 if exact else case.tolerance)
    assert not wrong, f"{name} differs from tests/golden.json:\n" + "\n".join(wrong)


def test_nothing_else_is_recorded():
    assert set(json.loads(RECORD.read_text())["conversions"]) == set(CASES), "record them anew: python -m tests.test_golden"


@pytest.mark.parametrize("tolerance", [0, 1e-4])
def test_any_change_is_named(tolerance):
    case = Case((), computed=True)
    before = {name: summary(name, torch.arange(6.0).view(2, 3) + 1, case) for name in ("q", "k", "v")}
    after = {**before, "o": before["v"], "k": summary("k", torch.arange(6.0).view(2, 3) + 1.01, case)}
    del after["v"]
    assert [line.split(":")[0] for line in differences(before, after, tolerance)] == ["  k", "  o", "  v"]


def test_statistics_allow_what_rounding_does():
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before, after = ({"q": summary("q", tensor, Case((), computed=True))} for tensor in (values, values * (1 + 1e-6)))
    assert differences(before, after, 0)
    assert not differences(before, after, 1e-4)


@pytest.mark.parametrize("free", [True, False])
def test_signs_are_free_where_machines_choose_them(free):
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    before, after = ({"q": summary("q", tensor, Case((), computed=True, free=free))} for tensor in (values, values * signs))
    assert bool(differences(before, after, 1e-4)) is not free


def measured(case: Case, folder: Path) -> dict[str, list[Any]]:
    """Convert in `folder`, and return the summary of each tensor that is not the source's."""
    source, text = prepare(case, folder)
    options = {"calibrate": str(text), "calibration_tokens": 1024, "calibration_window": 64, "verify": False, **case.options}
    with one_thread():
        output = effconvert.convert(source, *case.steps, output=folder / "output", **options).output
    before, after = tensors(source), tensors(output)
    same = sorted(name for name in after if name in before and digest(after[name]) == digest(before[name]))
    changed = {OWN.sub(".*.", name): after[name] for name in set(after) - set(same)}
    listed = "\n".join(f"{name} {digest(after[name])}" for name in same)
    kept = [hashlib.sha256(listed.encode()).hexdigest()[:12], len(same)]
    return {UNCHANGED: kept, **{name: summary(name, tensor, case) for name, tensor in sorted(changed.items())}}


def prepare(case: Case, folder: Path) -> tuple[Path, Path]:
    """Return the model to convert and a text for it."""
    if case.kind not in (EMBEDDED, PRECISE):
        source = save(plain(tiny(case.kind, **case.changes)), folder / "source")
        return source, characters(source)
    text = folder / "text.txt"
    text.write_text(words())
    if case.kind == EMBEDDED:
        return MODEL, text
    source = Path(shutil.copytree(MODEL, folder / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file({name: tensor.float() for name, tensor in tensors(MODEL).items()}, source / "model.safetensors", {"format": "pt"})
    return source, text


def summary(name: str, tensor: torch.Tensor, case: Case) -> list[Any]:
    """Return a tensor's hash and, where it is computed, its norm and two sums of its entries, plain and with signs drawn by `name`.

    Where signs are free it is the sum of singular values and the largest of them.
    """
    if not case.computed:
        return [digest(tensor)]
    values = tensor.double()
    if case.free:
        singular = torch.linalg.svdvals(values)
        sums = [singular.sum(), singular[0]]
    else:
        drawn = numpy.frombuffer(random.Random(name).randbytes(values.numel()), numpy.uint8) % 2 * 2.0 - 1
        sums = [values.sum(), values.flatten() @ torch.from_numpy(drawn)]
    return [digest(tensor), *(float(f"{float(value):.7g}") for value in (values.norm(), *sums))]


def differences(recorded: dict[str, list[Any]], now: dict[str, list[Any]], tolerance: float) -> list[str]:
    """Say of each tensor how it is not as recorded: by its hash or, with a tolerance, by its statistics."""
    lines = []
    for name in sorted({*recorded, *now}):
        before, after = recorded.get(name), now.get(name)
        if before is None:
            lines.append(f"  {name}: now {after}, and recorded as unchanged or absent")
        elif after is None:
            lines.append(f"  {name}: recorded as {before}, and now unchanged or absent")
        elif not (close(before[1:], after[1:], tolerance) if tolerance and name != UNCHANGED else before[0] == after[0]):
            lines.append(f"  {name}: recorded as {before}, now {after}")
    return lines


def close(recorded: list[float], now: list[float], tolerance: float) -> bool:
    """Tell whether statistics are the same but for rounding; the first is the norm, and a sum may be small beside it."""
    return all(abs(one - other) <= tolerance * max(recorded[0], abs(one)) for one, other in zip(recorded, now, strict=True))


def digest(tensor: torch.Tensor) -> str:
    """Hash a tensor's type, shape and bytes."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content).hexdigest()[:12]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model, however many files they are in."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def plain(model: Any) -> Any:
    """Give a model weights that are the same on every machine, and whose sums are exact: multiples of 1/256."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = numpy.frombuffer(random.Random(name).randbytes(parameter.numel()), numpy.uint8).copy()
            values = (torch.from_numpy(drawn).view(parameter.shape).float() - 128) / 256
            parameter.copy_(values + 1 if parameter.ndim == 1 and name.endswith("weight") else values)  # norms are about 1
    return model


def words(count: int = 4000) -> str:
    """Make a text for the embedded model, of many different tokens: what few of them give is not enough to solve for."""
    draw = random.Random(0)
    return " ".join("".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(count))


def machine() -> str:
    """Name what decides how floats are rounded."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.is_file() else []
    values = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    cpu = [values[key] for key in ("model name", "cpu family", "model") if key in values] or [platform.machine(), platform.processor()]
    return " ".join(["torch", torch.__version__, torch.backends.cpu.get_cpu_capability(), *cpu])


@contextmanager
def one_thread():
    """Add in one order, whatever the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def record() -> None:
    """Write golden.json anew."""
    conversions = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            conversions[name] = measured(case, Path(folder))
    tables = []
    for name, rows in conversions.items():
        lines = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()]
        tables.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "}")
    RECORD.write_text(f'{{"machine": {json.dumps(machine())},\n"conversions": {{\n' + ",\n".join(tables) + "}}\n")


if __name__ == "__main__":
    record()
