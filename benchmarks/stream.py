"""What streaming costs: `effconvert gqa` beside a plain copy of the same folder and beside the obvious script.

Generates a Llama-shaped bf16 checkpoint of random weights in DIR, then runs each contender as a process of its own, in alternating order, with
a warm and with a cold page cache (of the model; Python and torch stay warm). Wall time is that of the whole process, peak memory is what the
kernel reports of it (ru_maxrss). Linux only.

    python benchmarks/stream.py --work DIR              # 4 GB; needs 16 GB of disk, 10 GB of memory and some minutes
"""

import csv
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

import effconvert

# This process imports no torch: the ru_maxrss of a child begins at what its parent held.
HIDDEN, HEADS, WIDTH, INTERMEDIATE, VOCABULARY, SHARDS = 2048, 32, 64, 5632, 32000, 4
GROUPS = 8
COPYTREE = "import shutil, sys; shutil.copytree(*sys.argv[1:])"
OBVIOUS = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for layer in model.model.layers:
    for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        pooled = linear.weight.data.view({GROUPS}, -1, {WIDTH}, {HIDDEN}).mean(1).flatten(0, 1)
        linear.weight = torch.nn.Parameter(pooled)
model.config.num_key_value_heads = {GROUPS}
model.save_pretrained(sys.argv[2])
"""
COPIES = CP, TREE, DURABLE = "cp -r", "shutil.copytree", "cp -r, synced"
TORCH, OURS, SCRIPT, VERIFIED = "import torch", "effconvert", "obvious script", "effconvert, verified"


def command(what: str, source: Path, output: Path) -> list[str]:
    python = [sys.executable, "-c"]
    ours = [sys.executable, "-m", "effconvert", "gqa", "--groups", str(GROUPS), "--pool", "mean", str(source), "-o", str(output)]
    return {
        CP: ["cp", "-r", str(source), str(output)],
        TREE: [*python, COPYTREE, str(source), str(output)],
        DURABLE: ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(output)],  # what effconvert does: fsync of each file
        TORCH: [*python, "import torch"],
        OURS: [*ours, "--no-verify"],
        SCRIPT: [*python, OBVIOUS, str(source), str(output)],
        VERIFIED: ours,
    }[what]


def generate(folder: Path, layers: int) -> None:
    """Write a checkpoint, a shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    wide, inner = HEADS * WIDTH, INTERMEDIATE
    shapes = {f"self_attn.{name}_proj.weight": (wide, HIDDEN) for name in "qkv"} | {"self_attn.o_proj.weight": (HIDDEN, wide)}
    shapes |= {"mlp.gate_proj.weight": (inner, HIDDEN), "mlp.up_proj.weight": (inner, HIDDEN), "mlp.down_proj.weight": (HIDDEN, inner)}
    shapes |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    names: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    names[0]["model.embed_tokens.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(layers):
        names[layer * SHARDS // layers] |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    names[-1] |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    folder.mkdir(parents=True)
    weight_map, size = {}, 0
    random = torch.Generator().manual_seed(0)
    for number, inside in enumerate(names, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        shard = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=random) for name, shape in inside.items()}
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(inside, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCABULARY, "hidden_size": HIDDEN}
    config |= {"intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH}
    config |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": 2}, indent=2))


def compare(source: Path, ours: Path, script: Path) -> tuple[int, int, int, int]:
    """Count tensors: all, equal in both outputs, pooled, and pooled that are the float32 mean rounded once."""
    import torch
    from safetensors import safe_open

    def reader(folder: Path) -> Callable[[str], Any]:
        files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        names.append(set(where))
        return lambda name: where[name].get_tensor(name)

    names: list[set[str]] = []
    original, left, right = reader(source), reader(ours), reader(script)
    assert names[0] == names[1] == names[2], "the outputs do not hold the same names"
    equal = exact = 0
    pooled = [name for name in names[0] if name.endswith(("k_proj.weight", "v_proj.weight"))]
    for name in names[0]:
        equal += torch.equal(left(name), right(name))
    for name in pooled:
        mean = original(name).float().view(GROUPS, HEADS // GROUPS, WIDTH, HIDDEN).mean(1).flatten(0, 1)
        exact += torch.equal(left(name), mean.bfloat16())
    return len(names[0]), equal, len(pooled), exact


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """Call in a process of its own, so that this one stays small."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def measure(what: str, source: Path, output: Path, cold: bool) -> tuple[float, float, int]:
    """Run one contender: seconds of wall, seconds of CPU, bytes of peak resident memory."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # nobody pays for the pages that another left dirty
    for file in source.iterdir():
        with file.open("rb", buffering=0) as opened:
            if cold:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass
    log = source.parent / "log"
    with log.open("w") as opened:
        started = time.perf_counter()
        process = subprocess.Popen(command(what, source, output), stdout=opened, stderr=opened, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{what} failed:\n{log.read_text()}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def machine(work: Path) -> dict[str, object]:
    mounts = [part for part in psutil.disk_partitions(all=True) if work.resolve().is_relative_to(part.mountpoint)]
    info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in (info.read_text().splitlines() if info.exists() else []) if line.startswith("model name")]
    about = {"date": date.today().isoformat(), "effconvert": effconvert.__version__, "python": platform.python_version()}
    about |= {name: version(name) for name in ("torch", "transformers", "safetensors")}
    about |= {"system": f"{platform.system()} {platform.release()}", "cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    about |= {"memory_gb": round(psutil.virtual_memory().total / 1e9), "filesystem": max(mounts, key=lambda part: len(part.mountpoint)).fstype}
    return about | {"load": round(os.getloadavg()[0], 2)}


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where to make a folder, on the disk to measure.")
@click.option("--layers", type=click.IntRange(SHARDS), default=36, show_default=True)
@click.option("--second-layers", type=click.IntRange(SHARDS), default=9, show_default=True, help="A size to compare memory with.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--rounds-slow", default=2, show_default=True, help="Rounds that the obvious script takes part in.")
def main(work: Path, layers: int, second_layers: int, rounds: int, rounds_slow: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the models are removed
    about, console = machine(work), Console(width=150)
    file = Path(__file__).parent / "results" / f"stream-{about['date']}.csv"
    file.parent.mkdir(exist_ok=True)
    opened = file.open("w", newline="", buffering=1)  # each run is on disk when it ends: an interruption loses none
    rows = csv.DictWriter(opened, [*about, "layers", "cache", "what", "round", "wall_s", "cpu_s", "peak_bytes"], lineterminator="\n")
    rows.writeheader()
    work = work / "stream-benchmark"
    work.mkdir(parents=True)  # not over what is there
    source, second = work / "source", work / "second"
    runs: dict[tuple[int, str, str], list[tuple[float, float, int]]] = {}

    def run(source: Path, count: int, what: str, cache: str, turn: int) -> None:
        output = work / f"out, {what}, {count}"
        result = measure(what, source, output, cache == "cold")
        runs.setdefault((count, cache, what), []).append(result)
        wall, cpu, peak = result
        found = {"layers": count, "cache": cache, "what": what, "round": turn, "wall_s": f"{wall:.3f}", "cpu_s": f"{cpu:.3f}", "peak_bytes": peak}
        rows.writerow({**about, **found})
        click.echo(f"{count} layers, {cache}, round {turn}, {what}: {wall:.2f} s, {cpu:.2f} s of CPU, {peak / 1e6:.0f} MB", err=True)
        if what not in (OURS, SCRIPT) or count != layers:
            shutil.rmtree(output, ignore_errors=True)

    try:
        for folder, count in ((source, layers), (second, second_layers)):
            apart(generate, folder, count)
        size = sum(file.stat().st_size for file in source.iterdir())
        order = [*COPIES, TORCH, OURS, SCRIPT]
        for turn in range(rounds):
            for cache in ("warm", "cold"):
                for what in order:
                    if what != SCRIPT or turn < rounds_slow:
                        run(source, layers, what, cache, turn)
            order.reverse()
        for turn in range(rounds):
            run(second, second_layers, OURS, "warm", turn)
        total, equal, pooled, exact = apart(compare, source, *(work / f"out, {what}, {layers}" for what in (OURS, SCRIPT)))
        run(source, layers, VERIFIED, "warm", 0)
    finally:
        opened.close()
        shutil.rmtree(work)

    table = Table(title=f"{size / 1e9:.2f} GB in {layers} layers; " + ", ".join(f"{key} {value}" for key, value in about.items()))
    for heading in ("cache", "what", "runs", "wall, s", "min - max", "to cp -r", "CPU, s", "peak, MB", "min - max"):
        table.add_column(heading, justify="left" if heading in ("cache", "what") else "right")
    middle = {key: [statistics.median(column) for column in zip(*results, strict=True)] for key, results in runs.items()}
    for (count, cache, what), results in sorted(runs.items(), key=lambda item: (-item[0][0], item[0][1] == "cold")):  # as run, warm before cold
        wall, cpu, peak = middle[count, cache, what]
        walls, peaks = [result[0] for result in results], [result[2] / 1e6 for result in results]
        cells = [cache, what if count == layers else f"{what}, {count} layers", str(len(results)), f"{wall:.2f}", f"{min(walls):.2f} - {max(walls):.2f}"]
        cells += [f"{wall / middle[layers, cache, CP][0]:.2f}" if count == layers else "", f"{cpu:.2f}", f"{peak / 1e6:.0f}"]
        table.add_row(*cells, f"{min(peaks):.0f} - {max(peaks):.0f}")
    console.print(table)
    for cache in ("warm", "cold"):
        at = {what: middle[layers, cache, what] for what in order}
        wall, _, peak = at[OURS]
        targets = [(f"wall <= 1.2 x {copy} + import torch", wall, 1.2 * at[copy][0] + at[TORCH][0], "s") for copy in COPIES]
        targets += [("peak <= 0.5 GB", peak / 1e9, 0.5, "GB"), ("5 x wall <= obvious script", 5 * wall, at[SCRIPT][0], "s")]
        targets += [("8 x peak <= obvious script", 8 * peak / 1e9, at[SCRIPT][2] / 1e9, "GB")]
        for target, found, bound, unit in targets:
            console.print(f"{'holds' if found <= bound else 'FAILS'}  {cache}  {target}: {found:.2f} and {bound:.2f} {unit}")
        console.print(f"       {cache}  obvious script / effconvert: wall {at[SCRIPT][0] / wall:.2f} x, peak {at[SCRIPT][2] / peak:.2f} x")
    peaks = [middle[count, "warm", OURS][2] / 1e6 for count in (second_layers, layers)]
    console.print(f"peak of effconvert: {peaks[0]:.0f} MB with {second_layers} layers, {peaks[1]:.0f} MB with {layers}")
    console.print(f"{equal} of {total} tensors equal those of the obvious script; {exact} of {pooled} pooled ones are the float32 mean, rounded once")
    console.print(f"every run is in {file.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
