"""Run a model on a text while it is converted, layer by layer: each is fed by the *converted* layers below it, which is what it will see.

Steps that look at what layers compute do so here. What becomes of a layer is left in the output's working folder, from where it is written, so a
killed run takes the finished layers from there, and runs them, but for nothing else.
"""
# B = windows run at a time, T = tokens in a window, M = hidden width.

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.manifest import DRAFT, to_disk
from effconvert.checkpoint.shards import FLOATS
from effconvert.convert.output import drafts
from effconvert.convert.plan import Plan
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import windows
from effconvert.eval.quality.text import MOST, calibration_text, read_calibration
from effconvert.heal._activations import Activations
from effconvert.heal._layerwise import Calibration, at_a_time, return_memory, stored_tensors
from effconvert.modeling import loading
from effconvert.options import Conversion
from effconvert.progress import Watcher

WINDOW = 512  # tokens
PIECES = (1, 4, 16)  # an encoder's windows are cut into so many texts in turn: it is to be good at short ones too
SHORTEST = 14  # tokens of such a text, but for those that begin and end it
LEAST = 8  # windows: one of them is held out
LIBRARIES = 400_000_000  # bytes; transformers, and what PyTorch sets up to compute


def prepare(plan: Plan, options: Conversion) -> Calibration:
    """Make the tokens to calibrate on: windows from all over the text, for encoders texts of several lengths, begun and ended as theirs are.

    Raises:
        OptionError: the text cannot be read, or is too short.
        ModelError: there is no tokenizer, or it is damaged or does not belong to the model.
    """
    config, folder = plan.checkpoint.config, plan.checkpoint.folder
    if not loading.has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer, so the model cannot be run on a text; put it there, or take options that need no calibration")
    text = read_calibration(options.calibrate) if options.calibrate is not None else calibration_text()
    if plan.teacher.config.vocabulary < config.vocabulary:
        raise ModelError(
            f"the teacher knows {plan.teacher.config.vocabulary} tokens and the student {config.vocabulary}: they do not read the same text; "
            "name the model that the student was made from"
        )
    window = _window(options, min(config.longest or MOST, plan.teacher.config.longest or MOST))
    tokenizer = loading.load_tokenizer(folder)
    asked = f"--calibration-tokens {options.calibration_tokens} are asked for; give a longer text, or ask for fewer"
    try:
        ids = windows(tokenizer, text, window, MOST, config.vocabulary)
    except OptionError:  # which speaks of the options of measuring
        found = len(tokenizer(text.content, add_special_tokens=False).input_ids)
        raise OptionError(f"{text.name} has {found} tokens, and {asked}") from None
    count = options.calibration_tokens // window
    if len(ids) < count:
        raise OptionError(f"{text.name} has {ids.numel()} tokens in windows of {window}, and {asked}")
    ids = ids[[index * len(ids) // count for index in range(count)]]
    if config.family.decoder:
        return Calibration(text.name, ids)
    ends = _ends(tokenizer)
    least = SHORTEST + sum(map(len, ends))
    return Calibration(text.name, ids, tuple(pieces for pieces in PIECES if pieces == 1 or window // pieces >= least), ends)


def _window(options: Conversion, longest: int) -> int:
    """Return how many tokens are read together, of a model that reads `longest`."""
    asked, tokens = options.calibration_window, options.calibration_tokens
    if asked is None:
        return min(WINDOW, longest, tokens // LEAST)
    if asked > longest:
        raise OptionError(f"--calibration-window {asked} is more than the {longest} tokens that the model reads; give at most that")
    if asked > tokens // LEAST:
        raise OptionError(f"--calibration-window {asked} needs {LEAST * asked} --calibration-tokens, {LEAST} windows, and {tokens} are asked for")
    return asked


def _ends(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that the tokenizer puts before and after a text; none where that cannot be told."""
    plain, whole = (tokenizer("a 1 .", add_special_tokens=special, verbose=False).input_ids for special in (False, True))
    start = next((place for place in range(len(whole)) if plain and whole[place : place + len(plain)] == plain), None)
    if start is None:
        return (), ()
    return tuple(whole[:start]), tuple(whole[start + len(plain) :])


def calibration_bytes(plan: Plan) -> int:
    """Return about how many bytes of memory `calibrate` takes with a refit, the largest there is, and half of that again between freed blocks."""
    assert plan.calibration
    config, ids = plan.checkpoint.config, plan.calibration.ids
    window, inner = ids.shape[1], config.heads * config.head_dim
    token = 4 * (8 * config.hidden + 4 * inner) + 2 * config.heads * window  # inputs, outputs, queries and keys; attention in half precision
    batch = at_a_time(window) * 4 * window * (4 * config.heads * window + 3 * config.ffn)
    squares = 6 * 8 * max(config.hidden, inner) ** 2
    return plan.peak + LIBRARIES + 3 * ids.numel() * token // 2 + batch + squares


@torch.no_grad()  # and not inference mode: transfer trains on what is made here
def calibrate(plan: Plan, folder: Path, watcher: Watcher) -> None:
    """Convert the layers of `plan` one after the other, looking at what they compute, and leave what became of each in `folder`.

    Raises:
        ModelError: the model computes NaN or infinity.
    """
    assert plan.calibration
    ids = plan.calibration.ids
    after = [model.outer.on_top(config) for model, config in zip(plan.models("cpu"), plan.configs[1:], strict=False)]
    outer = [plan.checkpoint.model("cpu").outer, *after]  # none has changes in it that its config knows nothing of
    activations = Activations(plan.checkpoint, plan.teacher, outer, plan.calibration.batches)
    layers: list[Layer | None] = [*plan.models("cpu", activations)[-1].layers]
    with watcher.bar("calibrating", len(layers) * ids.numel(), "tokens") as advance:
        for index in range(len(layers)):
            layer, file = layers[index], folder / drafts(plan)[index]
            if layer is not None and not file.is_file():  # a layer's truth value would be its number of parts, and compute it
                made = {name: numbers.to(FLOATS[origin.dtype]) for name, (origin, numbers, new) in stored_tensors(layer).items() if new}
                _save(file, made, activations.notes.get(index, {}))
            activations.advance(index, _finished(plan, index, file))
            layers[index] = None  # what it computed is on disk
            return_memory()
            advance(ids.numel())


def computed(plan: Plan, index: int, folder: Path) -> dict[str, Tensor]:
    """Return what became of layer `index`, but for what did not change."""
    return load_file(folder / drafts(plan)[index])


def _finished(plan: Plan, index: int, file: Path) -> dict[str, Tensor]:
    """Return all of a layer of the converted model, in float32."""
    made, prefix = load_file(file), plan.layer_prefix(index)
    inside = {target.name.removeprefix(prefix): target for target in plan.targets if target.name.startswith(prefix)}
    buffers = plan.config.family.buffers
    return {name: target.origin.read("cpu") if target.unit is None else made[name].float() for name, target in inside.items() if name not in buffers}


def layer_notes(plan: Plan, folder: Path) -> dict[str, dict[str, float]]:
    """Return what steps had to tell of the layers they looked at, as it lies in `folder`: layer -> what."""
    found = {}
    for index, name in enumerate(drafts(plan)):
        if (folder / name).is_file():
            with safe_open(folder / name, "pt") as file:
                found[str(index)] = json.loads((file.metadata() or {}).get("notes", "{}"))
    return {index: said for index, said in found.items() if said}


def _save(file: Path, tensors: dict[str, Tensor], said: dict[str, float]) -> None:
    draft = file.with_name(f"{file.name}{DRAFT}")
    save_file({name: numbers.contiguous().cpu() for name, numbers in tensors.items()}, draft, {"notes": json.dumps(said)})
    to_disk(draft)
    draft.replace(file)
