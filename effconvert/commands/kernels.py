"""List the operations with kernels, and what would run here."""

import click

from effconvert.commands._width import columns


@click.command(name="kernels")
def command() -> None:
    """List the operations with kernels, and what would run here.

    An operation has a reference in plain PyTorch, and some have a Triton kernel that computes the same. `auto`, the default, takes the kernel on cards on
    which it was measured to be faster. EFFCONVERT_KERNELS=triton or reference chooses for all; `effconvert bench --kernels` and
    `effconvert.load(MODEL, kernels="triton")` choose for a model. docs/kernels.md has the measurements.

    \b
    Examples:
      effconvert kernels
      EFFCONVERT_KERNELS=triton effconvert kernels
    """
    import torch

    from effconvert.errors import OptionError
    from effconvert.kernels.choice import VARIABLE, obstacle, operations, runs_triton, wanted

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing, width = obstacle(device), columns()
    try:
        asked = wanted()
    except ValueError as error:
        raise OptionError(str(error)) from None
    click.echo(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else device.type}; {missing or 'triton is installed'}")
    click.echo(f"{VARIABLE}: {asked}\n")
    for name, operation in operations().items():
        click.secho(name.replace("_", "-"), bold=True)
        click.echo(click.wrap_text(operation.summary, width, "  ", "  "))
        why = "it has no kernel" if not operation.kernel else missing
        if not why and not runs_triton(device, name):
            why = f"{VARIABLE} says so" if asked == "reference" else "the kernel was never measured on this card"
        measured = f"; measured on {', '.join(operation.measured) or 'no card'}" if operation.kernel else ""
        refused = asked == "triton" and operation.kernel and missing  # as everything that would call it says
        runs = f"an error, as {why}" if refused else f"the reference, as {why}" if why else "the kernel"
        click.echo(click.wrap_text(f"here: {runs}{measured}", width, "  ", "  ") + "\n")
