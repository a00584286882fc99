"""Show a model's shape and size, and which techniques apply."""

import click


@click.command(name="inspect")
@click.argument("model", type=click.Path())
@click.option("--revision", metavar="TEXT", help="Branch, tag or commit of a model on the Hub.")
def command(model: str, revision: str | None) -> None:
    """Show a model's shape and size, and which techniques apply.

    Reads only the config and the headers, whatever the model's size. That takes a few seconds, most of them for imports.

    \b
    Examples:
      effconvert inspect ./SmolLM2-135M
      effconvert inspect meta-llama/Llama-2-7b-hf --revision main
    """
    from effconvert.checkpoint.sources import locate
    from effconvert.console import Terminal
    from effconvert.convert.inspection import inspect
    from effconvert.modeling.stock import open_as_stock

    terminal = Terminal(model)
    terminal.inspection(inspect(open_as_stock(locate(model, revision, terminal.step))))
