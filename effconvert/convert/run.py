"""One conversion from end to end: locate, plan, stream, verify, publish."""

from dataclasses import asdict, dataclass
from pathlib import Path

from effconvert.convert import output, sources
from effconvert.convert.checkpoint import open_checkpoint
from effconvert.convert.plan import Plan, plan
from effconvert.convert.stream import write
from effconvert.convert.verify import Report, check_memory, prepare, scratch_bytes, verify
from effconvert.convert.watch import Silent, Watcher
from effconvert.errors import ModelError
from effconvert.eval.text import default_text, read_text
from effconvert.options import RunOptions
from effconvert.surgery._surgery import Surgery


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
    target = (options.output or Path(default_name(model, surgeries))).expanduser()
    output.check(planned, target, options.overwrite, scratch_bytes(planned, options) if options.verify else 0)
    memory = check_memory(planned, options) if options.verify else 0
    material = prepare(planned, text, options) if text else None
    watcher.plan(planned, target, memory)
    if options.dry_run:
        return Outcome(planned, target, None, 0)

    with output.workplace(planned, target) as partial:
        with watcher.bar(f"writing {target}", planned.after.bytes, "bytes") as advance:
            resumed = write(planned, partial, advance)
        report = None
        if material:
            try:
                report = verify(planned, partial, material, partial / output.SCRATCH, watcher)
            except ModelError as error:
                output.forget(partial)
                raise ModelError(f"{error}; nothing was put at {target}, and what was written is in {partial}") from error
        source = {"model": folder.name if Path(model).exists() else model, "revision": options.revision, "commit": sources.commit(folder)}
        record = {"source": source, "verified": report is not None, "report": report and asdict(report)}
        output.publish(planned, partial, target, options.overwrite, record)
    return Outcome(planned, target, report, resumed)


def default_name(model: str, surgeries: tuple[Surgery, ...]) -> str:
    """Name the output: SmolLM2-135M by gqa --groups 1 is SmolLM2-135M-gqa-1."""
    stem = Path(model).expanduser().resolve().name.removesuffix(".gguf")
    return "-".join([stem, *(surgery.label for surgery in surgeries)])
