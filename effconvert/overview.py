"""The page of `effconvert --help`: all commands on one screen.

It does not use Click: importing Click alone takes 3.7 times as long as `python -c pass`, and this page must take less than 4.
"""

from effconvert import commands, steps

PAGE = """\
Usage: effconvert COMMAND [OPTIONS] MODEL

  Turn a pretrained checkpoint into a cheaper architecture, and measure the cost.

  MODEL is a folder with config.json and safetensors, a Hub id, or a .gguf file.

Techniques:
{techniques}

Healing:
{healing}

Other commands:
{commands}

Options:
  -h, --help  Show this page, or the help of a command.
  --version   Show the version.

Examples:
  effconvert demo
  effconvert inspect HuggingFaceTB/SmolLM2-135M
  effconvert gqa --groups 1 HuggingFaceTB/SmolLM2-135M -o smol-mqa
"""


def page() -> str:
    """Return the page."""
    techniques, healing, others = steps.techniques(), steps.healing_methods(), commands.catalogue()
    width = max(map(len, [*techniques, *healing, *others]))
    return PAGE.format(techniques=_lines(techniques, width), healing=_lines(healing, width), commands=_lines(others, width))


def _lines(summaries: dict[str, str], width: int) -> str:
    return "\n".join(f"  {name:{width}}  {summary}" for name, summary in summaries.items())
