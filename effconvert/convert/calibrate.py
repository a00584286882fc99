"""Run a model on a text while it is converted, layer by layer: each is fed by the *converted* layers below it, which is what it will see.

Steps that look at what layers compute do so here. What becomes of a layer is left in the output's working folder, from where it is written, so a
killed run takes the finished layers from there, and runs them, but for nothing else.
"""
# B = windows run at a time, T = tokens in a window, M = hidden width.

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from effconvert.convert import stock
from effconvert.convert.checkpoint import Checkpoint
from effconvert.convert.config import Config
from effconvert.convert.layer import Layer
from effconvert.convert.output import DRAFT, drafts, to_disk
from effconvert.convert.plan import Plan, rename
from effconvert.convert.shards import FLOATS, finite
from effconvert.convert.walk import Calibration, Look, Stage, at_a_time, embedding_rows, stored_tensors
from effconvert.convert.watch import Watcher
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality import windows
from effconvert.eval.text import MOST, calibration_text, read_calibration
from effconvert.options import Conversion

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
    if not stock.has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer, so the model cannot be run on a text; put it there, or take options that need no calibration")
    text = read_calibration(options.calibrate) if options.calibrate is not None else calibration_text()
    if plan.teacher.config.vocabulary < config.vocabulary:
        raise ModelError(
            f"the teacher knows {plan.teacher.config.vocabulary} tokens and the student {config.vocabulary}: they do not read the same text; "
            "name the model that the student was made from"
        )
    window = _window(options, min(config.longest or MOST, plan.teacher.config.longest or MOST))
    tokenizer = stock.load_tokenizer(folder)
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


class Walk:
    """Where a conversion stands: what arrives at the layer that is at work, and what it and the original make of that.

    Attributes:
        states: what arrives there, [B, T, M] for each batch.
    """

    def __init__(self, plan: Plan, batches: Sequence[Tensor]) -> None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = found or torch.device("cpu")
        self.plan, self.ids = plan, [batch.to(self.device) for batch in batches]
        self.stages: dict[str, Stage] = {}
        self.notes: dict[int, dict[str, float]] = {}
        self.states = self._stage(plan.checkpoint, plan.checkpoint.config).begin()
        _hold_finite(self.states, "the embedding")

    @property
    def scores(self) -> int:
        """How many numbers the weights of one head's attention are, over all texts."""
        return sum(len(batch) * batch.shape[1] ** 2 for batch in self.ids)

    def look(self, layer: Layer, parts: Sequence[str] = (), until: str = "") -> Iterator[Look]:
        """Run a layer as it stands, and yield what each batch was in it: see `Stage.run`."""
        return self._run(self.plan.checkpoint, layer, layer.config, layer.index, self.states, parts, until)

    def original(self, layers: Sequence[int], parts: Sequence[str] = (), until: str = "") -> Iterator[Look]:
        """Run layers of the original, one after the other, on what arrives here; yield of each batch what the last of them was."""
        teacher, states = self.plan.teacher, self.states
        for index in layers[:-1]:
            states = [look.out for look in self._run(teacher, teacher.layer(index, "cpu"), teacher.config, index, states)]
        return self._run(teacher, teacher.layer(layers[-1], "cpu"), teacher.config, layers[-1], states, parts, until)

    def stored(self, layer: Layer) -> dict[str, Tensor]:
        """Return a layer as it will lie on disk: name in the layer -> numbers."""
        return {name: numbers.to(self.device) for name, (_, numbers, _) in stored_tensors(layer, layer.config).items()}

    def attended(self, layer: Layer, learnt: Mapping[str, Tensor], fixed: Mapping[str, Tensor], batch: int) -> Tensor:
        """Return what the attention of a layer, `fixed` on disk, gives on one batch, [B, T, M], if some parts were others; with gradients for these."""
        tried = layer.on_top(layer.index, layer.config)
        for part, tensor in learnt.items():
            tried[part] = tensor
        changed = {name: tensor.to(FLOATS[origin.dtype]).to(fixed[name]) for name, origin, tensor in tried.tensors(layer.config.family) if tensor is not None}
        stage = self._stage(self.plan.checkpoint, layer.config)
        return stage.attended(layer.index, {**fixed, **changed}, self.states[batch], "o")

    def note(self, index: int, said: dict[str, float]) -> None:
        """Keep what is to be told of the layer at work."""
        self.notes[index] = said

    def advance(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on to the next layer, by what layer `index`, which has become `tensors`, makes of what arrived.

        Raises:
            ModelError: that is NaN or infinite.
        """
        stage = self._stage(self.plan.checkpoint, self.plan.config)
        tensors = {name: numbers.to(self.device) for name, numbers in tensors.items()}
        self.states = [look.out for look in stage.run(index, tensors, self.states)]
        _hold_finite(self.states, f"layer {index}")

    def _run(
        self, source: Checkpoint, layer: Layer, config: Config, index: int, states: Sequence[Tensor], parts: Sequence[str] = (), until: str = ""
    ) -> Iterator[Look]:
        tensors = {name: numbers.to(self.device) for name, (_, numbers, _) in stored_tensors(layer, config).items()}
        for look in self._stage(source, config).run(index, tensors, states, parts, until):
            _hold_finite([look.out, *look.outputs.values()], f"layer {index}")
            yield look

    def _stage(self, source: Checkpoint, config: Config) -> Stage:
        key = f"{source.folder} {json.dumps(config.content, sort_keys=True, default=str)}"
        if key not in self.stages:
            self.stages[key] = Stage(config, self._outer(source, config), self.ids, self.device)
        return self.stages[key]

    def _outer(self, source: Checkpoint, config: Config) -> dict[str, Tensor]:
        """Return what lies outside the layers, in the names of `config`'s bare model."""
        made, used = {}, torch.cat([batch.flatten() for batch in self.ids]).cpu()
        for name, stored in source.outer.items():
            renamed = rename(name, source.prefix, source.config.family, config.family)
            whole_numbers = stored.dtype not in FLOATS  # buffers that old files hold, such as position ids: the class makes its own
            if renamed.startswith(source.prefix) and not whole_numbers and not renamed.startswith(tuple(f"{head}." for head in config.family.head.values())):
                inside = renamed.removeprefix(source.prefix)
                table = inside == f"{config.family.outer['embed']}.weight"
                made[inside] = (embedding_rows(stored, used) if table else stored.read("cpu")).to(self.device)
        return made


def _hold_finite(tensors: Sequence[Tensor], where: str) -> None:
    """Refuse what no statistics can be made of, before linear algebra fails on it."""
    if not all(map(finite, tensors)):
        raise ModelError(f"{where} computes NaN or infinity on the calibration text; give another --calibrate, or ask the model's author")


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
    walk = Walk(plan, plan.calibration.batches)
    layers: list[Layer | None] = [*plan.operate("cpu", walk)]
    with watcher.bar("calibrating", len(layers) * ids.numel(), "tokens") as advance:
        for index in range(len(layers)):
            layer, file = layers[index], folder / drafts(plan)[index]
            if layer is not None and not file.is_file():  # a layer's truth value would be its number of parts, and compute it
                made = {name: numbers.to(FLOATS[origin.dtype]) for name, (origin, numbers, new) in stored_tensors(layer, plan.config).items() if new}
                _save(file, made, walk.notes.get(index, {}))
            walk.advance(index, _finished(plan, index, file))
            layers[index] = None  # what it computed is on disk
            _return_memory()
            advance(ids.numel())


def _return_memory() -> None:
    """Have glibc give back what was freed: of a layer's many blocks it keeps some hundred megabytes otherwise, and as many again of the next."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries do so by themselves
        ctypes.CDLL(None).malloc_trim(0)


def computed(plan: Plan, index: int, folder: Path) -> dict[str, Tensor]:
    """Return what became of layer `index`, but for what did not change."""
    return load_file(folder / drafts(plan)[index])


def _finished(plan: Plan, index: int, file: Path) -> dict[str, Tensor]:
    """Return all of a layer of the converted model, in float32."""
    made, prefix = load_file(file), plan.layer_prefix(index)
    inside = {target.name.removeprefix(prefix): target for shard in plan.shards.values() for target in shard if target.name.startswith(prefix)}
    buffers = plan.config.family.buffers
    return {name: target.origin.read("cpu") if target.layer is None else made[name].float() for name, target in inside.items() if name not in buffers}


def notes(plan: Plan, folder: Path) -> dict[str, dict[str, float]]:
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
