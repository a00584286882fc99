"""Print the JSON schema of a recipe, for editors."""

import click


@click.command(name="schema")
def command() -> None:
    """Print the JSON schema of a recipe, for editors.

    It is generated from the commands' options, so it covers every technique.

    \b
    Example:
      effconvert schema > recipe.schema.json
    """
    import json

    from effconvert.recipe import schema

    click.echo(json.dumps(schema(), indent=2))
