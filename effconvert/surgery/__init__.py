"""One file here is one technique: its name is the command, its class holds the options."""

import os

HERE = os.path.dirname(__file__)
