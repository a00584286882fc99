"""`effconvert` and `python -m effconvert`."""

import os
import sys
from io import TextIOWrapper

from effconvert.errors import INTERRUPTED, STOPPED, is_interrupt, remember_interrupts

SPINS = "10000"  # rounds that a thread waits actively before it sleeps; libgomp's own default is 300000 (decision 25)
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # by which a user may have decided that


def limit_spinning() -> None:
    """Have torch's threads sleep soon when they wait for each other: on busy cores each would keep the other from finishing. Before torch is imported."""
    if not any(name in os.environ for name in CHOICES):
        os.environ[CHOICES[0]] = SPINS


def replace_unprintable() -> None:
    """Print `?` for characters that the encoding of the output lacks, such as ± in a pipe on Windows: no result may be lost for that."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def main() -> None:
    """Show the first page, or load the commands and run one."""
    replace_unprintable()
    if sys.argv[1:] in ([], ["-h"], ["--help"]) and "_EFFCONVERT_COMPLETE" not in os.environ:  # which Click's shell completion sets
        from effconvert.overview import page

        sys.stdout.write(page())
    else:
        limit_spinning()
        remember_interrupts()
        try:
            from effconvert.cli import main as commands

            commands(prog_name="effconvert")
        except (Exception, KeyboardInterrupt) as error:  # while libraries load: a command has its own answer
            if not is_interrupt(error):
                raise
            print(STOPPED, file=sys.stderr)
            sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
