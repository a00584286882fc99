"""What upcycling costs: `effconvert moe` beside a plain copy of what it writes, beside the engine at rest, and beside mergekit-moe.

Takes a real small llama for exactness and for mergekit, and generates a large one of random weights (benchmarks/stream.py) for time and memory. Wall
time is that of the whole process, peak memory what the kernel reports of it (ru_maxrss). Linux only.

    python benchmarks/moe.py --small SmolLM2-135M-Instruct --work DIR --mergekit BIN/mergekit-moe        # 50 GB of disk and some minutes
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from stream import apart, generate, machine

# This process imports no torch: the ru_maxrss of a child begins at what its parent held.
ROUTED = "block_sparse_moe.gate.weight", "mlp.gate.weight"  # what the router is called, here and by mergekit
LOGITS = """
import sys
sys.modules["effconvert"] = None  # nothing of it can be imported
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
text = AutoTokenizer.from_pretrained(sys.argv[1])(open(sys.argv[3]).read(), return_tensors="pt").input_ids[:, :512]
with torch.inference_mode():
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in sys.argv[1:3]]
    before, after = (model(text).logits for model in models)
same = (after.argmax(-1) == before.argmax(-1)).float().mean()
change, largest = (after - before).abs().max(), before.abs().max()
print(f"{type(models[1]).__name__}, {text.shape[1]} tokens: largest change of a logit {change:.2e} of {largest:.1f}, same top token {same:.1%}")
"""


def run(what: str, command: Sequence[str | Path], log: Path) -> tuple[float, float, int]:
    """Run one contender: seconds of wall, seconds of CPU, bytes of peak resident memory."""
    os.sync()  # nobody pays for the pages that another left dirty
    with log.open("w") as opened:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=opened, stderr=opened, env={**os.environ, "HF_HUB_OFFLINE": "1"})
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


def size(folder: Path) -> int:
    """Return the bytes of weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def ours(source: Path, output: Path, technique: str, *options: str) -> list[str | Path]:
    return [sys.executable, "-m", "effconvert", technique, *options, source, "-o", output, "--no-verify", "--overwrite"]


def compare(source: Path, mine: Path, theirs: Path) -> str:
    """Hold our tensors to mergekit's, whose experts are fused under the names that transformers has in memory."""
    import torch
    from safetensors.torch import load_file

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

    before, one, other = read(source), read(mine), read(theirs)
    equal = sum(torch.equal(one[name], other[name]) and torch.equal(one[name], before[name]) for name in one.keys() & other.keys())
    layers, fused = 1 + max(int(name.split(".")[2]) for name in one if ".layers." in name), 0
    for layer in range(layers):
        at = f"model.layers.{layer}."
        count = sum(name.startswith(f"{at}block_sparse_moe.experts.") for name in one) // 3
        w1, w2, w3 = (torch.stack([one[f"{at}block_sparse_moe.experts.{number}.w{kind}.weight"] for number in range(count)]) for kind in (1, 2, 3))
        fused += torch.equal(torch.cat([w1, w3], 1), other[f"{at}mlp.experts.gate_up_proj"]) and torch.equal(w2, other[f"{at}mlp.experts.down_proj"])
    rest = {name for name in one if "block_sparse_moe" not in name} ^ {name for name in other if ".mlp." not in name}
    spread = [
        torch.stack([made[f"model.layers.{layer}.{name}"] for layer in range(layers)]).float().std() for made, name in zip((one, other), ROUTED, strict=True)
    ]
    told = f"{equal} tensors outside the FFNs are the same bytes, names that only one has: {sorted(rest)}; experts are the same in {fused} of {layers} layers; "
    return told + f"routers are normal numbers of spread {spread[0]:.3f} here and {spread[1]:.3f} there"


@click.command(help=__doc__)
@click.option("--small", type=click.Path(path_type=Path, file_okay=False, exists=True), required=True, help="A llama with its tokenizer.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where to make a folder, on the disk to measure.")
@click.option("--mergekit", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="The program mergekit-moe, in an environment of its own.")
@click.option("--layers", type=click.IntRange(4), default=36, show_default=True, help="Of the large model: 36 make 4 GB.")
@click.option("--experts", default=8, show_default=True, help="Of the large model.")
@click.option("--rounds", default=3, show_default=True)
def main(small: Path, work: Path, mergekit: Path | None, layers: int, experts: int, rounds: int) -> None:
    about, small, work = machine(work), small.resolve(), work.resolve()
    file = Path(__file__).parent / "results" / f"moe-{about['date']}.csv"
    work = work / "moe-benchmark"
    work.mkdir(parents=True)  # not over what is there
    log, out, copied, theirs, source = work / "log", work / "out", work / "copied", work / "theirs", work / "source"
    with file.open("w", newline="", buffering=1) as opened:
        rows = csv.DictWriter(opened, [*about, "model", "what", "experts", "round", "wall_s", "cpu_s", "peak_bytes", "written_bytes"], lineterminator="\n")
        rows.writeheader()

        def measure(model: str, what: str, count: int, turn: int, command: Sequence[str | Path], made: Path) -> None:
            shutil.rmtree(made, ignore_errors=True)
            wall, cpu, peak = run(what, command, log)
            found = {"model": model, "what": what, "experts": count, "round": turn, "wall_s": f"{wall:.2f}", "cpu_s": f"{cpu:.2f}", "peak_bytes": peak}
            rows.writerow({**about, **found, "load": round(os.getloadavg()[0], 2), "written_bytes": size(made)})
            click.echo(
                f"{model}, {what}, {count} experts, round {turn}: {wall:.2f} s, {cpu:.2f} s of CPU, {peak / 1e6:.0f} MB, {size(made) / 1e9:.2f} GB written"
            )

        try:
            for count in (4, 8):
                for turn in range(rounds):
                    measure("small", "effconvert moe", count, turn, ours(small, out, "moe", "--experts", str(count), "--top-k", "2"), out)
                    if mergekit:
                        recipe = {"base_model": str(small), "gate_mode": "random", "experts": [{"source_model": str(small)}] * count}
                        (work / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
                        measure("small", "mergekit-moe", count, turn, [mergekit, "--quiet", "--random-seed", "1", work / "recipe.yaml", theirs], theirs)
                if mergekit:
                    click.echo(f"small, {count} experts: {apart(compare, small, out, theirs)}")
                told = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", LOGITS, small, out, Path(__file__)], capture_output=True, text=True, check=True, cwd=work
                )
                click.echo(f"small, {count} experts, in a process without effconvert: {told.stdout.strip()}")
            shutil.rmtree(theirs, ignore_errors=True)
            apart(generate, source, layers)
            for turn in range(rounds):
                measure("large", "engine at rest (gqa that changes nothing)", 0, turn, ours(source, copied, "gqa", "--groups", "32", "--pool", "mean"), copied)
                shutil.rmtree(copied)
                measure("large", "effconvert moe", experts, turn, ours(source, out, "moe", "--experts", str(experts)), out)
                measure("large", "cp -r of that, synced", experts, turn, ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', out, copied], copied)
                shutil.rmtree(copied)
            for options in (["--noise", "0.01"], ["--drop-upcycling", "0.5"], ["--granularity", "4"]):
                what = f"effconvert moe {' '.join(options)}"
                measure("large", what, experts, 0, ours(source, out, "moe", "--experts", str(experts), *options), out)
        finally:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
