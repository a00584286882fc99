"""How fast models are, beside each other: prefill, first token, decoding, memory, over batch sizes and contexts.

All models run in one process, on the same tokens, and take turns: what disturbs the machine disturbs them alike, so that ratios mean more than seconds.
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
from effconvert.eval.subject import Opened, load_model, open_model, pick_device, pick_dtype
from effconvert.progress import Advance, NoProgress, Progress
from effconvert.quiet import quiet_transformers

Result = TypeVar("Result")
ROOM = 0.8  # of the free memory may be weights if all models are to be in it together


def bench(models: Sequence[str], options: BenchOptions, progress: Progress | None = None) -> Benchmark:
    """Measure how fast each of `models` is.

    Args:
        models: folders, Hub ids or .gguf files; the others are compared with the first.
        options: what to run, and how often.
        progress: shows the progress; by default nothing is shown.

    Raises:
        OptionError: the asker wants something impossible.
        ModelError: a model is damaged, or of a family that effconvert does not know.
        EffconvertError: a model does not fit into memory.
    """
    progress = progress or NoProgress()
    if not models:
        raise OptionError("there is no model to measure; give at least one")
    device = device_of(options)
    opened = [open_model(model, step=progress.step) for model in models]
    batches, contexts = list(dict.fromkeys(options.batch)), contexts_of(opened, options)
    together = _fit_together(opened, options, device)
    vocabulary = min(one.subject.vocabulary for one in opened)
    progress.step("measuring how fast memory is")
    moved = bandwidth(device)
    cells: list[Cell] = []
    passes = len(opened) * len(batches) * len(contexts) * (options.warmup + options.rounds + 1)
    with quiet_transformers(), progress.bar("measuring", passes, "steps") as advance:
        for group in [list(range(len(opened)))] if together else [[index] for index in range(len(opened))]:
            loaded = [Loaded(index, opened[index], load_model(opened[index], options.dtype, device)) for index in group]
            for batch in batches:
                for context in contexts:
                    cells += _take_turns([Turn(one, Job(batch, context, vocabulary, options, device)) for one in loaded], options, moved, advance)
            del loaded
            memory.release(device)
    cells.sort(key=lambda cell: (batches.index(cell.batch), contexts.index(cell.context), cell.subject))
    first = {(cell.batch, cell.context): cell for cell in cells if cell.subject == 0}
    return Benchmark(
        subjects=tuple(one.subject for one in opened),
        cells=tuple(replace(cell, ratios=_ratios(cell, first[cell.batch, cell.context])) for cell in cells),
        bandwidth=moved,
        notes=tuple(_notes(opened, options, contexts, together)),
        settings={**options.model_dump(mode="json", exclude={"output"}), "context": contexts, "device": device, "seed": SEED},
        versions=results.versions(),
        machine=results.machine(device),
        date=results.now(),
    )


def device_of(options: BenchOptions) -> str:
    """Return the device to measure on.

    Raises:
        OptionError: there is none like that, or it cannot replay graphs.
    """
    device = pick_device(options.device)
    if options.graphs and not device.startswith("cuda"):
        raise OptionError(f"--graphs replays CUDA graphs, and the device is {device}; leave it out, or give --device cuda where there is one")
    return device


def contexts_of(opened: list[Opened], options: BenchOptions) -> list[int]:
    """Return the contexts to measure at: those asked for, or those that every model reads.

    Raises:
        OptionError: a model does not read that many tokens.
    """
    limited = [one for one in opened if one.subject.longest]
    least = min(limited, key=lambda one: _room(one, options), default=None)
    if least is None:
        return list(dict.fromkeys(options.context or CONTEXTS))
    limit = _room(least, options)
    reads = f"{least.subject.name} reads {least.subject.longest} tokens" + (f", and --new-tokens {options.new_tokens} are among them" if writes(least) else "")
    if limit < 1:
        raise OptionError(f"{reads}; give fewer of those")
    if options.context and max(options.context) > limit:
        raise OptionError(f"--context {max(options.context)} is too long: {reads}; give at most {limit}")
    return list(dict.fromkeys(options.context or [context for context in CONTEXTS if context <= limit] or [limit]))


def _room(opened: Opened, options: BenchOptions) -> int:
    return (opened.subject.longest or 0) - (options.new_tokens if writes(opened) else 0)


def _fit_together(opened: list[Opened], options: BenchOptions, device: str) -> bool:
    """Whether all models fit into the memory of `device` at once.

    Raises:
        EffconvertError: one of them does not even fit alone.
    """
    sizes, left = [one.subject.parameters * pick_dtype(options.dtype, one).itemsize for one in opened], memory.free(device)
    for one, size in zip(opened, sizes, strict=True):
        if size > left:
            raise EffconvertError(
                f"{one.subject.name} takes {size / 1e9:.1f} GB of memory and {left / 1e9:.1f} GB are free on {device}; measure it on a larger machine"
            )
    return sum(sizes) <= ROOM * left


def _notes(opened: list[Opened], options: BenchOptions, contexts: list[int], together: bool) -> list[str]:
    notes = []
    if not together:
        notes.append("the models do not fit into memory together: each was measured by itself, the rounds do not alternate, and small ratios mean nothing")
    if options.context is None and contexts != list(CONTEXTS):
        left = ", ".join(str(context) for context in CONTEXTS if context not in contexts)
        notes.append(f"no context of {left}: not every model reads that many tokens and {options.new_tokens} new ones")
    for one in {one.subject.name: one for one in opened}.values():
        if not writes(one):
            why = "has no language-model head" if one.decoder else "is an encoder"
            notes.append(f"{one.subject.name} {why} and writes no tokens: prefill only")
    if len({pick_dtype(options.dtype, one) for one in opened}) > 1:
        notes.append("the models compute in different types; give --dtype to compare the architectures alone")
    if options.cache == "static":
        notes.append(f"a static cache is allocated for the context and {options.new_tokens} new tokens, and read whole in every step: its bytes are of that")
    return notes


class Turn:
    """One model's part in a cell: its passes, until one of them fails."""

    def __init__(self, loaded: Loaded, job: Job) -> None:
        self.loaded, self.job = loaded, job
        self.runner: Runner | None = None
        self.timed: list[Seconds] = []
        self.failure = ""

    def take(self, timed: bool) -> None:
        """Run once more."""
        seconds = self._attempt(self._run)
        if timed and seconds:
            self.timed.append(seconds)

    def cell(self, moved: float) -> Cell:
        """Run once more for the memory, and say what was found."""
        self.runner = None
        memory.release(self.job.device)
        beyond = self._attempt(lambda: memory.peak(self.job.device, self._run))
        cache = self.runner.cache_bytes if self.runner else None
        self.runner = None
        empty = Cell(self.loaded.index, self.job.batch, self.job.context, None, None, None, None, None, None, None, {}, self.failure)
        if self.failure:
            return empty
        weights = self.loaded.read(self.job.batch) if cache is not None else None
        return replace(
            empty,
            prefill=_timing(seconds.prefill for seconds in self.timed),
            first=_timing(seconds.first for seconds in self.timed),
            decode=_timing(seconds.decode for seconds in self.timed),
            predicted=None if weights is None or cache is None else (weights + cache) / moved,
            weight_bytes=weights,
            cache_bytes=cache,
            peak_bytes=None if beyond is None else self.loaded.held + beyond,
        )

    def _run(self) -> Seconds:
        if self.runner is None:
            if self.job.device == "cpu":
                memory.check(self.loaded.opened, self.loaded.model, self.job.batch, self.job.context, self.job.options.new_tokens)
            self.runner = Runner(self.loaded, self.job)
        return self.runner.run()

    def _attempt(self, run: Callable[[], Result]) -> Result | None:
        if self.failure:
            return None
        try:
            return run()
        except Exception as error:  # whatever a class of somebody else's raises over a cache, or over a full device
            self.failure = memory.explain(error)
        self.runner = None
        memory.release(self.job.device)  # only here: the error held what was in memory
        return None


def _take_turns(turns: list[Turn], options: BenchOptions, moved: float, advance: Advance) -> list[Cell]:
    for number in range(-options.warmup, options.rounds):
        for turn in turns if number % 2 == 0 else reversed(turns):
            turn.take(timed=number >= 0)
            advance(1)
    for turn in turns:
        turn.runner = None
    cells = []
    for turn in turns:
        cells.append(turn.cell(moved))
        advance(1)
    return cells


def _timing(seconds: Iterable[float | None]) -> Timing | None:
    known = tuple(value for value in seconds if value is not None)
    return Timing(statistics.median(known), min(known), max(known), known) if known else None


def _ratios(cell: Cell, first: Cell) -> dict[str, float]:
    both = {
        "prefill": (cell.prefill and cell.prefill.median, first.prefill and first.prefill.median),
        "first": (cell.first and cell.first.median, first.first and first.first.median),
        "decode": (cell.decode and cell.decode.median, first.decode and first.decode.median),
        "cache": (cell.cache_bytes, first.cache_bytes),
        "peak": (cell.peak_bytes, first.peak_bytes),
    }
    return {name: mine / theirs for name, (mine, theirs) in both.items() if mine and theirs}
