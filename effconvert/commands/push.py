"""Push a converted model to the Hub, with a model card."""

from typing import Any

import click

from effconvert.commands._click import OptionsCommand, given_options
from effconvert.hub.push_options import PushOptions


def run(folder: str, repo: str, **values: Any) -> None:
    """Push a converted model to the Hub, with a model card.

    Sends the files that effconvert wrote and verified, and no others, in one commit; creates the repository if needed. After an interruption the
    same command resumes, and sends no file twice. Uses the token of `hf auth login`, or HF_TOKEN.

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

    options, terminal = PushOptions(**given_options(values)), Terminal(folder)
    pushed = push(expand(folder), repo, options, terminal)
    table = Table("file", "size", box=None, pad_edge=False, header_style="bold")
    for name, file_size in sorted(pushed.files.items()):
        table.add_row(escape(name), size(file_size))
    table.add_row(f"{len(pushed.files)} files", size(sum(pushed.files.values())))
    show = terminal.out.print
    show(table)
    if pushed.card_edited:
        show("README.md was changed by hand since the conversion: its metadata is kept, its text is not; edit the text on the Hub")
    for names, what in ((pushed.left_alone, "not part of the checkpoint, left alone"), (pushed.stayed, "in the repository before, left alone")):
        if names:
            show(f"{what}: {escape(', '.join(names[:10]))}{f' and {len(names) - 10} more' if len(names) > 10 else ''}", soft_wrap=True)
    if options.dry_run:
        show(f"dry run: nothing was sent to {escape(repo)}, and the Hub was not contacted", soft_wrap=True)
    elif not pushed.changed:
        show(f"{escape(pushed.repo)} had all of this already: [bold]{escape(str(pushed.url))}[/]", soft_wrap=True)
    else:
        show(f"pushed to {escape(pushed.repo)}, {escape(pushed.revision)}: [bold]{escape(str(pushed.url))}[/]", soft_wrap=True)


command = OptionsCommand("push", [click.Argument(["folder"], type=click.Path(), metavar="DIR"), click.Argument(["repo"])], lambda: (PushOptions,), run)
