"""Whether operations run as Triton kernels."""

import os

import torch

VARIABLE = "EFFCONVERT_KERNELS"
VALUES = ("auto", "triton", "reference")


def runs_triton(device: torch.device) -> bool:
    """Return whether an operation on this device runs as a kernel.

    EFFCONVERT_KERNELS=triton asks for it. By default the reference runs: no kernel has been compared with it on a GPU yet.

    Raises:
        ValueError: the variable has another value, or asks for a kernel where none can run.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in VALUES:
        raise ValueError(f"{VARIABLE} is {value!r}, and it should be one of {', '.join(VALUES)}")
    if value == "triton" and device.type != "cuda":
        raise ValueError(f"{VARIABLE} is triton, and kernels run on CUDA devices, not on {device.type}; unset it")
    return value == "triton"
