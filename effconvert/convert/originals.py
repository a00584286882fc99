"""Which layers of the teacher each layer of the student stands for."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.errors import ModelError


def stand_for(student: Checkpoint, teacher: Checkpoint, any_width: bool = False) -> list[range]:
    """Return for each layer of `student` the layers of `teacher` that it stands for: its own, and those dropped after it.

    Of a teacher of another width, where that is possible, each stands for as many as the others.

    Raises:
        ModelError: the student cannot be made from this teacher.
    """
    config, original = student.config, teacher.config
    if student is teacher:
        return [range(index, index + 1) for index in range(config.layers)]
    if any_width and config.hidden != original.hidden and config.layers <= original.layers:
        ends = [round(index * original.layers / config.layers) for index in range(config.layers + 1)]
        return [range(start, stop) for start, stop in pairwise(ends)]
    if config.hidden != original.hidden:
        raise ModelError(
            f"the teacher is {original.hidden} wide and the student {config.hidden}: what layers compute is compared, so the width must be the same; "
            "name the model that the student was made from, or distil by predictions (and hidden states) alone, without --unchanged-rate"
        )
    signatures = [_signature(student, index) for index in range(config.layers)], [_signature(teacher, index) for index in range(original.layers)]
    if config.layers == original.layers:
        return _one_by_one(*signatures)
    if config.layers > original.layers:
        raise ModelError(f"the teacher has {original.layers} layers and the student {config.layers}; name the model that the student was made from")
    starts = _first_matches(*signatures)
    last = [original.layers - 1 - index for index in reversed(_first_matches(signatures[0][::-1], signatures[1][::-1]))]
    if len(starts) == config.layers and starts != last:
        layer = next(layer for layer in range(config.layers) if starts[layer] != last[layer])
        raise ModelError(
            f"layer {layer} of the student has the norms of layer {starts[layer]} of the teacher and of layer {last[layer]}, so it is unknown which of them "
            "it stands for; drop layers and heal in one command or recipe, where that is known"
        )
    if len(starts) < config.layers:
        raise ModelError(
            f"the teacher has {original.layers} layers and the student {config.layers}, and layer {len(starts)} of the student has the norms of none of them, "
            "so it is unknown which ones it stands for; only a student made by dropping layers, and without training of its norms, can be refitted"
        )
    return [range(start, stop) for start, stop in pairwise([*starts, original.layers])]


def _one_by_one(student: Sequence[Mapping[str, bytes]], teacher: Sequence[Mapping[str, bytes]]) -> list[range]:
    """Return each layer for itself. Refuse a layer of the student that has the norms of another layer of the teacher, and not those of its own."""
    for index, signature in enumerate(student):
        matches = [layer for layer in range(len(teacher)) if signature and signature.items() <= teacher[layer].items()]
        if matches and index not in matches:
            raise ModelError(f"layer {index} of the student has the norms of layer {matches[0]} of the teacher, and layers in another order cannot be healed")
    return [range(index, index + 1) for index in range(len(student))]


def _first_matches(student: Sequence[Mapping[str, bytes]], teacher: Sequence[Mapping[str, bytes]]) -> list[int]:
    """Return for each layer of the student the first match after that of the layer before. Stop at a layer without a match."""
    starts: list[int] = []
    for signature in student:
        later = range(starts[-1] + 1 if starts else 0, len(teacher))
        match = next((index for index in later if signature and signature.items() <= teacher[index].items()), None)
        if match is None:
            break
        starts.append(match)
    return starts


def _signature(checkpoint: Checkpoint, index: int) -> dict[str, bytes]:
    """Return the norms of a layer, which identify it: no technique changes them, though dropping its attention or ffn drops theirs."""
    layer = checkpoint.layer(index, "cpu")
    return {part: layer[part].numpy().tobytes() for part in layer if part in ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm")}
