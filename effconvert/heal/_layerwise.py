"""Run a model's layers one after the other, with the weights of one in memory: what calibration looks at, and what refits solve for.

The family's own class of transformers runs, built without weights; a layer gets them just before its turn. Masks, positions and whatever else a
family hands its layers are its own, and no family needs code here. So a model of any size is looked at on a small machine (decision 10).
"""
# N = windows, B = windows run at a time, T = tokens, M = hidden width, H = query heads, Hk = KV heads, D = head width.

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Layer
from effconvert.checkpoint.outer import Outer
from effconvert.checkpoint.parts import Deferred
from effconvert.checkpoint.shards import FLOATS, Stored, finite
from effconvert.errors import ModelError
from effconvert.modeling.attention import attend
from effconvert.modeling.loading import class_of
from effconvert.modeling.transformers_internals import names_at_run_time
from effconvert.quiet import quiet_transformers

PROBE = "effconvert_probe"  # the name of our attention function in transformers' registry
GIVES = {"scores": "o", "attention": "o", "ffn": "down"}  # the part whose module gives what a place gives
Tensors = Mapping[str, Tensor]  # name in a layer -> tensor, as the family stores it


@dataclass
class Capture:
    """What one batch of windows was inside a layer."""

    state: Tensor  # what arrived, [B, T, M]
    out: Tensor = field(default_factory=lambda: torch.empty(0))  # what the layer made of it, [B, T, M]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # part -> what its module read, [B, T, ...]
    outputs: dict[str, Tensor] = field(default_factory=dict)  # part -> what its module made of it
    query: Tensor | None = None  # after RoPE and norms, [B, H, T, D]
    key: Tensor | None = None  # likewise, [B, Hk, T, D]
    scaling: float | None = None  # of their scores
    weights: Tensor | None = None  # of attention, [B, H, T, T]


class _EnoughError(Exception):
    """Every layer was reached; what comes after them is not run."""


class LayerRunner:
    """A model of one shape without weights, and what it hands to its layers beside the hidden states."""

    def __init__(self, config: Config, outer: Tensors, ids: Sequence[Tensor], device: torch.device, head: bool = False) -> None:
        """Build it: the bare model, or for `predict` the one with a language model's head."""
        self.config = config
        self.whole = skeleton(config, device, config.family.lm if head else config.family.base)
        self.model = self.whole.base_model
        self.layers: list[nn.Module] = list(self.model.get_submodule(config.family.layers))
        self.ids = ids
        self._fill_outer(outer)
        self.calls: dict[torch.Size, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # texts and their tokens, [B, T] -> what each layer is called with
        self.answer: Callable[[Tensor], Any] = lambda state: state  # how the family's layers answer

    def _fill_outer(self, outer: Tensors) -> None:
        """Give what is outside the layers its weights; what no layer reads, such as a pooler, may be missing."""
        outside = {name: parameter for name, parameter in self.model.named_parameters() if not name.startswith(f"{self.config.family.layers}.")}
        fill(self.model, self._named(outer, outside, partial=True))

    def _inside(self, index: int, tensors: Tensors) -> dict[str, Tensor]:
        """Return the tensors of a layer as its module calls them: name in the layer -> tensor."""
        at = f"{self.config.family.layers}.{index}."
        expected = {at + name: parameter for name, parameter in self.layers[index].named_parameters()}
        named = self._named({at + name: tensor for name, tensor in tensors.items()}, expected)
        return {name.removeprefix(at): tensor for name, tensor in named.items()}

    def _named(self, tensors: Tensors, expected: Tensors, partial: bool = False) -> dict[str, Tensor]:
        return names_at_run_time(tensors, self.config.family.base, self.config.kind, expected, partial)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the bare model is called with beside token ids."""
        return {"use_cache": False} if self.config.family.decoder else {}

    def begin(self) -> list[Tensor]:
        """Return what arrives at the first layer, [B, T, M] for each batch."""
        arrived: list[Tensor] = []

        def note(state: Tensor, *_: Any, **__: Any) -> None:
            arrived.append(state)
            raise _EnoughError

        with _instead(self.layers[:1], [note]):
            for batch in self.ids:
                self._until_enough(batch)
        return arrived

    def call(self, index: int, state: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a layer is called with beside `state`, [B, T, M]; first of all no layer is run to know it, and none needs weights."""
        shape = state.shape[:2]
        if shape not in self.calls:
            self.calls[shape] = self._learnt(*shape)
        return self.calls[shape][index]

    def _learnt(self, texts: int, tokens: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        batch = next(batch for batch in self.ids if batch.shape[1] == tokens and len(batch) >= texts)
        for self.answer in (lambda state: state, lambda state: (state,)):
            if found := self._passed_through(batch[:texts]):
                break
        return found

    def _passed_through(self, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return what layers are called with if they give back what they get in the form of `answer`; nothing where the family's answer in another one."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        shapes: set[torch.Size] = set()

        def note(state: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            shapes.add(state.shape)
            if len(calls) == len(self.layers) or len(shapes) > 1:
                raise _EnoughError
            return self.answer(state)

        with _instead(self.layers, [note] * len(self.layers)):
            self._until_enough(batch)
        return calls if len(shapes) == 1 else []

    def run(self, index: int, tensors: Tensors, states: Sequence[Tensor], parts: Sequence[str] = (), until: str = "") -> Iterator[Capture]:
        """Run layer `index` with the weights `tensors` on each batch, and yield what was seen of the modules of `parts` and places, and of attention.

        With `until` it is run up to the module of that part or place, and no further.
        """
        module, tensors = self.layers[index], self._inside(index, tensors)
        try:
            for state in states:
                args, kwargs = self.call(index, state)
                look = Capture(state)
                fill(module, tensors)  # each time: meanwhile somebody may have run the same layer with other weights
                with _watching(module, {part: self._module(module, part) for part in parts}, look, until):
                    out = module(state, *args, **kwargs)
                    look.out = out[0] if isinstance(out, tuple) else out
                yield look
        finally:
            empty(module)

    def given(self, index: int, tensors: Tensors, state: Tensor, place: str) -> Tensor:
        """Run layer `index` on one batch as far as a place, and return what is given there, with gradients for `tensors`."""
        module, (args, kwargs) = self.layers[index], self.call(index, state)
        look = Capture(state)
        with _watching(module, {place: self._module(module, place)}, look, place):
            functional_call(module, self._inside(index, tensors), (state, *args), kwargs)
        return look.outputs[place]

    def _module(self, layer: nn.Module, name: str) -> str:
        """Return the module of a part, or the one that gives what a place gives: the projection at its end, or where that is gone what stands there."""
        path = self.config.parts.get(GIVES.get(name, name))
        there = path is not None and (name not in GIVES or any(path == other for other, _ in layer.named_modules()))
        return path if path is not None and there else self.config.place(name)

    def predict(self, state: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits [B, T, C] of the tokens whose rows of the head are `weights` [C, M], where the last layer makes `state`."""
        head = self.whole.get_output_embeddings()
        head._parameters["weight"] = nn.Parameter(weights, requires_grad=False)
        if bias is not None:
            head._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        with _instead(self.layers, [lambda *_, **__: self.answer(state)] * len(self.layers)):
            logits: Tensor = self.whole(input_ids=self.ids[0][:1, : state.shape[1]].expand(len(state), -1), **self.arguments).logits
        return logits

    def _until_enough(self, batch: Tensor) -> None:
        try:
            self.model(input_ids=batch, **self.arguments)
        except _EnoughError:
            return


def skeleton(config: Config, device: torch.device, architecture: str) -> Any:
    """Build the model of `config` that is of this class, without weights: its buffers alone hold numbers."""
    from accelerate import init_empty_weights

    from effconvert.modeling.transformers_internals import attend_by

    _register()
    with quiet_transformers(), init_empty_weights(include_buffers=False), torch.device(device):
        made = class_of(replace(config, raw={**config.raw, "architectures": [architecture]}))
        model = made(made.config_class.from_dict(config.content)).eval()
    attend_by(model.config, PROBE)
    return model


def device() -> torch.device:
    """Return where models are run: this machine's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def inside(outer: Outer, ids: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what lies outside the layers and inside the bare model, in its names there; of the embedding the rows of `ids`."""
    used = torch.cat([batch.flatten() for batch in ids]).cpu()
    found: dict[str, Tensor] = {}
    for part, name, origin, value in outer.bare():
        if value is None:
            value = embedding_rows(origin, used) if part == "embed" else origin.read("cpu")
        numbers = value.compute() if isinstance(value, Deferred) else value
        found[name] = numbers.to(ids[0].device)
    return found


def silenced(layer: Layer, place: str) -> Layer:
    """Return a layer whose attention or ffn adds nothing: what it writes with is zero."""
    made = layer.on_top(layer.index, layer.config)
    for part in layer.config.sublayer(place):
        for name in (part, f"{part}.bias") if part == "o" or part.endswith("down") else ():
            if name in layer:
                made[name] = torch.zeros_like(layer[name])
    return made


def check_finite(tensors: Sequence[Tensor], where: str) -> None:
    """Refuse what no statistics can be made of, before linear algebra fails on it."""
    if not all(map(finite, tensors)):
        raise ModelError(f"{where} computes NaN or infinity on the calibration text; give another --calibrate, or ask the model's author")


def fill(module: nn.Module, tensors: Tensors) -> None:
    """Give a module its weights."""
    module.load_state_dict(dict(tensors), strict=False, assign=True)


def empty(module: nn.Module) -> None:
    """Take them away again; buffers stay."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                inner._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def stored_tensors(layer: Layer, stored: bool = False) -> dict[str, tuple[Stored, Tensor, bool]]:
    """Return a layer as it will lie on disk: name in the layer -> where it comes from, the numbers rounded to what is stored there, whether they are new.

    Args:
        stored: leave out what an earlier layer stores for this one.
    """
    made: dict[str, tuple[Stored, Tensor, bool]] = {}
    for name, origin, tensor in layer.tensors(stored):
        if name in layer.config.family.buffers:
            continue
        numbers = tensor.compute() if isinstance(tensor, Deferred) else tensor
        rounded = origin.read("cpu") if numbers is None else numbers.to(FLOATS[origin.dtype]).float()
        made[name] = (origin, rounded, numbers is not None)
    return made


def return_memory() -> None:
    """Have glibc give back what was freed: of a layer's many blocks it keeps some hundred megabytes otherwise, and as many again of the next."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries do so by themselves
        ctypes.CDLL(None).malloc_trim(0)


def embedding_rows(stored: Stored, ids: Tensor) -> Tensor:
    """Return an embedding table [V, M] that has only the rows of `ids`: of the others no memory is touched."""
    table, used = torch.from_numpy(numpy.zeros(stored.shape, numpy.float32)), ids.unique()  # torch.zeros would write every page
    table[used] = stored.mapped()[used].float()
    return table


@contextmanager
def _instead(modules: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Have functions called in place of modules."""
    for module, function in zip(modules, functions, strict=True):
        module.__dict__["forward"] = function
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


@contextmanager
def _watching(module: nn.Module, parts: Mapping[str, str], look: Capture, until: str) -> Iterator[None]:
    """Note in `look` what goes in and out of submodules (part -> name), and what attention does; go on after the submodule of part `until`."""

    def note(part: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            look.inputs[part], look.outputs[part] = args[0], out[0] if isinstance(out, tuple) else out
            if part == until:
                raise _EnoughError

        return hook

    handles = [module.get_submodule(name).register_forward_hook(note(part)) for part, name in parts.items()]
    _LOOKS.append(look)
    try:
        yield
    except _EnoughError:
        return
    finally:
        _LOOKS.pop()
        for handle in handles:
            handle.remove()


_LOOKS: list[Capture] = []


def _probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """Attend as the family's own eager implementation does, and note the queries, the keys, their scaling and the weights."""
    if "mixing" in kwargs:
        out, weights = attend(module, query, key, value, attention_mask, **kwargs)
    else:
        from effconvert.modeling.transformers_internals import eager

        out, weights = eager(module)(module, query, key, value, attention_mask, **kwargs)
    if _LOOKS:
        look, scaling = _LOOKS[-1], kwargs.get("scaling")
        look.query, look.key, look.weights = query, key[:, :: getattr(module, "repeats", 1)], weights
        look.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return out, weights


def _register() -> None:
    from effconvert.modeling.transformers_internals import AttentionInterface, AttentionMaskInterface, eager_mask

    AttentionInterface.register(PROBE, _probe)
    AttentionMaskInterface.register(PROBE, eager_mask)
