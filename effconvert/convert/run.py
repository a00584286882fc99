"""One conversion from end to end: locate, plan, stream, verify, publish."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from effconvert.convert import sources, stream
from effconvert.convert.checkpoint import open_checkpoint
from effconvert.convert.plan import Plan, plan
from effconvert.convert.verify import Report, check_memory, scratch_bytes, verify
from effconvert.errors import EffconvertError
from effconvert.eval.text import default_text, read_text
from effconvert.options import RunOptions
from effconvert.surgery._surgery import Surgery


class Watcher(Protocol):
    """Who is told how a conversion goes on."""

    def plan(self, plan: Plan, output: Path, verify_bytes: int) -> None:
        """Everything is planned; nothing is written yet."""

    def step(self, what: str) -> None:
        """Something begins that takes a while."""

    def bar(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Something begins whose length in bytes is known."""


class Silent:
    """Tells nobody."""

    def plan(self, plan: Plan, output: Path, verify_bytes: int) -> None:
        """Say nothing."""

    def step(self, what: str) -> None:
        """Say nothing."""

    def bar(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show nothing."""
        return nullcontext(lambda _: None)


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    plan: Plan
    output: Path
    report: Report | None  # None: nothing was verified, or nothing was written
    resumed: int  # shards that an earlier, interrupted run had finished


def convert(model: str, surgeries: tuple[Surgery, ...], options: RunOptions, watcher: Watcher | None = None) -> Outcome:
    """Convert `model` by `surgeries`, one after the other, as `options` say.

    Args:
        model: a folder, a Hub id or a .gguf file.
        surgeries: what to do to it.
        options: where to write, what to measure on.
        watcher: who is told how it goes on; by default nobody.

    Raises:
        OptionError: the asker wants something impossible.
        ModelError: the model cannot be converted, or what was written is not sound.
        EffconvertError: the disk or the network failed; the same call goes on from there.
    """
    watcher = watcher or Silent()
    text = None
    if options.verify:
        text = read_text(options.text) if options.text else default_text()
    folder = sources.locate(model, options.revision, watcher.step)
    planned = plan(open_checkpoint(folder), surgeries)
    output = options.output or Path(default_name(model, surgeries))
    stream.check_output(planned, output, options.overwrite, scratch_bytes(planned, options) if options.verify else 0)
    memory = check_memory(planned, options) if options.verify else 0
    watcher.plan(planned, output, memory)
    if options.dry_run:
        return Outcome(planned, output, None, 0)

    with stream.workplace(output) as partial:
        with watcher.bar(f"writing {output}", planned.after.bytes) as advance:
            resumed = stream.write(planned, partial, advance)
        report = None
        if text is not None:
            try:
                report = verify(planned, partial, text, options, watcher.step)
            except EffconvertError as error:
                raise type(error)(f"{error}; nothing was put at {output}, what was written is in {partial}") from error
        source = {"model": model, "revision": options.revision, "commit": sources.commit(folder)}
        stream.publish(planned, partial, output, {"source": source, "verified": report is not None, "report": report and asdict(report)})
    return Outcome(planned, output, report, resumed)


def default_name(model: str, surgeries: tuple[Surgery, ...]) -> str:
    """Name the output: SmolLM2-135M by gqa --groups 1 is SmolLM2-135M-gqa-1."""
    stem = Path(model).expanduser().resolve().name.removesuffix(".gguf")
    return "-".join([stem, *(surgery.label for surgery in surgeries)])
