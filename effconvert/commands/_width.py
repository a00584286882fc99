"""How wide the text of a command may be."""

import shutil
import sys


def columns() -> int:
    """Return the columns of the terminal; a pipe gets each line whole."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
