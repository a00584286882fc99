"""`effconvert` and `python -m effconvert`."""

import os
import sys


def main() -> None:
    """Show the first page, or load the commands and run one."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]) and "_EFFCONVERT_COMPLETE" not in os.environ:  # which Click's shell completion sets
        from effconvert.overview import page

        sys.stdout.write(page())
    else:
        from effconvert.cli import main as commands

        commands(prog_name="effconvert")


if __name__ == "__main__":
    main()
