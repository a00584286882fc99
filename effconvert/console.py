"""Output for people: tables on stdout, and progress on stderr if that is a terminal."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from effconvert import processes
from effconvert.checkpoint.manifest import read_manifest
from effconvert.convert import selftext
from effconvert.convert.calibration import calibration_bytes
from effconvert.convert.in_words import differences, shape
from effconvert.convert.inspection import Inspection, Look
from effconvert.convert.plan import Plan
from effconvert.convert.run import Outcome
from effconvert.errors import BROKEN_PIPE
from effconvert.eval.verification import Verification
from effconvert.modeling.loading import has_tokenizer
from effconvert.progress import Advance, Unit
from effconvert.quantities import count, perplexity, size, some
from effconvert.steps import arguments

WIDTH = 110  # of output to a file or a pipe
FILES = 12  # names of files that are shown
TRAINED = "error of the outputs that were trained: squared, on held-out windows, relative to their size"
LAYER_ERRORS = {  # what steps note of a layer -> its column, and what it is
    "filters": ("filters", "filters: how far sums of waves are from the filters that they stand for, root mean square, relative to the filters' size"),
    "before": ("error before transfer", TRAINED),
    "after": ("after", TRAINED),
}


class _Output(Console):
    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise SystemExit(BROKEN_PIPE) from None


def stdout() -> Console:
    """Return the console for results."""
    return _Output(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


class _Unit(ProgressColumn):
    """The unit of an amount, and for tokens how many are done in a second."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        return Text(f"{self.unit}, {task.speed:,.0f} a second" if self.unit == "tokens" and task.speed else self.unit)


class Terminal:
    """Prints the plan, the progress and the results of conversions."""

    def __init__(self, model: str) -> None:
        self.model = model  # as the user gave it
        self.out = stdout()
        self.err = Console(stderr=True, highlight=False)

    def plan(self, model: str, plan: Plan, output: Path, verify_bytes: int) -> None:
        """Print the plan."""
        before, after = plan.before, plan.after
        steps = " -> ".join(" ".join([name, *arguments(name, options)]) for step in plan.recipe for name, options in step.items())
        self.out.print(f"[bold]{escape(steps)}[/]: {escape(model)} -> {escape(str(output))}", soft_wrap=True)
        rows = [
            ("parameters", before.parameters, after.parameters, count),
            *([("active for a token", before.active, after.active, count)] if after.active < after.parameters or before.active < before.parameters else []),
            ("on disk", before.bytes, after.bytes, size),
            *([("KV cache a token", before.kv_bytes, after.kv_bytes, size)] if before.kv_bytes or after.kv_bytes else []),
        ]
        if before.state_bytes or after.state_bytes:
            rows.append(("state of mixers", before.state_bytes, after.state_bytes, size))
        table = Table("", "before", "after", "ratio", box=None, pad_edge=False, header_style="bold")
        for what, old, new, show in rows:
            table.add_row(what, show(old), show(new), f"{new / old:.3g} x" if old else "")
        becomes = plan.checkpoint.config.kind != plan.config.kind
        self.out.print(f"{plan.checkpoint.config.kind}, {shape(plan.checkpoint.config)}")
        self.out.print(f"becomes {plan.config.kind + ', ' if becomes else ''}{shape(plan.config)}")
        for line in differences(plan.config):
            self.out.print(line, soft_wrap=True)
        self.out.print(table)
        if plan.calibration:
            tokens = f"{plan.calibration.ids.numel():,} tokens of {plan.calibration.name}"
            self.out.print(f"calibrates on {escape(tokens)}, which takes about {size(calibration_bytes(plan))} of memory", soft_wrap=True)
            if plan.calibration.pending:
                need = size(selftext.memory(plan.teacher, *plan.calibration.ids.shape))
                self.out.print(f"writes that text first, once for this model, which takes about {need} of memory", soft_wrap=True)
        for note in plan.notes:
            self.out.print(f"[bold]note[/]  {escape(note)}", soft_wrap=True)
        need = f"needs about {size(plan.peak)} of memory to write and {size(plan.disk + plan.draft_bytes)} of disk"
        self.out.print(need + (f", {size(verify_bytes)} of memory to verify" if verify_bytes else ""), soft_wrap=True)
        opens = f"{plan.config.opened_by}{', where effconvert is installed' if plan.config.needs_effconvert else ' in stock transformers'}"
        self.out.print(f"loads as {escape(opens)}" + ("; no logit may change" if plan.is_exact else ""), soft_wrap=True)

    def step(self, what: str) -> None:
        """Print the name of a step that begins."""
        if self.err.is_terminal:
            self.err.print(f"[dim]{escape(what)} …[/]")

    def log(self, line: str) -> None:
        """Print a line of a training's log, above the progress bar and in files."""
        self.err.print(escape(line), soft_wrap=True)

    @contextmanager
    def bar(self, what: str, total: int, unit: Unit) -> Iterator[Advance]:
        """Show a progress bar; yields a function that takes how much more is done."""
        amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), _Unit(unit))
        columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
        with Progress(*columns, console=self.err, disable=not self.err.is_terminal, transient=True) as progress:
            task = progress.add_task(escape(what), total=total)
            yield lambda amount: progress.advance(task, amount)

    def outcome(self, outcome: Outcome) -> None:
        """Print the result of a conversion; of several processes the first does."""
        if not processes.is_first():
            return
        if outcome.already_there:
            self.out.print(f"{escape(str(outcome.output))} was there already, by this very conversion", soft_wrap=True)
        if outcome.resumed:
            self.out.print(f"{outcome.resumed} shards were there from an interrupted run")
        if outcome.layer_errors:
            self.layer_errors(outcome.layer_errors)
        if outcome.report is None:
            place = escape(str(outcome.output))
            self.out.print(f"[bold]NOT VERIFIED[/]: {place} was written and never loaded; leave --no-verify out to have it run and measured", soft_wrap=True)
            return
        checkpoint = outcome.plan.checkpoint
        original = outcome.plan.teacher is checkpoint and not read_manifest(checkpoint.folder)
        self.report(outcome.report, "original" if original else "MODEL")
        self.out.print(f"verified, and {'still in' if outcome.already_there else 'written to'} [bold]{escape(str(outcome.output))}[/]", soft_wrap=True)

    def layer_errors(self, layer_errors: Mapping[str, Mapping[str, float]]) -> None:
        """Print the errors that steps noted of each layer."""
        kinds = {name: title for name, (title, _) in LAYER_ERRORS.items() if any(name in errors for errors in layer_errors.values())}
        table = Table("layer", *kinds.values(), box=None, pad_edge=False, header_style="bold")
        for layer, errors in layer_errors.items():
            table.add_row(layer, *(f"{errors[name]:.3g}" if name in errors else "" for name in kinds))
        self.out.print()
        self.out.print(table)
        for meaning in dict.fromkeys(LAYER_ERRORS[name][1] for name in kinds):
            self.out.print(meaning, soft_wrap=True)

    def report(self, report: Verification, source: str) -> None:
        """Print the verification: sizes and quality before and after. `source` is what the conversion began from: after others that is not the original."""
        self.out.print()
        table = Table("verification", source, "converted", box=None, pad_edge=False, header_style="bold")
        before, after = report.before, report.after
        table.add_row("parameters", count(before.parameters), count(after.parameters))
        if before.kv_bytes or after.kv_bytes:
            table.add_row("KV cache a token", size(before.kv_bytes), size(after.kv_bytes))
        if before.state_bytes or after.state_bytes:
            table.add_row("state of mixers", size(before.state_bytes), size(after.state_bytes))
        if before.quality and after.quality:
            table.add_row("perplexity", perplexity(before.quality.perplexity), perplexity(after.quality.perplexity))
            table.add_row(f"KL from {'the original' if source == 'original' else source}", "", f"{after.quality.kl:.4f} nats a token")
            table.add_row("same top token", "", f"{after.quality.agreement:.1%}")
        self.out.print(table)
        if before.quality:
            q = before.quality
            self.out.print(f"on {escape(report.text)}: {q.tokens} tokens in windows of {q.context}, {report.dtype}, {report.device}", soft_wrap=True)
            self.out.print(f"{source + ' writes:':17} {before.continuation!r}", soft_wrap=True, markup=False)
            self.out.print(f"converted writes: {after.continuation!r}", soft_wrap=True, markup=False)
        else:
            self.out.print(f"no quality was measured: {escape(report.unmeasured)}", soft_wrap=True)
        if report.difference is not None:
            self.out.print(f"largest change of a logit: {report.difference:.2g}, on up to {report.compared} tokens (nothing may change)", soft_wrap=True)

    def inspection(self, inspection: Inspection) -> None:
        """Print the shape, parts and sizes of a model, and the techniques that fit."""
        config, checkpoint = inspection.checkpoint.config, inspection.checkpoint
        self.out.print(f"[bold]{escape(self.model)}[/]: {config.kind} ({escape(config.opened_by)}), {config.role}, {checkpoint.dtype}", soft_wrap=True)
        if config.encoder_decoder:
            self.out.print("layers are the encoder's; the decoder is outside them, and is copied")
        self.out.print(f"{shape(config)}, width {config.hidden}, vocabulary {config.get('vocab_size')}")
        if windows := sorted({window for window in config.windows() if window}):
            sliding = sum(window is not None for window in config.windows())
            self.out.print(f"{sliding} of {config.layers} layers see a sliding window of {windows[0]} tokens")
        for line in differences(config):
            self.out.print(line, soft_wrap=True)
        table = Table("part", "parameters", "share", box=None, pad_edge=False, header_style="bold")
        for part, number in sorted(inspection.parts.items(), key=lambda item: -item[1]):
            table.add_row(part, count(number), f"{number / sum(inspection.parts.values()):.1%}")
        table.add_row(
            "all",
            count(inspection.size.parameters),
            f"{size(inspection.size.bytes)} on disk" + (", head tied to embed" if config.tied and config.predicts else ""),
        )
        if inspection.size.active < inspection.size.parameters:
            table.add_row("active for a token", count(inspection.size.active), f"{config.top_k} of {config.experts} experts")
        self.out.print()
        self.out.print(table)
        if config.decoder:
            sizes = ", ".join(f"{size(cache)} at {context // 1024}k" for context, cache in inspection.kv_bytes.items())
            self.out.print(f"\nKV cache: {size(inspection.size.kv_bytes)} a token, {sizes}")
        self.out.print()
        table = Table("technique", "", box=None, pad_edge=False, header_style="bold")
        for name, options in inspection.allowed_options.items():
            table.add_row(name, f"applies: {escape(options)}")
        for name, reason in inspection.refusals.items():
            table.add_row(name, f"does not apply: {escape(reason.split('; ')[0])}")
        self.out.print(table)

    def look(self, look: Look) -> None:
        """Print what is known of a model whose layout effconvert does not know."""
        model, described = look.model, look.described
        architecture = described.architecture if described else ", ".join(map(str, model.raw.get("architectures") or ["no class named"]))
        self.out.print(f"[bold]{escape(self.model)}[/]: {escape(model.kind)} ({escape(architecture)})", soft_wrap=True)
        rows = {
            "parameters" if described else "numbers on disk": count(described.parameters if described else sum(model.types.values())),
            "on disk": f"{size(model.bytes)}, {', '.join(model.types)}",
            "tokenizer": "yes" if has_tokenizer(model.folder) else "none found",
            "files": some(sorted(path.name for path in model.folder.iterdir()), FILES),
        }
        for what, value in rows.items():
            self.out.print(f"{what:16} {escape(value)}", soft_wrap=True)
        self.out.print(f"cannot be converted: {escape(look.unconvertible.split('; ')[0])}", soft_wrap=True)
        measured = f"cannot be measured: {escape(look.unmeasurable)}" if look.unmeasurable else "can be measured: effconvert eval, effconvert bench"
        self.out.print(measured, soft_wrap=True)

    def demo(self, outcomes: dict[str, Outcome], kept: bool) -> None:
        """Print the results of all rules of pooling side by side."""
        reports = {options: outcome.report for options, outcome in outcomes.items() if outcome.report}
        first = next(iter(reports.values()))
        sides = {"original": first.before, **{options: report.after for options, report in reports.items()}}
        table = Table("", *sides, box=None, pad_edge=False, header_style="bold")
        table.add_row("parameters", *(count(side.parameters) for side in sides.values()))
        table.add_row("KV cache a token", *(size(side.kv_bytes) for side in sides.values()))
        qualities = [side.quality for side in sides.values() if side.quality]
        table.add_row("perplexity", *(perplexity(quality.perplexity) for quality in qualities))
        table.add_row("KL from the original", "", *(f"{quality.kl:.3f}" for quality in qualities[1:]))
        table.add_row("same top token", "", *(f"{quality.agreement:.1%}" for quality in qualities[1:]))
        self.out.print()
        self.out.print(table)
        for name, side in sides.items():
            self.out.print(f"{name} writes: {side.continuation!r}", soft_wrap=True, markup=False)
        quality = qualities[0]
        self.out.print(f"on {escape(first.text)}: {quality.tokens} tokens in windows of {quality.context}, {first.dtype}, {first.device}", soft_wrap=True)
        last = next(reversed(outcomes.values())).plan.calibration
        if last:
            self.out.print(f"aligned and pca calibrated on {escape(last.name)}: {last.ids.numel():,} tokens", soft_wrap=True)
        self.out.print(
            "All five have a quarter of the cache, and nothing was trained: averaging heads ruins the model, --pool pca --refit keeps most of it. "
            "Now yours: effconvert gqa --help",
            soft_wrap=True,
        )
        if kept:
            self.out.print(f"kept: {', '.join(str(outcome.output) for outcome in outcomes.values())}", soft_wrap=True, markup=False)


class Demonstration(Terminal):
    """Prints only the first plan: the others differ only in the rule of pooling."""

    has_plan = False

    def plan(self, model: str, plan: Plan, output: Path, verify_bytes: int) -> None:
        """Print the first plan."""
        if not self.has_plan:
            super().plan(model, plan, output, verify_bytes)
        self.has_plan = True
