"""Shared KV heads in families whose own classes have one for each query head. They are computed and cached once, and repeated where the class expects more."""
# H = query heads, G = KV heads, R = H/G, T = tokens, D = head width.

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effconvert.checkpoint.config import Config
from effconvert.families import CONVERTIBLE
from effconvert.modeling.transformers_internals import DynamicLayer, repeat_heads


class Grouped(DynamicLayer):  # type: ignore[misc]
    """A cache layer that stores one of every R heads; the others are copies of it."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.repeats = repeats

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add H heads of the new tokens, and return G heads of all tokens."""
        return super().update(key_states[:, :: self.repeats], value_states[:, :: self.repeats], *args, **kwargs)


def unique_heads(module: Any, query: Tensor, rows: Tensor) -> Tensor:
    """Return each KV head once, [B, G, T, D]. Without a cache the copies are removed; with one they already are."""
    return rows[:, :: getattr(module, "repeats", 1)] if rows.shape[1] == query.shape[1] else rows


def share(attention: Any, config: Config) -> None:
    """Make an attention module compute G KV heads, and repeat them where it expects H."""
    attention.repeats = config.heads // config.kv_heads
    repeat_heads(attention, attention.repeats)
    modules = {name.removeprefix(f"{config.attention}."): parts for name, parts in config.modules.items() if {"k", "v"} & {*parts}}
    counts = {name: [config.heads if part == "q" else config.kv_heads for part in parts] for name, parts in modules.items()}  # heads of each part
    for name, heads in counts.items():
        _narrow(attention.get_submodule(name), heads, config)
    _attach(counts, config, attention)
    attention.register_forward_pre_hook(partial(_attach, counts, config))


def _narrow(projection: Any, heads: list[int], config: Config) -> None:
    rows, transposed = sum(heads) * config.head_dim, config.family.transposed
    for name, tensor in list(projection.named_parameters()):
        setattr(projection, name, nn.Parameter(tensor.detach().narrow(-1 if transposed else 0, 0, rows).clone()))
    setattr(projection, "nf" if transposed else "out_features", rows)


def _attach(counts: dict[str, list[int]], config: Config, attention: nn.Module, *_: Any) -> None:
    """Hook `_repeat` to the modules that now compute the heads: PEFT wraps projections, and unwraps them again."""
    for name, heads in counts.items():
        outer = attention.get_submodule(name)
        if _repeat_hooks(outer):
            continue
        for inner in outer.modules():
            for key in _repeat_hooks(inner):
                del inner._forward_hooks[key]
        outer.register_forward_hook(partial(_repeat, heads, config))


def _repeat_hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_hooks.items() if getattr(hook, "func", None) is _repeat]


def _repeat(heads: list[int], config: Config, _: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Repeat heads in the output of a projection, to the family's layout with H heads of each part."""
    parts = out.unflatten(-1, (-1, config.head_dim)).split(heads, -2)
    parts = [rows.repeat_interleave(config.heads // rows.shape[-2], -2) for rows in parts]
    if len(parts) > 1 and CONVERTIBLE[config.kind].per_head:
        return torch.stack(parts, -2).flatten(-3)  # [..., H, 3, D]
    return torch.cat(parts, -2).flatten(-2)
