"""KV heads that query heads share, in families whose own classes have one for each: computed and kept once, and repeated for what expects more of them."""
# H = query heads, G = KV heads, R = H/G, T = tokens, D = head width.

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.families import FAMILIES
from effconvert.modeling.transformers_internals import DynamicLayer, repeat_heads


class Grouped(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache that keeps one of every R heads, of which the others are copies."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.repeats = repeats

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take H heads of the new tokens, and return G of all tokens."""
        return super().update(key_states[:, :: self.repeats], value_states[:, :: self.repeats], *args, **kwargs)


def each(module: Any, query: Tensor, rows: Tensor) -> Tensor:
    """Return each KV head once, [B, G, T, D]: with a cache that is what comes, without one the copies come too."""
    return rows[:, :: getattr(module, "repeats", 1)] if rows.shape[1] == query.shape[1] else rows


def share(attention: Any, config: Config) -> None:
    """Have an attention module compute G KV heads, and see them repeated where it expects H."""
    attention.repeats = config.heads // config.kv_heads
    repeat_heads(attention, attention.repeats)
    inside = {name.removeprefix(f"{config.attention}."): parts for name, parts in config.modules.items() if {"k", "v"} & {*parts}}
    made = {name: [config.heads if part == "q" else config.kv_heads for part in parts] for name, parts in inside.items()}  # heads of each part
    for name, heads in made.items():
        _narrow(attention.get_submodule(name), heads, config)
    _attach(made, config, attention)
    attention.register_forward_pre_hook(partial(_attach, made, config))


def _narrow(projection: Any, heads: list[int], config: Config) -> None:
    rows, turned = sum(heads) * config.head_dim, config.family.transposed
    for name, tensor in list(projection.named_parameters()):
        setattr(projection, name, nn.Parameter(tensor.detach().narrow(-1 if turned else 0, 0, rows).clone()))
    setattr(projection, "nf" if turned else "out_features", rows)


def _attach(made: dict[str, list[int]], config: Config, attention: nn.Module, *_: Any) -> None:
    """Have `_repeat` follow whatever makes the heads now: PEFT puts layers around projections, and takes them away again."""
    for name, heads in made.items():
        outer = attention.get_submodule(name)
        if _following(outer):
            continue
        for inner in outer.modules():
            for key in _following(inner):
                del inner._forward_hooks[key]
        outer.register_forward_hook(partial(_repeat, heads, config))


def _following(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_hooks.items() if getattr(hook, "func", None) is _repeat]


def _repeat(heads: list[int], config: Config, _: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Bring what a projection made into the layout of the family's own, with H heads of each part."""
    made = out.unflatten(-1, (-1, config.head_dim)).split(heads, -2)
    made = [rows.repeat_interleave(config.heads // rows.shape[-2], -2) for rows in made]
    if len(made) > 1 and FAMILIES[config.kind].per_head:
        return torch.stack(made, -2).flatten(-3)  # [..., H, 3, D]
    return torch.cat(made, -2).flatten(-2)
