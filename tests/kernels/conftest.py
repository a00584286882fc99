"""Kernels run in Triton's interpreter here: the variable is read when a kernel is defined, which is when its file is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
