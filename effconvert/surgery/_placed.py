"""The techniques that a config.json names: built once from its records, and checked against the model."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from effconvert import discovery, surgery
from effconvert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import OWN, Replaced
from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.surgery._replacement import Replacement


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
    """Return the technique that a record of config.json names, with its options; the same object each time.

    Raises:
        ModelError: there is none, it does not run at that place, or it has no such options.
    """
    return _technique(record.technique, json.dumps(record.options, sort_keys=True), record.place)


@lru_cache(None)
def _technique(name: str, options: str, place: str) -> Replacement:
    statement = f"config.json says that {name} {options} replaces {place}"
    try:
        step = discovery.load(surgery, name)
    except KeyError:
        raise ModelError(f"{statement}, and there is no technique {name!r}; take the file that effconvert wrote, or a newer effconvert") from None
    if not issubclass(step, Replacement):
        raise ModelError(f"{statement}, and {name} replaces nothing; take the file that effconvert wrote")
    try:
        technique: Replacement = step(**json.loads(options))
    except OptionError as error:
        raise ModelError(f"{statement}, which makes no sense ({error}); take the file that effconvert wrote") from None
    return technique


def techniques_of(config: Config) -> Iterator[tuple[Replaced, Replacement]]:
    """Yield each record of a config with its technique."""
    for record in config.replaced:
        yield record, technique_of(record)


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
            raise ModelError(f"config.json says that {record.technique} is in layers of this {config.kind}: {error}") from None
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
        own_prefix = ".".join(filter(None, [config.place(record.place), OWN]))
        for index in record.layers:
            prefix, stored = f"{checkpoint.layer_prefix(index)}{own_prefix}", checkpoint.layers[index]
            present = {name.removeprefix(own_prefix): tensor.shape for name, tensor in stored.items() if name.startswith(own_prefix)}
            if missing := sorted(shapes.keys() - present.keys()):
                raise ModelError(f"{checkpoint.folder} has no {prefix}{missing[0]}, which {record.technique} needs; fetch the missing shard")
            if extra := sorted(present.keys() - shapes.keys()):
                raise ModelError(f"{checkpoint.folder} holds {prefix}{extra[0]}, for which {record.technique} has no place; fetch it again")
            for name, shape in shapes.items():
                if present[name] != tuple(shape):
                    actual, needed = (" x ".join(map(str, sizes)) for sizes in (present[name], shape))
                    raise ModelError(f"{prefix}{name} is {actual}, but config.json makes it {needed}; one is wrong")
