"""Convert a small embedded model, and show what each rule costs."""

import click


@click.command(name="demo")
@click.option("--output", "-o", metavar="DIR", help="Keep the converted models in this folder.")
def command(output: str | None) -> None:
    """Convert a small embedded model, and show what each rule costs.

    Pools its 8 KV heads into 2 by each rule of gqa. Needs no network and less than two minutes.
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from effconvert.console import Demonstration
    from effconvert.demo import demo as convert_embedded

    terminal = Demonstration("the embedded model")
    with TemporaryDirectory(prefix="effconvert-demo-") as scratch:
        terminal.demo(convert_embedded(Path(output or scratch), terminal), kept=bool(output))
