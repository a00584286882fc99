"""Refuse steps that each fit the model but not the steps before or after them."""

from collections.abc import Sequence

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.layer import Model
from effconvert.errors import OptionError
from effconvert.surgery._surgery import Step


def check_reads_ahead(surgery: Step, surgeries: Sequence[Step], configs: Sequence[Config]) -> None:
    """Refuse a step that reads later layers, or the whole model, after one that is fitted layer by layer: those layers are not fitted by then.

    Raises:
        OptionError: it comes after such a step.
    """
    before = next((step for step, config in zip(surgeries, configs[:-1], strict=False) if step.needs_calibration(config)), None)
    if before and (surgery.reads_ahead(configs[-1]) or surgery.needs_survey(configs[-1])):
        raise OptionError(f"{surgery.name} reads layers that {before.name} has not fitted by then; convert twice, {before.name} first")


def check_shared_caches(surgeries: Sequence[Step], configs: Sequence[Config]) -> None:
    """Refuse a step that is fitted to layers which share a cache, before one that gives the model other layers or KV heads.

    While layers are fitted, they read the keys and values that the layers of the finished model compute.

    Raises:
        OptionError: there are two such steps.
    """
    last = configs[-1]
    for number, (surgery, before, after) in enumerate(zip(surgeries, configs, configs[1:], strict=False)):
        if after.readers and surgery.needs_calibration(before) and (after.layers, after.kv_heads) != (last.layers, last.kv_heads):
            later = next(
                step.name
                for step, config in zip(surgeries[number + 1 :], configs[number + 2 :], strict=True)
                if config.layers != after.layers or config.kv_heads != after.kv_heads
            )
            raise OptionError(f"{later} changes the layers or heads of a shared cache, to which {surgery.name} is fitted; put {later} before {surgery.name}")


def check_shared_parameters(surgery: Step, model: Model) -> None:
    """Refuse a step that would give different values to layers that share parameters.

    Raises:
        OptionError: it changes only some of these layers, or each by its own activations.
    """
    assigned = {layer.index: {part for part in layer.assigned if part.removesuffix(".bias") in model.config.parts} for layer in model.layers}
    for record in model.config.shared:
        members = [index for index in record.layers if index in assigned]
        parts = {index: {part for part in assigned[index] if record.has(part)} for index in members}
        changed = sorted(set().union(*parts.values()))
        if changed and (surgery.needs_calibration(model.config) or any(changes != parts[members[0]] for changes in parts.values())):
            raise OptionError(
                f"layers {', '.join(map(str, members))} share their {record.what}, and {surgery.name} would give each of them another {changed[0]}; "
                f"do {surgery.name} first and share afterwards, or take options that leave it alone"
            )
