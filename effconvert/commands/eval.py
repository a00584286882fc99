"""Measure how good models are, the original first."""

import math
from typing import TYPE_CHECKING, Any

import click

from effconvert.commands._click import OptionsCommand, given_options
from effconvert.eval.quality.eval_options import EvalOptions

if TYPE_CHECKING:
    from effconvert.eval.results import Evaluation, Row, Value

NOT_SIGNIFICANT = "n.s."


def run(models: tuple[str, ...], **values: Any) -> None:
    """Measure how good models are, the original first.

    Measures how well they predict a text (perplexity, bits per byte), their distance from the first (KL, same top token), loops in generated text,
    passkey retrieval, and lm-eval's --tasks. Differences have standard errors from the same documents; n.s. means not significant.
    Results are cached. MODEL is a folder, a .gguf file or a Hub id, with or without a revision: org/name@v1. Its family may be any that transformers
    opens.

    \b
    Examples:
      effconvert eval ./SmolLM2-135M ./SmolLM2-135M-gqa-1
      effconvert eval ./SmolLM2-135M ./mqa --tasks piqa,arc_easy --limit 200 -o eval.json
      effconvert eval ./MiniLM ./MiniLM-linformer --pairs stsb-dev.csv
    """
    from effconvert.console import Terminal
    from effconvert.eval.quality.evaluate import evaluate
    from effconvert.eval.results import check_output, save

    options = EvalOptions(**given_options(values))
    check_output(options.output, models)
    terminal = Terminal(models[0])
    evaluation = evaluate(models, options, terminal)
    if options.output:
        save(evaluation, options.output)
    show(evaluation)
    if options.output:
        terminal.out.print(f"written to {options.output}", soft_wrap=True, markup=False)


command = OptionsCommand("eval", [click.Argument(["models"], type=click.Path(), nargs=-1, required=True, metavar="MODEL...")], lambda: (EvalOptions,), run)


def show(evaluation: "Evaluation") -> None:
    """Print the results."""
    from rich.markup import escape
    from rich.table import Table

    from effconvert.console import stdout

    out, names = stdout(), [subject.name for subject in evaluation.subjects]
    if len(set(names)) < len(names):
        names = [f"{number} {name}" for number, name in enumerate(names, 1)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("", no_wrap=True)
    table.add_column("n", justify="right")
    recovered = {index for row in evaluation.rows for index, value in enumerate(row.values) if value and value.recovery is not None}
    for index, name in enumerate(names):
        table.add_column(escape(name))
        if index:
            table.add_column("difference")
            table.add_column("")
        if index in recovered:
            table.add_column("kept")
    for row, before in zip(evaluation.rows, [None, *evaluation.rows], strict=False):
        cells = [] if before and before.task == row.task else [escape(row.task)]
        table.add_row(*(cells or [""]), escape(row.metric), str(row.documents), *_cells(row, recovered))
    out.print(table)
    settings = evaluation.settings
    out.print(
        f"text: {escape(str(settings['text']))}, {settings['tokens']} tokens in windows of {settings['context']}; {escape(evaluation.machine)}", soft_wrap=True
    )
    errors = "± is one standard error; differences are taken on the same n documents (windows of text)"
    out.print(f"{errors}; {NOT_SIGNIFICANT}: not significant (p >= 0.05)", soft_wrap=True)
    if recovered:
        out.print("kept: what is left of the original's lead over guessing", soft_wrap=True)
    for note in evaluation.notes:
        out.print(f"note: {note}", soft_wrap=True, markup=False)
    if evaluation.prompt:
        out.print(f"\nafter {evaluation.prompt!r}", soft_wrap=True, markup=False)
        for name, text in zip(names, evaluation.continuations, strict=True):
            out.print(f"{name} writes: {text!r}", soft_wrap=True, markup=False)


def _cells(row: "Row", recovered: set[int]) -> list[str]:
    cells = []
    for index, value in enumerate(row.values):
        cells.append("" if value is None else _number(value.value, value.error))
        if index:
            cells.append("" if value is None or value.difference is None else _number(value.difference, value.difference_error, with_sign=True))
            cells.append("" if value is None else mark(row, value))
        if index in recovered:
            cells.append("" if value is None or value.recovery is None else f"{value.recovery:.0%}")
    return cells


def mark(row: "Row", value: "Value") -> str:
    """Rate a difference in one word."""
    if value.difference is None:
        return ""
    if value.difference == 0 and not value.difference_error:
        return "equal"
    if value.significant is None:
        return "?"
    if not value.significant:
        return NOT_SIGNIFICANT
    if row.better is None:
        return "more" if value.difference > 0 else "less"
    return "better" if (value.difference > 0) == (row.better == "higher") else "worse"


def _number(value: float, error: float | None, with_sign: bool = False) -> str:
    """Write a number to the digits that its error allows, and the error to two."""
    sign = "+" if with_sign else ""
    if not error:
        return f"{value:{sign}.4g}"
    digits = min(6, 1 - math.floor(math.log10(error)))
    if abs(value) >= 1e6 or digits < -2:
        return f"{value:{sign}.3g} ±{error:.2g}"
    return f"{round(value, digits):{sign}.{max(0, digits)}f} ±{round(error, digits):.{max(0, digits)}f}"
