"""Record what one layer computes: the inputs and outputs of its modules, and its attention, through a function in transformers' registry."""
# B = windows run at a time, T = tokens, M = hidden width, H = query heads, Hk = KV heads, D = head width.

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effconvert.modeling.attention import attend
from effconvert.modeling.transformers_internals import attends, attention_inputs, rotary
from effconvert.surgery.mixing._call import Rotation

PROBE = "effconvert_probe"  # the name of our attention function in transformers' registry


@dataclass
class Capture:
    """The activations of one batch of windows in a layer."""

    state: Tensor  # the layer's input, [B, T, M]
    out: Tensor = field(default_factory=lambda: torch.empty(0))  # its output, [B, T, M]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # part -> input of its module, [B, T, ...]
    outputs: dict[str, Tensor] = field(default_factory=dict)  # part -> output of its module
    query: Tensor | None = None  # after RoPE and norms, [B, H, T, D]
    key: Tensor | None = None  # likewise, [B, Hk, T, D]
    scaling: float | None = None  # of their scores
    weights: Tensor | None = None  # of attention, [B, H, T, T]
    rotation: Rotation | None = None  # the RoPE that the layer is called with, though some layers do not apply it


class StopForwardError(Exception):
    """Stops a forward pass once all that is needed was recorded."""


@contextmanager
def record(module: nn.Module, parts: Mapping[str, str], capture: Capture, until: str) -> Iterator[None]:
    """Record in `capture` the inputs and outputs of submodules (part -> name) and of attention; stop the forward pass after the submodule of part `until`."""

    def recorder(part: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Any) -> None:
            capture.inputs[part], capture.outputs[part] = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
            if part == until:
                raise StopForwardError

        return hook

    def note_rotation(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        angles = attention_inputs(args, kwargs)[1]
        capture.rotation = None if angles is None else Rotation(rotary(attention), angles)

    handles = [module.get_submodule(name).register_forward_hook(recorder(part), with_kwargs=True) for part, name in parts.items()]
    handles += [inner.register_forward_pre_hook(note_rotation, with_kwargs=True) for inner in module.modules() if attends(inner)]
    _CAPTURES.append(capture)
    try:
        yield
    except StopForwardError:
        return
    finally:
        _CAPTURES.pop()
        for handle in handles:
            handle.remove()


_CAPTURES: list[Capture] = []


def _probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """Attend as the family's own eager implementation does, and record queries, keys, scaling and weights."""
    if "mixing" in kwargs:
        out, weights = attend(module, query, key, value, attention_mask, **kwargs)
    else:
        from effconvert.modeling.transformers_internals import eager

        out, weights = eager(module)(module, query, key, value, attention_mask, **kwargs)
    if _CAPTURES:
        capture, scaling = _CAPTURES[-1], kwargs.get("scaling")
        capture.query, capture.key, capture.weights = query, key[:, :: getattr(module, "repeats", 1)], weights
        capture.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return out, weights


def register() -> None:
    """Put our attention function into transformers' registry."""
    from effconvert.modeling.transformers_internals import AttentionInterface, AttentionMaskInterface, eager_mask

    AttentionInterface.register(PROBE, _probe)
    AttentionMaskInterface.register(PROBE, eager_mask)
