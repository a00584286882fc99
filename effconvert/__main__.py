"""`python -m effconvert`."""

from effconvert.cli import main

main(prog_name="effconvert")
