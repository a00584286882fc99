"""Run a recipe: convert, measure, report."""

from typing import Any

import click


@click.command(name="run")
@click.argument("recipe", type=click.Path(), metavar="RECIPE")
@click.option("--model", type=click.Path(), metavar="MODEL", help="Convert this model instead of the recipe's.")
@click.option("--output", "-o", type=click.Path(), metavar="DIR", help="Write to this folder instead of the recipe's.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace output folders if effconvert wrote them.")
@click.option("--dry-run", is_flag=True, help="Print the plan of the whole chain, with every error that can be foreseen; write nothing but the cache.")
def command(recipe: str, dry_run: bool, **values: Any) -> None:
    """Run a recipe: convert, measure, report.

    RECIPE is a YAML file; `effconvert schema` prints its JSON schema for editors. Every conversion writes one beside its weights, effconvert.yaml, which
    gives the same bytes again. An interrupted run resumes where it stopped. `report: true` needs matplotlib; in a clone of the repository:
    pip install '.[report]'.

    \b
    model: HuggingFaceTB/SmolLM2-135M
    output: smol-mqa
    steps:
      - gqa: {groups: 1}
      - refit
    evaluate: {tasks: [piqa, arc_easy], limit: 200}
    bench: {context: [512, 2048]}
    report: true

    \b
    Examples:
      effconvert run recipe.yaml --dry-run
      effconvert run smol-mqa/effconvert.yaml -o again
    """
    from pathlib import Path

    from effconvert.commands._click import given_options
    from effconvert.console import Terminal
    from effconvert.recipe import read
    from effconvert.replay import replay

    recipes = read(Path(recipe), **given_options(values))
    terminal = Terminal(recipes[0].model)
    for result in replay(recipes, dry_run, terminal):
        if dry_run:
            for folder in (conversion.output for conversion in result.conversions if conversion.already_there):
                terminal.out.print(f"{folder} exists already, from this same conversion", soft_wrap=True, markup=False)
        else:
            _show(result, terminal)


def _show(result: Any, terminal: Any) -> None:
    from effconvert.commands import bench, eval

    for conversion in result.conversions:
        terminal.outcome(conversion)
    if result.evaluation:
        terminal.out.print("\n[bold]evaluation[/]")
        eval.show(result.evaluation)
    if result.benchmark:
        terminal.out.print("\n[bold]speed[/]")
        bench.show(result.benchmark)
    for file in result.files:
        terminal.out.print(f"written to {file}", soft_wrap=True, markup=False)
