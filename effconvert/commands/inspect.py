"""Show a model's shape and size, and which techniques apply."""

import click


@click.command(name="inspect")
@click.argument("model", type=click.Path())
@click.option("--revision", metavar="TEXT", help="Branch, tag or commit of a model on the Hub.")
def command(model: str, revision: str | None) -> None:
    """Show a model's shape and size, and which techniques apply.

    Reads only the config and the headers, whatever the model's size. That takes a few seconds, most of them for imports.
    Of a model whose layout effconvert does not know it shows what the files say, and whether `eval` and `bench` take it.

    \b
    Examples:
      effconvert inspect ./SmolLM2-135M
      effconvert inspect meta-llama/Llama-2-7b-hf --revision main
    """
    from effconvert.checkpoint.sources import locate
    from effconvert.console import Terminal
    from effconvert.convert.inspection import inspect, inspect_unknown
    from effconvert.errors import UnknownLayoutError
    from effconvert.modeling.stock import open_as_stock
    from effconvert.modeling.unknown import look

    terminal = Terminal(model)
    folder = locate(model, revision, terminal.step)
    try:
        checkpoint = open_as_stock(folder)
    except UnknownLayoutError as reason:
        terminal.look(inspect_unknown(look(folder), reason))
    else:
        terminal.inspection(inspect(checkpoint))
