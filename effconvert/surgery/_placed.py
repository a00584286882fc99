"""The techniques that a config.json names: built once from its records, and checked against the model."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

from effconvert import discovery, surgery
from effconvert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.outer import Outer
from effconvert.checkpoint.replaced import OUTSIDE, OWN, Replaced
from effconvert.checkpoint.shards import NUMBERS, StoredTensor
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.surgery._replacement import OuterReplacement, Placed, Replacement


def open_checked(folder: Path) -> Checkpoint:
    """Open a model folder, and check the tensors of its techniques: see `open_checkpoint`.

    Raises:
        OptionError: there is no such folder, or no model in it.
        ModelError: the model is damaged, contradicts its config, or is of a kind that cannot be operated on.
    """
    checkpoint = open_checkpoint(folder)
    check_replaced(checkpoint.config)
    check_tensors(checkpoint)
    return checkpoint


def technique_of(record: Replaced) -> Replacement:
    """Return the technique in layers that a record of config.json names, with its options; the same object each time.

    Raises:
        ModelError: there is none, it does not run at that place, or it has no such options.
    """
    technique: Replacement = _technique(record.technique, json.dumps(record.options, sort_keys=True), record.place, Replacement)
    return technique


def outer_technique_of(record: Replaced) -> OuterReplacement:
    """Return the technique outside the layers that a record names: see `technique_of`."""
    technique: OuterReplacement = _technique(record.technique, json.dumps(record.options, sort_keys=True), record.place, OuterReplacement)
    return technique


Kind = TypeVar("Kind", bound=Placed)


@lru_cache(None)
def _technique(name: str, options: str, place: str, kind: type[Kind]) -> Kind:
    statement = f"config.json says that {name} {options} replaces {place}"
    try:
        step = discovery.load(surgery, name)
    except KeyError:
        raise ModelError(f"{statement}, and there is no technique {name!r}; take the file that effconvert wrote, or a newer effconvert") from None
    if not issubclass(step, kind):
        raise ModelError(f"{statement}, and {name} replaces nothing there; take the file that effconvert wrote")
    try:
        technique: Kind = step.recorded(json.loads(options))
    except OptionError as error:
        raise ModelError(f"{statement}, which makes no sense ({error}); take the file that effconvert wrote") from None
    return technique


def techniques_of(config: Config) -> Iterator[tuple[Replaced, Placed]]:
    """Yield each record of a config with its technique."""
    for record in config.replaced:
        yield record, outer_technique_of(record) if record.place in OUTSIDE else technique_of(record)


def unchunked(config: Config) -> Config:
    """Return a config without the techniques that run a module some tokens at a time: who looks inside such a module would see one chunk of them."""
    return replace(config, replaced=tuple(record for record in config.replaced if record.place in OUTSIDE or not technique_of(record).chunks))


def table_rows(outer: Outer, place: str, tokens: torch.Tensor) -> torch.Tensor:
    """Return the rows [N, M] of the embedding (`embed`) or of the head for some tokens, in float32; of a technique in its place, what it computes."""
    part = outer.table(place)
    record = outer.config.replaced_outside(place)
    if not record:
        return outer.rows(part, tokens)

    def read(name: str, numbers: torch.Tensor | None) -> torch.Tensor:
        own = f"{part}.{OWN}{name}"
        return outer.rows(own, torch.arange(outer.shape(own)[0]) if numbers is None else numbers)

    return outer_technique_of(record).lookup(outer.config, place, read, tokens)


def check_replaced(config: Config) -> None:
    """Refuse techniques that cannot be in such a model: somebody may have edited config.json.

    Raises:
        ModelError: the reason.
    """
    plain = replace(config, replaced=(), shared=(), raw={key: value for key, value in config.raw.items() if key != "per_layer_config"})
    for record, technique in techniques_of(config):
        try:
            technique.check_family(plain)
            technique.check(plain)
            fits = record.place in technique.places(plain) and record.drops == technique.dropped(plain, record.place)
        except EffconvertError as error:
            raise ModelError(f"config.json says that {record.technique} is in {'layers of ' if record.layers else ''}this {config.kind}: {error}") from None
        if not fits:
            raise ModelError(
                f"config.json says that {record.technique} replaces {record.place}, and it runs at {', '.join(technique.places(plain))}; "
                "take the file that effconvert wrote"
            )


def check_tensors(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint in which a technique's own tensors are wrong.

    Raises:
        ModelError: one is missing, left over or of another shape; it is named.
    """
    config = checkpoint.config
    for record, technique in techniques_of(config):
        shapes = technique.parameters(config, record.place)
        own_prefix = OWN if record.place in OUTSIDE else ".".join(filter(None, [config.place(record.place), OWN]))
        places: list[tuple[str, Mapping[str, StoredTensor]]] = [(checkpoint.layer_prefix(index), checkpoint.layers[index]) for index in record.layers]
        if record.place in OUTSIDE:
            outer = checkpoint.model("meta").outer
            module = outer.place(outer.table(record.place) or record.place).removesuffix("weight")
            places = [(module, {name.removeprefix(module): tensor for name, tensor in checkpoint.outer.items() if name.startswith(f"{module}{OWN}")})]
        for above, stored in places:
            prefix = f"{above}{own_prefix}"
            present = {name.removeprefix(own_prefix): tensor for name, tensor in stored.items() if name.startswith(own_prefix)}
            if missing := sorted(shapes.keys() - present.keys()):
                raise ModelError(f"{checkpoint.folder} has no {prefix}{missing[0]}, which {record.technique} needs; fetch the missing shard")
            if extra := sorted(present.keys() - shapes.keys()):
                raise ModelError(f"{checkpoint.folder} holds {prefix}{extra[0]}, for which {record.technique} has no place; fetch it again")
            for name, shape in shapes.items():
                if present[name].shape != tuple(shape):
                    actual, needed = (" x ".join(map(str, sizes)) for sizes in (present[name].shape, shape))
                    raise ModelError(f"{prefix}{name} is {actual}, but config.json makes it {needed}; one is wrong")
                if (present[name].dtype == "I64") != (name in technique.whole_numbers) or present[name].dtype not in NUMBERS:
                    raise ModelError(f"{prefix}{name} is stored as {present[name].dtype}; take the file that effconvert wrote")
