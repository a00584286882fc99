"""List the techniques: where each applies and what it saves."""

import click

from effconvert.commands._width import columns


@click.command(name="list")
def command() -> None:
    """List the techniques: where each applies and what it saves.

    "Opens as" is the class of transformers that opens the result; "needs effconvert" means `import effconvert` before loading. `effconvert inspect
    MODEL` says which techniques a model allows.

    \b
    Example:
      effconvert list
    """
    from effconvert import steps

    width = 2 + max(map(len, steps.techniques()))
    most, indent = columns(), " " * (2 + width)
    for kind, techniques in steps.by_kind().items():
        click.secho(kind, bold=True)
        for name, summary in techniques.items():
            lines = click.wrap_text(summary, most, indent, indent)
            click.echo(f"  {click.style(name, bold=True)}{lines[2 + len(name) :]}")
            if facts := steps.load(name).facts:
                opens = f"opens as {facts.native}" if facts.native else "needs effconvert"
                exact = f"exact {facts.exact}" if facts.exact else "never exact"
                click.echo(click.wrap_text(f"for {facts.applies}; saves {facts.saves}; {opens}; {exact}", most, indent, indent))
        click.echo()
