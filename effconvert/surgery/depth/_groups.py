"""Sort layers into groups that share their parameters, and refuse layers that cannot."""

from collections.abc import Iterable, Mapping, Sequence

from effconvert.checkpoint.config import Config
from effconvert.errors import ModelError, OptionError

SHARED = ("attention", "ffn")  # what layers share: each keeps its norms


def groups_of(layers: Iterable[int], count: int, pattern: str) -> list[tuple[int, ...]]:
    """Return `count` groups of layers: contiguous ones of about one size, or cyclic, in which every `count`-th layer is."""
    ordered = sorted(layers)
    number = {layer: place % count if pattern == "cyclic" else place * count // len(ordered) for place, layer in enumerate(ordered)}
    return [tuple(layer for layer in ordered if number[layer] == group) for group in range(count)]


def check_model(config: Config) -> None:
    """Refuse families whose layers cannot share their parameters.

    Raises:
        ModelError: this is one.
    """
    config.check_alone()
    if config.experts:
        raise ModelError(f"{config.kind} has experts, and there is no fit of one layer's experts to those of several; take a model without")
    if not config.attention:
        raise ModelError(f"{config.kind} does not attend, and only layers with attention and an FFN share parameters here")
    if config.readers:
        raise ModelError(f"layers of this {config.kind} share a cache already, and whole layers cannot share parameters with that; begin from the original")


def check_groups(config: Config, groups: Sequence[Sequence[int]]) -> None:
    """Refuse layers that another one cannot stand for.

    Raises:
        OptionError: two layers of a group differ, or a layer has a technique in it.
    """
    layers = range(config.layers)
    kinds = [kind for run, times in config.get(config.family.kinds_key) or () for kind in run * times] if config.family.kinds_key else [""] * config.layers
    alike: Mapping[str, Sequence[object]] = {"window": config.windows(), "RoPE": [config.rotary_of(layer) for layer in layers], "kind of attention": kinds}
    for group in groups:
        for layer in group if len(group) > 1 else ():
            if skipped := sorted(config.skips(layer)):
                raise OptionError(f"layer {layer} has no {skipped[0]}, so it is not like others; leave it out of --layers")
            if technique := next(iter(config.replaced_in(layer)), None):
                raise OptionError(f"layer {layer} has {technique.technique} in place of its {technique.place}; leave it out of --layers")
            if unlike := next((what for what, values in alike.items() if values[layer] != values[group[0]]), ""):
                raise OptionError(
                    f"layers {group[0]} and {layer} would share their parameters, and differ in their {unlike}; "
                    "take another --pattern or --groups, or name layers that are alike in --layers"
                )


def with_shared(config: Config, groups: Sequence[Sequence[int]]) -> Config:
    """Return the config of a model whose layers share parameters in these groups; a group of one layer stays as it is."""
    for group in groups:
        for what in SHARED if len(group) > 1 else ():
            config = config.with_shared(what, group)
    return config
