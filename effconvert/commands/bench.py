"""Measure how fast models are, the original first."""

from typing import TYPE_CHECKING, Any

import click

from effconvert.commands._click import OptionsCommand, given_options
from effconvert.eval.speed.bench_options import BenchOptions

if TYPE_CHECKING:
    from effconvert.eval.results import Benchmark, Cell, Timing

HEADINGS = (  # two lines each; the second is the column of model names, cut to fit
    ("", "context"),
    ("", "model"),
    ("prefill", "tokens/s"),
    ("first", "token, ms"),
    ("decode", "tokens/s"),
    ("a step, ms", "(low-high)"),
    ("memory", "alone, ms"),
    ("of it", "weights"),
    ("KV", "cache"),
    ("peak", "memory"),
)
GAP = "  "
SHORTEST = 8  # fewest characters of a name, on the narrowest terminal


def run(models: tuple[str, ...], **values: Any) -> None:
    """Measure how fast models are, the original first.

    Prefill, time to first token, decoding, KV cache and peak memory, over batch sizes and contexts. Models take turns in each round and are compared
    with the first. Beside a step's time is the time to only read weights and cache from memory.
    MODEL is a folder, a .gguf file or a Hub id, with or without a revision: org/name@v1. Its family may be any that transformers opens.

    \b
    Examples:
      effconvert bench ./SmolLM2-135M ./smol-mqa
      effconvert bench ./SmolLM2-135M ./smol-mqa --batch 1,16 --context 512,4096 -o bench.json
      effconvert bench ./smol-mqa --device cuda --cache static --graphs --kernels reference,triton
    """
    options = BenchOptions(**given_options(values))

    from effconvert.commands._bench_terminal import BenchTerminal
    from effconvert.errors import EffconvertError
    from effconvert.eval.results import check_output, save
    from effconvert.eval.speed.bench import bench

    check_output(options.output, models)
    terminal = BenchTerminal(models[0])
    benchmark = bench(models, options, terminal)
    if options.output:
        save(benchmark, options.output)
    show(benchmark)
    if options.output:
        terminal.out.print(f"written to {options.output}", soft_wrap=True, markup=False)
    if all(cell.failure for cell in benchmark.cells):
        raise EffconvertError(f"nothing could be measured: {benchmark.cells[0].failure}")


command = OptionsCommand("bench", [click.Argument(["models"], type=click.Path(), nargs=-1, required=True, metavar="MODEL...")], lambda: (BenchOptions,), run)


def show(benchmark: "Benchmark") -> None:
    """Print the results."""
    from rich.markup import escape

    from effconvert.console import stdout
    from effconvert.quantities import size

    out, settings = stdout(), benchmark.settings
    names = [f"{index} {subject.name}" for index, subject in enumerate(benchmark.subjects, 1)]
    rows = [_row(cell, names[cell.subject]) for cell in benchmark.cells]
    ratios = [_ratios(cell) if cell.subject else [] for cell in benchmark.cells]
    heads = [list(line) for line in zip(*HEADINGS, strict=True)]
    widths = [max(map(len, column)) for column in zip(*heads, *rows, *filter(None, ratios), strict=True)]
    widths[1] = max(SHORTEST, min(widths[1], out.width - sum(widths) + widths[1] - len(GAP) * (len(widths) - 1)))

    def line(cells: list[str], failure: str = "") -> str:
        name = cells[1] if len(cells[1]) <= widths[1] else cells[1][: widths[1] - 1] + "…"
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return escape(GAP.join([padded[0], name.ljust(widths[1]), *([failure] if failure else padded[2:])]).rstrip())

    for head in heads:
        out.print(f"[bold]{line(head)}[/]", soft_wrap=True)
    batch = None
    for cell, row, ratio_row in zip(benchmark.cells, rows, ratios, strict=True):
        if cell.batch != batch:
            batch = cell.batch
            out.print(f"[bold]batch {batch}[/]")
        out.print(line(row, cell.failure), soft_wrap=True)
        if any(ratio_row):
            out.print(f"[dim]{line(ratio_row)}[/]", soft_wrap=True)
    dtypes = " and ".join(dict.fromkeys(subject.dtype for subject in benchmark.subjects)) if settings["dtype"] == "auto" else settings["dtype"]
    kernels = f", kernels: {', '.join(settings['kernels'])}" if settings["kernels"] != ["auto"] else ""
    cache = f"{settings['cache']} cache" + (", CUDA graphs" if settings["graphs"] else "") + kernels
    out.print(f"\nmedians of {settings['rounds']} rounds, each of {settings['new_tokens']} steps; {dtypes}, {cache}; x: to model 1", soft_wrap=True)
    out.print(
        f"memory alone: a step that only reads weights and cache, at the {size(benchmark.bandwidth)}/s measured here. "
        "A step far above it waits for something else: arithmetic, copies of the cache, Python. Of it weights: the share of these bytes that are weights. "
        "Peak: weights, and the memory of a pass beside them.",
        soft_wrap=True,
    )
    for note in benchmark.notes:
        out.print(f"note: {escape(note)}", soft_wrap=True)
    out.print(f"on {escape(benchmark.machine)}; torch {benchmark.versions['torch']}, transformers {benchmark.versions['transformers']}", soft_wrap=True)


def _row(cell: "Cell", name: str) -> list[str]:
    from effconvert.quantities import size

    return [
        str(cell.context),
        name,
        _digits(cell.prefill_rate),
        _milliseconds(cell.first),
        _digits(cell.decode_rate),
        f"{_milliseconds(cell.decode)} ({_digits(cell.decode.low * 1e3)}-{_digits(cell.decode.high * 1e3)})" if cell.decode else "",
        _digits(cell.predicted and cell.predicted * 1e3),
        f"{cell.weight_bytes / (cell.weight_bytes + cell.cache_bytes):.0%}" if cell.weight_bytes and cell.cache_bytes else "",
        size(cell.cache_bytes) if cell.cache_bytes else "",
        size(cell.peak_bytes) if cell.peak_bytes else "",
    ]


def _ratios(cell: "Cell") -> list[str]:
    """Return the row of ratios below a row of numbers: of tokens a second, seconds and bytes."""
    times = {name: f"{_digits(ratio)} x" for name, ratio in cell.ratios.items()}
    rates = {name: f"{_digits(1 / ratio)} x" for name, ratio in cell.ratios.items()}
    first, step, cache, peak = (times.get(name, "") for name in ("first", "decode", "cache", "peak"))
    return ["", "", rates.get("prefill", ""), first, rates.get("decode", ""), step, "", "", cache, peak]


def _milliseconds(timing: "Timing | None") -> str:
    return _digits(timing.median * 1e3) if timing else ""


def _digits(number: float | None) -> str:
    """Write three digits, or all digits before the point."""
    if number is None:
        return ""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"
