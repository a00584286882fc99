"""Whether operations run as Triton kernels.

By default ("auto") a kernel runs on the cards on which it agreed with its reference and was faster, which its file names in MEASURED; so far that is none.
"""

import ast
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

VARIABLE = "EFFCONVERT_KERNELS"
VALUES = ("auto", "triton", "reference")


@dataclass(frozen=True)
class Operation:
    """What the file of an operation says of it."""

    name: str
    summary: str
    kernel: bool  # whether it has a Triton kernel beside its reference
    measured: tuple[str, ...] = ()  # cards on which that beat the reference


@lru_cache(None)
def operations() -> dict[str, Operation]:
    """Return the operations by name. Their files are read, not imported: that would import triton."""
    return {file.stem: _operation(file) for file in sorted(Path(__file__).parent.glob("[!_]*.py")) if file != Path(__file__)}


def _operation(file: Path) -> Operation:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kernel = any(isinstance(node, ast.Import) and node.names[0].name == "triton" for node in tree.body)
    own = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MEASURED"]
    summary = (ast.get_docstring(tree) or "").splitlines()[0]
    return Operation(file.stem, summary, kernel, ast.literal_eval(own[0]) if own else ())


def wanted(asked: str = "auto") -> str:
    """Return what is asked for: an argument, or EFFCONVERT_KERNELS, or "auto".

    Raises:
        ValueError: it is none of VALUES.
    """
    if asked != "auto":
        return asked
    value = os.environ.get(VARIABLE, "auto")
    if value not in VALUES:
        raise ValueError(f"{VARIABLE} is {value!r}, and it should be one of {', '.join(VALUES)}")
    return value


def runs_triton(device: torch.device, operation: str, asked: str = "auto") -> bool:
    """Return whether an operation on this device runs as a kernel.

    Args:
        device: where its arguments are.
        operation: the name of its file.
        asked: "triton" or "reference"; "auto" leaves it to EFFCONVERT_KERNELS.

    Raises:
        ValueError: the variable has another value, or a kernel is asked for where none can run.
    """
    value = wanted(asked)
    if value == "triton":
        if why := obstacle(device):
            raise ValueError(f"{VARIABLE} is triton, and {why}; unset it" if asked == "auto" else f"kernels is triton, and {why}; leave it out")
        return True
    if value == "reference" or device.type != "cuda":
        return False
    return not obstacle(device) and torch.cuda.get_device_name(device) in operations()[operation].measured


def obstacle(device: torch.device) -> str:
    """Return why no kernel can run on a device; empty where they can."""
    no_card = "" if device.type == "cuda" else f"kernels run on CUDA devices, not on {device.type}"
    return " and ".join(filter(None, [no_card, "" if _has_triton() else "triton is not installed (pip install triton)"]))


@lru_cache(None)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def cannot(operation: str, why: str, asked: str = "auto") -> None:
    """Say that a kernel does not cover a call, so that the reference runs: with a warning for each reason.

    Raises:
        ValueError: the kernel was asked for.
    """
    if wanted(asked) == "triton":
        raise ValueError(f"kernels are asked for (triton), and that of {operation} does not cover this call: {why}; ask for auto or reference")
    _warn(f"{operation} runs its reference: {why}")


@lru_cache(None)
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
