"""Show a model's shape and size, and which techniques apply."""

import click


@click.command(name="inspect")
@click.argument("model")
@click.option("--revision", metavar="TEXT", help="Branch, tag or commit of a model on the Hub.")
def command(model: str, revision: str | None) -> None:
    """Show a model's shape and size, and which techniques apply.

    Reads only the config and the headers, so the largest model takes a second.

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
