"""One file here is one rung of healing: what brings quality back after surgery. A step of a recipe like a surgery, and a command of its own."""

import os

HERE = os.path.dirname(__file__)
