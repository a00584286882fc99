"""Convert a small embedded model, and show what each rule costs."""

import click

PROMISE = """\
This converts a small model that comes with effconvert, and then compares the results:
- It has 8 KV heads. Each conversion keeps 2 of them, which leaves a quarter of the KV cache.
- Four conversions differ in how heads are pooled (first, mean, aligned, pca). The fifth is pca with --refit.
- Each is written to disk, loaded again and measured beside the original. That takes less than two minutes.
First the plan, then a table. Lower perplexity is better; the original's is the aim.
"""


@click.command(name="demo")
@click.option("--output", "-o", type=click.Path(), metavar="DIR", help="Keep the converted models in this folder.")
def command(output: str | None) -> None:
    """Convert a small embedded model, and show what each rule costs.

    Pools its 8 KV heads into 2 by each of the four rules of gqa, and once more with a refit. Needs no network and less than two minutes.
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from effconvert.console import Demonstration
    from effconvert.demo import demo as convert_embedded

    terminal = Demonstration("the embedded model")
    terminal.out.print(PROMISE)
    with TemporaryDirectory(prefix="effconvert-demo-") as scratch:
        terminal.demo(convert_embedded(Path(output or scratch), terminal), kept=bool(output))
