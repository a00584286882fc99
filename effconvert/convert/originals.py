"""Which layers of the model that healing goes towards each layer of the converted one stands for."""

from itertools import pairwise

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.errors import ModelError


def stand_for(student: Checkpoint, teacher: Checkpoint) -> list[range]:
    """Return for each layer of `student` which layers of `teacher` it stands for: its own, and those that were dropped after it.

    Raises:
        ModelError: they cannot be two stages of one model.
    """
    less, more = student.config, teacher.config
    if less.hidden != more.hidden:
        raise ModelError(
            f"the teacher is {more.hidden} wide and the student {less.hidden}: what is refitted is what layers make of the same inputs, "
            "so the width must be the same; distil instead, or name the model that the student was made from"
        )
    if less.layers == more.layers:
        return [range(index, index + 1) for index in range(less.layers)]
    if less.layers > more.layers:
        raise ModelError(f"the teacher has {more.layers} layers and the student {less.layers}; name the model that the student was made from")
    signs = [_sign(student, index) for index in range(less.layers)], [_sign(teacher, index) for index in range(more.layers)]
    starts: list[int] = []
    for sign in signs[0]:
        later = range(starts[-1] + 1 if starts else 0, more.layers)
        found = next((index for index in later if sign and sign.items() <= signs[1][index].items()), None)
        if found is None:
            raise ModelError(
                f"the teacher has {more.layers} layers and the student {less.layers}, and layer {len(starts)} of the student has the norms of none of them, "
                "so nobody can tell which ones it stands for; only layers that were dropped, and whose norms were not trained since, can be refitted"
            )
        starts.append(found)
    return [range(start, stop) for start, stop in pairwise([*starts, more.layers])]


def _sign(checkpoint: Checkpoint, index: int) -> dict[str, bytes]:
    """Return what tells a layer from others: its vectors that no technique changes, but for those that go with what is dropped."""
    layer = checkpoint.layer(index, "cpu")
    return {part: layer[part].numpy().tobytes() for part in layer if part in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm")}
