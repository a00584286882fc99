"""Which layers of the model that healing goes towards each layer of the converted one stands for."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.errors import ModelError


def stand_for(student: Checkpoint, teacher: Checkpoint) -> list[range]:
    """Return for each layer of `student` which layers of `teacher` it stands for: its own, and those that were dropped after it.

    Raises:
        ModelError: they cannot be two stages of one model.
    """
    less, more = student.config, teacher.config
    if student is teacher:
        return [range(index, index + 1) for index in range(less.layers)]
    if less.hidden != more.hidden:
        raise ModelError(
            f"the teacher is {more.hidden} wide and the student {less.hidden}: what is refitted is what layers make of the same inputs, "
            "so the width must be the same; distil instead, or name the model that the student was made from"
        )
    signs = [_sign(student, index) for index in range(less.layers)], [_sign(teacher, index) for index in range(more.layers)]
    if less.layers == more.layers:
        return _one_by_one(*signs)
    if less.layers > more.layers:
        raise ModelError(f"the teacher has {more.layers} layers and the student {less.layers}; name the model that the student was made from")
    starts = _first(*signs)
    last = [more.layers - 1 - index for index in reversed(_first(signs[0][::-1], signs[1][::-1]))]
    if len(starts) == less.layers and starts != last:
        layer = next(layer for layer in range(less.layers) if starts[layer] != last[layer])
        raise ModelError(
            f"layer {layer} of the student has the norms of layer {starts[layer]} of the teacher and of layer {last[layer]}, so nobody can tell for which "
            "it stands; drop layers and heal in one command or recipe, where that is known"
        )
    if len(starts) < less.layers:
        raise ModelError(
            f"the teacher has {more.layers} layers and the student {less.layers}, and layer {len(starts)} of the student has the norms of none of them, "
            "so nobody can tell which ones it stands for; only layers that were dropped, and whose norms were not trained since, can be refitted"
        )
    return [range(start, stop) for start, stop in pairwise([*starts, more.layers])]


def _one_by_one(student: Sequence[Mapping[str, bytes]], teacher: Sequence[Mapping[str, bytes]]) -> list[range]:
    """Return the layers one by one, unless a student's has the norms of another layer of the teacher, and not those of its own."""
    for index, sign in enumerate(student):
        others = [other for other in range(len(teacher)) if sign and sign.items() <= teacher[other].items()]
        if others and index not in others:
            raise ModelError(f"layer {index} of the student has the norms of layer {others[0]} of the teacher, and layers in another order cannot be healed")
    return [range(index, index + 1) for index in range(len(student))]


def _first(student: Sequence[Mapping[str, bytes]], teacher: Sequence[Mapping[str, bytes]]) -> list[int]:
    """Return for each layer of the student the first that it can stand for, behind those of the layers before; up to the one that stands for none."""
    starts: list[int] = []
    for sign in student:
        later = range(starts[-1] + 1 if starts else 0, len(teacher))
        found = next((index for index in later if sign and sign.items() <= teacher[index].items()), None)
        if found is None:
            break
        starts.append(found)
    return starts


def _sign(checkpoint: Checkpoint, index: int) -> dict[str, bytes]:
    """Return what tells a layer from others: its vectors that no technique changes, but for those that go with what is dropped."""
    layer = checkpoint.layer(index, "cpu")
    return {part: layer[part].numpy().tobytes() for part in layer if part in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm")}
