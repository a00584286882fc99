"""Techniques inside modules of transformers' models: the module at a place keeps its name, and runs the technique."""
# B = batch, T = tokens, M = hidden width.

from collections.abc import Callable
from functools import lru_cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import OWN, Replaced
from effconvert.modeling.attending import Attending
from effconvert.modeling.packed import arrange
from effconvert.modeling.state import State
from effconvert.modeling.transformers_internals import cache_among
from effconvert.surgery._placed import technique_of
from effconvert.surgery._replacement import PlaceContext, Placed
from effconvert.surgery.mixing._call import Call

NAME = OWN.removesuffix(".")  # of the child module with a technique's parameters


class Own(nn.Module):
    """A technique's own parameters at a place of a layer, or outside the layers."""

    def __init__(self, technique: Placed, config: Config, index: int, place: str) -> None:
        super().__init__()
        self.technique: Any = technique
        self.config, self.index, self.place = config, index, place
        self.noted: tuple[Tensor | None, State | None] | None = None  # mask and state, from attention to an FFN that reads earlier tokens
        for name, shape in technique.parameters(config, place).items():
            if name in technique.whole_numbers:
                self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.freeze()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, and whole numbers."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def freeze(self) -> None:
        """Keep the parameters that are never trained from being trained; transformers forgets it when it loads weights."""
        for name in self.technique.frozen:
            if name in self._parameters:
                self.get_parameter(name).requires_grad_(False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set the parameters to the technique's initial values."""
        values = self.technique.initial_values(self.config, self.index, self.place)
        for name, tensor in self.weights.items():
            if name in values:
                tensor.copy_(values[name])


class SkippedModule(nn.Module):
    """In place of a skipped attention or FFN: adds zeros to the residual stream, and counts tokens for the cache."""

    def __init__(self, place: str, index: int) -> None:
        super().__init__()
        self.place, self.index = place, index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros in the format of the family's module."""
        hidden = args[0] if args else kwargs["hidden_states"]
        zeros = torch.zeros_like(hidden)
        if self.place != "attention":
            return zeros
        cache = cache_among((*args, *kwargs.values()))
        if cache is not None and self.index < len(cache.layers) and isinstance(state := cache.layers[self.index], State):
            state.update(hidden[:, None], hidden[:, None])
        elif cache is not None and self.index == 0:
            raise ValueError("this cache takes its length from layer 0, which has no attention; make one with effconvert.modeling.cache_for(model.config)")
        return zeros, None


def leave_out(layer: nn.Module, place: str, config: Config, index: int) -> None:
    """Remove the attention or the FFN from a layer, with its norms."""
    layer.set_submodule(config.place(place), SkippedModule(place, index))
    for part in config.sublayer(place):
        if part.endswith("_norm") and not config.parts[part].startswith(f"{config.place(place)}."):
            layer.set_submodule(config.parts[part], nn.Identity())


class Zeros(nn.Module):
    """In place of an FFN's output projection: gives zeros."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return zeros in the shape of the hidden states that come in, [B, T, M]: what stood before it passes them on."""
        return torch.zeros_like(hidden)


def leave_out_decoder_ffn(layers: nn.Module, config: Config) -> None:
    """Remove the FFN from each layer of the decoder behind an encoder."""
    for layer in layers.children():
        for path in config.decoder_lacks:
            layer.set_submodule(path, Zeros() if path == config.family.parts["down"] else nn.Identity())


def put(layer: nn.Module, record: Replaced, config: Config, index: int) -> None:
    """Put a technique into the module of its place, and remove the parts that it drops."""
    path = config.place(record.place)
    module: Any = layer.get_submodule(path)
    for part in record.drops:
        _drop(layer, path, config.parts.get(part, ""))
    own = Own(technique_of(record), config, index, record.place)
    setattr(module, NAME, own)
    if record.place == "ffn" and own.technique.shifts:
        attention: Any = layer.get_submodule(config.attention)  # which a layer runs first, also where it computes activations again for gradients
        attention.register_forward_pre_hook(partial(_note, own, tuple(signature(attention.forward).parameters)), with_kwargs=True)
    module.__class__ = _class_with_technique(type(module))  # type: ignore[arg-type]


def _note(own: Own, names: tuple[str, ...], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep for an FFN what its layer's attention is called with: the mask, and the layer's state in the cache."""
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    cache = cache_among(arguments.values())
    own.noted = arguments.get("attention_mask"), None if cache is None else cache.layers[own.index]


def _shifting(own: Own, hidden: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a technique that reads earlier tokens on an FFN's inputs [B, T, M]."""
    (mask, state), own.noted = own.noted or (None, None), None
    arranged = arrange(mask, hidden, own.config.decoder, state is None)
    hidden = arranged.rows(hidden)
    call = Call(hidden, hidden, hidden, 1.0, arranged.live, own.config.decoder, state, hidden, None, padded=mask is not None)
    return arranged.back(own.technique.forward(own.weights, hidden, PlaceContext(original, arranged.live, call=call)))


def _drop(layer: nn.Module, path: str, part: str) -> None:
    parent, _, name = part.rpartition(".")
    if part == path:  # a projection that is itself replaced
        layer.get_submodule(path).register_parameter("weight", None)  # its bias stays
    elif not part or not hasattr(layer.get_submodule(parent), name):
        return  # this model lacks the part
    elif path in ("", parent) or parent.startswith(f"{path}."):
        delattr(layer.get_submodule(parent), name)
    else:
        setattr(layer.get_submodule(parent), name, nn.Identity())


@lru_cache(None)
def _class_with_technique(family: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a family's module with a technique in it; arguments and outputs have the same format."""
    first_name, *names = (name for name in signature(family.forward).parameters if name != "self")  # hidden states, and further arguments

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs.pop(first_name)
        extra: tuple[Any, ...] | None = None  # further outputs of the family's module, if it returns a tuple

        def original(rows: Tensor) -> Tensor:
            nonlocal extra
            out = family.forward(self, rows, *args[1:], **kwargs)
            extra = out[1:] if isinstance(out, tuple) else None
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first

        own: Own = getattr(self, NAME)
        arguments = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        attention = Attending(self, own.config, own.index, arguments) if own.place == "attention" else None
        if own.place == "ffn" and own.technique.shifts:
            return _shifting(own, hidden, original)
        result: Tensor = own.technique.forward(own.weights, hidden, PlaceContext(original, _live(hidden, arguments), attention))
        if getattr(self, "weight", result) is None and self.bias is not None:  # a projection without its matrix
            result = result + self.bias
        if own.place == "attention":
            return result, None  # attention returns its weights as well; nothing uses them
        return result if extra is None else (result, *extra)

    return type(family.__name__, (family,), {"forward": forward, "__module__": family.__module__})


def _live(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return which tokens are not padding, [B, T]."""
    mask = arguments.get("attention_mask")
    if mask is None or mask.ndim != 4:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    diagonal = mask[:, 0].diagonal(0, -2, -1)  # padding may not even see itself
    live: Tensor = (diagonal if mask.dtype == torch.bool else diagonal == 0).expand(len(hidden), -1)
    return live
