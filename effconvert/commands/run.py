"""Carry out a recipe: convert, measure, report."""

from typing import Any

import click


@click.command(name="run")
@click.argument("recipe", metavar="RECIPE")
@click.option("--model", metavar="MODEL", help="Begin from this model instead of the recipe's.")
@click.option("--output", "-o", metavar="DIR", help="Write to this folder instead of the recipe's.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace output folders if effconvert wrote them.")
@click.option("--dry-run", is_flag=True, help="Print the plan of the whole chain, with every error that can be foreseen; write nothing.")
def command(recipe: str, dry_run: bool, **values: Any) -> None:
    """Carry out a recipe: convert, measure, report.

    RECIPE is a YAML file; `effconvert schema` describes it for an editor. Every conversion leaves one beside its weights, effconvert.yaml, which makes the same
    bytes again. A run that was cut off goes on where it stopped.

    \b
    model: HuggingFaceTB/SmolLM2-135M
    output: smol-mqa
    steps:
      - gqa: {groups: 1, pool: mean}
    evaluate: {tasks: [piqa, arc_easy], limit: 200}
    bench: {context: [512, 2048]}
    report: true

    \b
    Examples:
      effconvert run recipe.yaml --dry-run
      effconvert run smol-mqa/effconvert.yaml -o again
    """
    from pathlib import Path

    from effconvert.commands._click import given
    from effconvert.console import Terminal
    from effconvert.recipe import read
    from effconvert.replay import replay

    recipes = read(Path(recipe), **given(values))
    terminal = Terminal(recipes[0].model)
    for done in replay(recipes, dry_run, terminal):
        if dry_run:
            for there in (conversion.output for conversion in done.conversions if conversion.found):
                terminal.out.print(f"{there} is there already, by this very conversion", soft_wrap=True, markup=False)
        else:
            _show(done, terminal)


def _show(done: Any, terminal: Any) -> None:
    from effconvert.commands import bench, eval

    for conversion in done.conversions:
        terminal.outcome(conversion)
    if done.evaluation:
        terminal.out.print()
        eval.show(done.evaluation)
    if done.benchmark:
        terminal.out.print()
        bench.show(done.benchmark)
    for file in done.files:
        terminal.out.print(f"written to {file}", soft_wrap=True, markup=False)
