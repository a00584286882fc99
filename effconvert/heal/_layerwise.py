"""Run a model's layers one after the other, with the weights of one layer in memory; calibration and healing record activations here.

The family's own transformers class runs. It is built without weights, and each layer gets them just before it runs. Masks, positions and other
arguments of layers come from that class, so no family needs code here, and a model of any size fits a small machine (decision 10).
"""
# N = windows, B = windows run at a time, T = tokens, M = hidden width, H = query heads, Hk = KV heads, D = head width.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import OWN
from effconvert.heal._capture import PROBE, Capture, StopForwardError, record, register
from effconvert.modeling.loading import class_of
from effconvert.modeling.transformers_internals import compute_constant, names_at_run_time
from effconvert.quiet import quiet_transformers
from effconvert.surgery._placed import unchunked

OUTPUT_PARTS = {"scores": "o", "attention": "o", "ffn": "down"}  # place -> the part whose output is the place's output
Tensors = Mapping[str, Tensor]  # name in a layer -> tensor, as the family stores it


class LayerRunner:
    """A model of one shape without weights, and the arguments that it passes to its layers beside the hidden states."""

    def __init__(self, config: Config, outer: Tensors, ids: Sequence[Tensor], device: torch.device, head: bool = False) -> None:
        """Build the bare model, or with `head` the language model, which `predict` needs.

        A technique outside the layers does not run in it: `outer` has the rows of its table. Neither does one that runs a module in chunks: hooks inside see
        all tokens at once.
        """
        self.config, self.device = config, device
        self.whole = skeleton(unchunked(config.plain_outside), device, config.family.lm if head else config.family.base)
        self.model = self.whole.base_model
        self.layers: list[nn.Module] = [self.model.get_submodule(config.layer_path(index)) for index in range(config.layers)]
        self.ids = ids
        self._fill_outer(outer)
        if config.encoder_decoder:
            self._complete_encoder()
        self.calls: dict[torch.Size, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}  # texts and their tokens, [B, T] -> arguments of each layer
        self.wrap_output: Callable[[Tensor], Any] = lambda state: state  # what the family's layers return: a tensor or a tuple
        self.lent: dict[int, list[dict[str, Tensor]]] = {}  # layer whose keys and values others read -> these, for each batch: module -> its output

    def _fill_outer(self, outer: Tensors) -> None:
        """Load the weights outside the layers; those that no layer reads, such as a pooler's, may be missing."""
        outside = {name: parameter for name, parameter in self.model.named_parameters() if not name.startswith(f"{self.config.family.layers}.")}
        fill(self.model, self._named(outer, outside, partial=True))

    def _complete_encoder(self) -> None:
        """Tie the encoder's embedding, and compute constants that its class holds as parameters (marian's sines)."""
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and self.config.family.is_buffer(name):
                compute_constant(self.model, self.model.get_submodule(name.rpartition(".")[0]), self.device)
        if self.config.tied:
            self.model.tie_weights()

    def _run_time_tensors(self, index: int, tensors: Tensors) -> dict[str, Tensor]:
        """Rename the tensors of a layer to its module's names: name in the layer -> tensor."""
        prefix = f"{self.config.layer_path(index)}."
        own = [(name, buffer) for name, buffer in self.layers[index].named_buffers() if OWN in name]
        expected = {prefix + name: tensor for name, tensor in [*self.layers[index].named_parameters(), *own]}
        parameters = self._named({prefix + name: tensor for name, tensor in tensors.items()}, expected)
        return {name.removeprefix(prefix): tensor for name, tensor in parameters.items()}

    def _named(self, tensors: Tensors, expected: Tensors, partial: bool = False) -> dict[str, Tensor]:
        return names_at_run_time(tensors, self.config.family.base, self.config.kind, expected, partial)

    @property
    def arguments(self) -> dict[str, Any]:
        """The bare model's arguments beside token ids."""
        return {"use_cache": False} if self.config.decoder else {}

    def begin(self) -> list[Tensor]:
        """Return the inputs of the first layer, [B, T, M] for each batch."""
        states: list[Tensor] = []

        def note(state: Tensor, *_: Any, **__: Any) -> None:
            states.append(state)
            raise StopForwardError

        with _replace_forward(self.layers[:1], [note]):
            for batch in self.ids:
                self._run_until_stopped(batch)
        return states

    def call(self, index: int, state: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a layer beside `state`, [B, T, M]; they are recorded at first, without running a layer or needing its weights."""
        shape = state.shape[:2]
        if shape not in self.calls:
            self.calls[shape] = self._record_calls(*shape)
        return self.calls[shape][index]

    def _record_calls(self, texts: int, tokens: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        batch = next(batch for batch in self.ids if batch.shape[1] == tokens and len(batch) >= texts)
        for self.wrap_output in (lambda state: state, lambda state: (state,)):
            if calls := self._layer_calls(batch[:texts]):
                break
        return calls

    def _layer_calls(self, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the arguments of each layer, if layers return their input by way of `wrap_output`; empty where the family needs the other form."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        shapes: set[torch.Size] = set()

        def note(state: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            shapes.add(state.shape)
            if len(calls) == len(self.layers) or len(shapes) > 1:
                raise StopForwardError
            return self.wrap_output(state)

        with _replace_forward(self.layers, [note] * len(self.layers)):
            self._run_until_stopped(batch)
        return calls if len(shapes) == 1 else []

    def run(self, index: int, tensors: Tensors, states: Sequence[Tensor], parts: Sequence[str] = (), until: str = "") -> Iterator[Capture]:
        """Run layer `index` with the weights `tensors` on each batch; yield the activations of the modules of `parts` (or places) and of attention.

        With `until` the layer stops after the module of that part or place.
        """
        module, tensors = self.layers[index], self._run_time_tensors(index, tensors)
        try:
            for batch, state in enumerate(states):
                args, kwargs = self.call(index, state)
                capture = Capture(state)
                self._borrow(index, batch)
                fill(module, tensors)  # for each batch: between batches the caller may run the same layer with other weights
                with record(module, {part: self._module(module, part) for part in parts}, capture, until):
                    out = module(state, *args, **kwargs)
                    capture.out = out[0] if isinstance(out, tuple) else out
                yield capture
        finally:
            empty(module)

    def place_output(self, index: int, tensors: Tensors, states: Sequence[Tensor], batch: int, place: str) -> Tensor:
        """Run layer `index` on one batch up to a place, and return the output there, with gradients for `tensors`."""
        state = states[batch]
        module, (args, kwargs) = self.layers[index], self.call(index, state)
        self._borrow(index, batch)
        capture = Capture(state)
        with record(module, {place: self._module(module, place)}, capture, place):
            functional_call(module, self._run_time_tensors(index, tensors), (state, *args), kwargs)
        return capture.outputs[place]

    def keep_lent(self, index: int) -> None:
        """Keep the keys and values that layer `index` has just computed for a batch, if later layers read them."""
        outputs = getattr(self.layers[index].get_submodule(self.config.attention), "lent_outputs", None) if self.config.attention else None
        if outputs:
            self.lent.setdefault(index, []).append(dict(outputs))

    def _borrow(self, index: int, batch: int) -> None:
        """Give a layer that reads an earlier one's keys and values those of this batch."""
        if (lender := self.config.cache_of(index)) != index:
            attention: Any = self.layers[lender].get_submodule(self.config.attention)
            attention.lent_outputs.update(self.lent[lender][batch])

    def _module(self, layer: nn.Module, name: str) -> str:
        """Return the module of a part, or the module whose output is that of a place: its last projection, or if that is gone the place itself."""
        path = self.config.parts.get(OUTPUT_PARTS.get(name, name))
        present = path is not None and (name not in OUTPUT_PARTS or any(path == module for module, _ in layer.named_modules()))
        return path if path is not None and present else self.config.place(name)

    def predict(self, state: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits [B, T, C] for the last layer's output `state`, of the tokens whose rows of the head are `weights` [C, M]."""
        head = self.whole.get_output_embeddings()
        head._parameters["weight"] = nn.Parameter(weights, requires_grad=False)
        if bias is not None:
            head._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        logits: Tensor = self._run_behind_layers(state).logits
        return logits

    def head_input(self, state: Tensor) -> Tensor:
        """Return what the head gets, [B, T, M], for the last layer's output `state`."""
        inputs: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            raise StopForwardError

        handle = self.whole.get_output_embeddings().register_forward_pre_hook(note)
        try:
            with suppress(StopForwardError):
                self._run_behind_layers(state)
        finally:
            handle.remove()
        return inputs[0]

    def _run_behind_layers(self, state: Tensor) -> Any:
        with _replace_forward(self.layers, [lambda *_, **__: self.wrap_output(state)] * len(self.layers)):
            return self.whole(input_ids=self.ids[0][:1, : state.shape[1]].expand(len(state), -1), **self.arguments)

    def _run_until_stopped(self, batch: Tensor) -> None:
        try:
            self.model(input_ids=batch, **self.arguments)
        except StopForwardError:
            return


def skeleton(config: Config, device: torch.device, architecture: str) -> Any:
    """Build a model of `config` of the class `architecture`, with buffers and without weights."""
    from accelerate import init_empty_weights

    from effconvert.modeling.transformers_internals import attend_by, no_init_weights

    register()
    config = config.alone
    with quiet_transformers(), init_empty_weights(include_buffers=False), no_init_weights(), torch.device(device):
        model_class = class_of(replace(config, raw={**config.raw, "architectures": [architecture]}))
        model = model_class(model_class.config_class.from_dict(config.content)).eval()
    if not config.family.own_attention:  # which has no function to record, and stays as it runs by default: falcon's eager one adds ALiBi twice
        attend_by(model.config, PROBE)
    return model


def device() -> torch.device:
    """Return the device that runs models: this machine's accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def fill(module: nn.Module, tensors: Tensors) -> None:
    """Load a module's weights."""
    module.load_state_dict(dict(tensors), strict=False, assign=True)


def empty(module: nn.Module) -> None:
    """Free a module's weights; buffers stay."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                inner._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


@contextmanager
def _replace_forward(modules: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Call functions in place of modules."""
    for module, function in zip(modules, functions, strict=True):
        module.__dict__["forward"] = function
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)  # a module that runs in place of several layers is in the list as often
