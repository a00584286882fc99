"""Measure the speed of models: prefill, first token, decoding and memory, over batch sizes and contexts.

All models run in one process on the same tokens and take turns. A disturbance of the machine then affects all alike, so ratios are more reliable than
seconds.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from effconvert.errors import EffconvertError, OptionError
from effconvert.eval import results
from effconvert.eval.results import Benchmark, Cell, Timing
from effconvert.eval.speed import memory
from effconvert.eval.speed.bench_options import CONTEXTS, BenchOptions
from effconvert.eval.speed.passes import SEED, Job, Loaded, Runner, Seconds, bandwidth, writes
from effconvert.eval.subject import Opened, check_kernels, load_measured, open_model, pick_device, pick_dtype
from effconvert.modeling.precision import slow
from effconvert.progress import Advance, NoProgress, Progress
from effconvert.quiet import quiet_transformers

Result = TypeVar("Result")
WEIGHTS_SHARE = 0.8  # most of the free memory that weights may take for all models to be loaded together


def bench(models: Sequence[str], options: BenchOptions, progress: Progress | None = None) -> Benchmark:
    """Measure how fast each of `models` is.

    Args:
        models: folders, Hub ids or .gguf files; the others are compared with the first.
        options: what to run, and how often.
        progress: shows the progress; by default nothing is shown.

    Raises:
        OptionError: the options are impossible for these models.
        ModelError: a model is damaged, or transformers does not open it.
        EffconvertError: a model does not fit into memory.
    """
    progress = progress or NoProgress()
    if not models:
        raise OptionError("there is no model to measure; give at least one")
    device = device_of(options)
    kinds = list(dict.fromkeys(options.kernels))
    opened = [each for model in models for each in _by_kernels(open_model(model, step=progress.step), kinds)]
    by = kinds * len(models)
    batches, contexts = list(dict.fromkeys(options.batch)), contexts_of(opened, options)
    fit_together = _fit_together(opened, options, device)
    vocabulary = min(model.subject.vocabulary for model in opened)
    progress.step("measuring how fast memory is")
    memory_bandwidth = bandwidth(device)
    cells: list[Cell] = []
    passes = len(opened) * len(batches) * len(contexts) * (options.warmup + options.rounds + 1)
    with quiet_transformers(), progress.bar("measuring", passes, "steps") as advance:
        for group in [list(range(len(opened)))] if fit_together else [[index] for index in range(len(opened))]:
            loaded = [Loaded(index, opened[index], load_measured(opened[index], options.dtype, device, by[index])) for index in group]
            for batch in batches:
                for context in contexts:
                    runs = [CellRun(model, Job(batch, context, vocabulary, options, device)) for model in loaded]
                    cells += _run_cells(runs, options, memory_bandwidth, advance)
            del loaded
            memory.release(device)
    cells.sort(key=lambda cell: (batches.index(cell.batch), contexts.index(cell.context), cell.subject))
    first = {(cell.batch, cell.context): cell for cell in cells if cell.subject == 0}
    return Benchmark(
        subjects=tuple(model.subject for model in opened),
        cells=tuple(replace(cell, ratios=_ratios(cell, first[cell.batch, cell.context])) for cell in cells),
        bandwidth=memory_bandwidth,
        notes=(*_notes(opened, options, contexts, fit_together), *_without_cache(opened, cells)),
        settings={**options.model_dump(mode="json", exclude={"output"}), "context": contexts, "kernels": kinds, "device": device, "seed": SEED},
        versions=results.versions(),
        machine=results.machine(device),
        date=results.now(),
    )


def device_of(options: BenchOptions) -> str:
    """Return the device to measure on.

    Raises:
        OptionError: the device does not exist, or cannot replay graphs or run kernels.
    """
    device = pick_device(options.device)
    if options.graphs and not device.startswith("cuda"):
        raise OptionError(f"--graphs replays CUDA graphs, and the device is {device}; leave it out, or give --device cuda where there is one")
    for kernels in options.kernels:
        check_kernels(kernels, device)
    return device


def _by_kernels(opened: Opened, kinds: Sequence[str]) -> list[Opened]:
    """Return a model for each way to decode, with the way in its name where there are several."""
    if len(kinds) == 1:
        return [opened]
    return [replace(opened, subject=replace(opened.subject, name=f"{kernels}: {opened.subject.name}")) for kernels in kinds]


def contexts_of(opened: list[Opened], options: BenchOptions) -> list[int]:
    """Return the contexts to measure at: those of --context, or the default ones that every model reads.

    Raises:
        OptionError: a model does not read that many tokens.
    """
    limited = [model for model in opened if model.subject.longest]
    least = min(limited, key=lambda model: _context_limit(model, options), default=None)
    if least is None:
        return list(dict.fromkeys(options.context or CONTEXTS))
    limit = _context_limit(least, options)
    reads = f"{least.subject.name} reads {least.subject.longest} tokens" + (f", and --new-tokens {options.new_tokens} are among them" if writes(least) else "")
    if limit < 1:
        raise OptionError(f"{reads}; give fewer of those")
    if options.context and max(options.context) > limit:
        raise OptionError(f"--context {max(options.context)} is too long: {reads}; give at most {limit}")
    return list(dict.fromkeys(options.context or [context for context in CONTEXTS if context <= limit] or [limit]))


def _context_limit(opened: Opened, options: BenchOptions) -> int:
    return (opened.subject.longest or 0) - (options.new_tokens if writes(opened) else 0)


def _fit_together(opened: list[Opened], options: BenchOptions, device: str) -> bool:
    """Whether all models fit into the memory of `device` at once.

    Raises:
        EffconvertError: one of them does not fit even alone.
    """
    sizes, free = [model.subject.parameters * pick_dtype(options.dtype, model).itemsize for model in opened], memory.free(device)
    for model, size in zip(opened, sizes, strict=True):
        if size > free:
            raise EffconvertError(
                f"{model.subject.name} takes {size / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free on {device}; measure it on a larger machine"
            )
    return sum(sizes) <= WEIGHTS_SHARE * free


def _notes(opened: list[Opened], options: BenchOptions, contexts: list[int], fit_together: bool) -> list[str]:
    notes = []
    if not fit_together:
        each = "" if len(options.kernels) == 1 else ", each once for every value of --kernels"
        notes.append(f"the models do not fit into memory together{each}: rounds do not alternate, and small differences mean nothing")
    if options.context is None and contexts != list(CONTEXTS):
        missing = ", ".join(str(context) for context in CONTEXTS if context not in contexts)
        notes.append(f"no context of {missing}: not every model reads that many tokens and {options.new_tokens} new ones")
    for model in {model.subject.digest: model for model in opened}.values():  # once, by however many kernels
        notes += model.notes
        if not model.known:
            notes.append(f"effconvert does not know the layout of {model.subject.name} ({model.subject.kind}), so nothing foresees the memory of a pass")
        if not writes(model):
            why = "has no language-model head and writes no tokens" if model.decoder else "is an encoder and writes no tokens"
            why = "is an encoder-decoder, whose writing is not measured" if model.role == "encoder-decoder" else why
            notes.append(f"{model.subject.name} {why}: prefill only{', of a text as source and target' if model.role == 'encoder-decoder' else ''}")
    types = {pick_dtype(options.dtype, model): None for model in opened}
    notes += filter(None, (slow(device_of(options), dtype, "--dtype") for dtype in types))
    if len(types) > 1:
        notes.append("the models compute in different types; give --dtype to compare the architectures alone")
    if options.cache == "static":
        notes.append(f"a static cache is allocated for the context and {options.new_tokens} new tokens, and every step reads all of it: its bytes are those")
    return notes


def _without_cache(opened: list[Opened], cells: list[Cell]) -> list[str]:
    """Return a note on each model that gave a first token and no cache."""
    indices = dict.fromkeys(cell.subject for cell in cells if cell.first and not cell.decode)
    return [f"{opened[index].subject.name} hands on no cache of transformers: nothing after its first token is measured" for index in indices]


class CellRun:
    """The passes of one model in one cell, until one of them fails."""

    def __init__(self, loaded: Loaded, job: Job) -> None:
        self.loaded, self.job = loaded, job
        self.runner: Runner | None = None
        self.seconds: list[Seconds] = []
        self.failure = ""

    def run_once(self, record: bool) -> None:
        """Run once more, and record the time."""
        seconds = self._attempt(self._run)
        if record and seconds:
            self.seconds.append(seconds)

    def cell(self, memory_bandwidth: float) -> Cell:
        """Run once more to measure memory, and return the results."""
        self.runner = None
        memory.release(self.job.device)
        pass_bytes = self._attempt(lambda: memory.peak(self.job.device, self._run))
        cache = self.runner.cache_bytes if self.runner else None
        self.runner = None
        empty = Cell(self.loaded.index, self.job.batch, self.job.context, None, None, None, None, None, None, None, {}, self.failure)
        if self.failure:
            return empty
        weights = self.loaded.read(self.job.batch) if cache is not None else None
        return replace(
            empty,
            prefill=_timing(seconds.prefill for seconds in self.seconds),
            first=_timing(seconds.first for seconds in self.seconds),
            decode=_timing(seconds.decode for seconds in self.seconds),
            predicted=None if weights is None or cache is None else (weights + cache) / memory_bandwidth,
            weight_bytes=weights,
            cache_bytes=cache,
            peak_bytes=None if pass_bytes is None else self.loaded.own_bytes + pass_bytes,
        )

    def _run(self) -> Seconds:
        if self.runner is None:
            if self.job.device == "cpu" and self.loaded.opened.known:
                memory.check(self.loaded.opened.known, self.loaded.model, self.job.batch, self.job.context, self.job.options.new_tokens)
            self.runner = Runner(self.loaded, self.job)
        return self.runner.run()

    def _attempt(self, run: Callable[[], Result]) -> Result | None:
        if self.failure:
            return None
        try:
            return run()
        except Exception as error:  # a model's class may raise anything over a cache or a full device
            self.failure = memory.explain(error)
        self.runner = None
        memory.release(self.job.device)  # only after the handler: the error referred to tensors
        return None


def _run_cells(runs: list[CellRun], options: BenchOptions, memory_bandwidth: float, advance: Advance) -> list[Cell]:
    for number in range(-options.warmup, options.rounds):
        for run in runs if number % 2 == 0 else reversed(runs):
            run.run_once(record=number >= 0)
            advance(1)
    for run in runs:
        run.runner = None
    cells = []
    for run in runs:
        cells.append(run.cell(memory_bandwidth))
        advance(1)
    return cells


def _timing(seconds: Iterable[float | None]) -> Timing | None:
    values = tuple(value for value in seconds if value is not None)
    return Timing(statistics.median(values), min(values), max(values), values) if values else None


def _ratios(cell: Cell, first: Cell) -> dict[str, float]:
    both = {
        "prefill": (cell.prefill and cell.prefill.median, first.prefill and first.prefill.median),
        "first": (cell.first and cell.first.median, first.first and first.first.median),
        "decode": (cell.decode and cell.decode.median, first.decode and first.decode.median),
        "cache": (cell.cache_bytes, first.cache_bytes),
        "peak": (cell.peak_bytes, first.peak_bytes),
    }
    return {name: mine / theirs for name, (mine, theirs) in both.items() if mine and theirs}
