"""What `effconvert bench` adds to the seconds that it reports: its own passes beside a bare loop, in one process, in alternating order.

The loop is what somebody would write with transformers and time.perf_counter: prefill, argmax, steps. It runs the same model on the same tokens, and
rounds take them in turns, so that the median of the ratios in each round is what `bench` adds: without its progress bar, and with it on a terminal.
Every round goes to a file in results/.

    python benchmarks/bench_overhead.py MODEL [MODEL ...] --rounds 25
"""

import csv
import os
import statistics
import time
from datetime import date
from io import StringIO
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from effconvert.commands._bench_terminal import BenchTerminal
from effconvert.eval.results import machine, versions
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.eval.speed.passes import SEED, Job, Loaded, Runner
from effconvert.eval.subject import load_model, open_model, pick_device
from effconvert.modeling.transformers_internals import cache_among, cache_name

KINDS = BARE, OURS, SHOWN = "bare loop", "bench", "bench with its bar on a terminal"


@torch.inference_mode()
def bare(model, prompts, steps, wait):
    """Return the seconds of prefill and of a step."""
    wait()
    start = time.perf_counter()
    output = model(prompts, use_cache=True, logits_to_keep=1)
    wait()
    prefill = time.perf_counter() - start
    cache, tokens = cache_among(output.values()), output.logits[:, -1:].argmax(-1)
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        tokens = model(tokens, use_cache=True, **{cache_name(model): cache}).logits[:, -1:].argmax(-1)
    wait()
    return prefill, (time.perf_counter() - start) / steps


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--rounds", default=25, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--context", default=128, show_default=True)
@click.option("--new-tokens", default=16, show_default=True)
def main(models: tuple[str, ...], rounds: int, batch: int, context: int, new_tokens: int) -> None:
    device = pick_device(None)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    options = BenchOptions(batch=(batch,), context=(context,), new_tokens=new_tokens)
    about = {"date": date.today().isoformat(), **versions(), "machine": machine(device)}
    file = Path(__file__).parent / "results" / f"bench_overhead-{about['date']}.csv"
    columns = [*about, "load", "model", "dtype", "batch", "context", "new_tokens", "what", "round", "prefill_s", "step_s"]
    table = Table("model", "what", "prefill, ms", "a step, ms", "(low-high)", "prefill, ratio", "step, ratio", title=f"medians of {rounds} rounds")
    terminal = BenchTerminal("")
    terminal.err = Console(file=StringIO(), force_terminal=True)
    passes = len(models) * (rounds + 2)
    with file.open("w", newline="") as opened_file, terminal.bar("measuring", passes, "steps") as advance:
        rows = csv.DictWriter(opened_file, columns, lineterminator="\n")
        rows.writeheader()
        for name in models:
            opened = open_model(name)
            model = load_model(opened, "auto", device)
            prompts = torch.randint(opened.subject.vocabulary, (batch, context), generator=torch.Generator().manual_seed(SEED)).to(device)
            runner = Runner(Loaded(0, opened, model), Job(batch, context, opened.subject.vocabulary, options, device))
            seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
            for number in range(-2, rounds):
                for kind in KINDS if number % 2 else reversed(KINDS):
                    if kind == BARE:
                        measured = bare(model, prompts, new_tokens, wait)
                    else:
                        if kind == SHOWN:
                            advance(1)
                        found = runner.run()
                        measured = found.prefill, found.decode or 0.0
                    if number >= 0:
                        seconds[kind].append(measured)
                        known = {"load": f"{os.getloadavg()[0]:.2f}", "model": opened.subject.name, "dtype": opened.subject.dtype, "batch": batch}
                        known |= {"context": context, "new_tokens": new_tokens, "what": kind, "round": number}
                        rows.writerow({**about, **known, "prefill_s": f"{measured[0]:.6f}", "step_s": f"{measured[1]:.6f}"})
            for kind in KINDS:
                prefill, step = ([pair[which] for pair in seconds[kind]] for which in (0, 1))
                ratios = [statistics.median(ours[which] / theirs[which] for ours, theirs in zip(seconds[kind], seconds[BARE], strict=True)) for which in (0, 1)]
                table.add_row(
                    opened.subject.name,
                    kind,
                    f"{statistics.median(prefill) * 1e3:.3f}",
                    f"{statistics.median(step) * 1e3:.3f}",
                    f"{min(step) * 1e3:.3f}-{max(step) * 1e3:.3f}",
                    *(f"{ratio:.4f}" for ratio in ratios),
                )
            del model, runner
    Console(width=130).print(table)
    click.echo(f"every round is in benchmarks/results/{file.name}")


if __name__ == "__main__":
    main()
