"""Put a converted model on the Hub, with a model card."""

from typing import Any

import click

from effconvert.commands._click import OptionsCommand, given
from effconvert.hub.push_options import PushOptions


def run(folder: str, repo: str, **values: Any) -> None:
    """Put a converted model on the Hub, with a model card.

    Sends what effconvert wrote and verified and nothing else, in one commit; the repository is made if it is not there. After a break the same
    command goes on, and what has arrived is not sent again. Uses the token of `hf auth login`, or HF_TOKEN.

    \b
    Examples:
      effconvert push ./SmolLM2-135M-gqa-1 me/SmolLM2-135M-MQA --dry-run
      effconvert push ./SmolLM2-135M-gqa-1 me/SmolLM2-135M-MQA --private --results eval.json,bench.json
      effconvert push ./SmolLM2-135M-gqa-1 team/SmolLM2-135M-MQA --pr
    """

    from rich.markup import escape
    from rich.table import Table

    from effconvert.console import Terminal
    from effconvert.hub.push import push
    from effconvert.paths import expand
    from effconvert.quantities import size

    options, terminal = PushOptions(**given(values)), Terminal(folder)
    pushed = push(expand(folder), repo, options, terminal)
    table = Table("file", "size", box=None, pad_edge=False, header_style="bold")
    for name, held in sorted(pushed.files.items()):
        table.add_row(escape(name), size(held))
    table.add_row(f"{len(pushed.files)} files", size(sum(pushed.files.values())))
    tell = terminal.out.print
    tell(table)
    if pushed.card_edited:
        tell("README.md was changed by hand since the conversion: its metadata is kept, its text is not; write on the Hub what should stand there")
    for names, what in ((pushed.left_alone, "not part of the checkpoint, left alone"), (pushed.stayed, "in the repository before, and still there")):
        if names:
            tell(f"{what}: {escape(', '.join(names[:10]))}{f' and {len(names) - 10} more' if len(names) > 10 else ''}", soft_wrap=True)
    if options.dry_run:
        tell(f"dry run: nothing was sent to {escape(repo)}, and nothing was asked of the Hub", soft_wrap=True)
    elif not pushed.changed:
        tell(f"{escape(pushed.repo)} held all of this already: [bold]{escape(str(pushed.url))}[/]", soft_wrap=True)
    else:
        tell(f"pushed to {escape(pushed.repo)}, {escape(pushed.revision)}: [bold]{escape(str(pushed.url))}[/]", soft_wrap=True)


command = OptionsCommand("push", [click.Argument(["folder"], metavar="DIR"), click.Argument(["repo"])], lambda: (PushOptions,), run)
