"""Weights that a student has from its teacher: which they are, and one copy of them for both models."""

import re
from collections.abc import Sequence
from typing import Any

import torch

LAYER = re.compile(r"(\D*\.)(\d+)(\..+)")  # of a parameter's name: the first number is the layer's


def unchanged(student: Any, teacher: Any, originals: Sequence[int]) -> dict[str, str]:
    """Return the names of the student's parameters that are as in the teacher, and their names there.

    Args:
        student: a model of transformers.
        teacher: another, of the same width.
        originals: for each layer of the student, the layer of the teacher that it was.
    """
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    same: dict[str, str] = {}
    changed: set[int] = set()
    own = dict(student.named_parameters(remove_duplicate=False))
    for name, parameter in own.items():
        other = _name_there(name, originals)
        if other in theirs and parameter.shape == theirs[other].shape and torch.equal(parameter, theirs[other].to(parameter)):
            same[name] = other
        else:
            changed.add(id(parameter))  # also where several layers share it, and it is as in one of them
    return {name: other for name, other in same.items() if id(own[name]) not in changed}


def share(student: Any, teacher: Any, same: dict[str, str]) -> None:
    """Freeze parameters of the student, and put them into the teacher, if given, in place of its own, so that they are in memory once."""
    for name, other in same.items():
        parameter = student.get_parameter(name).requires_grad_(False)
        module, _, own = other.rpartition(".")
        if teacher is not None:
            setattr(teacher.get_submodule(module), own, parameter)


def _name_there(name: str, originals: Sequence[int]) -> str:
    match = LAYER.fullmatch(name)
    if not match or int(match[2]) >= len(originals):
        return name
    return f"{match[1]}{originals[int(match[2])]}{match[3]}"
