"""What a config says, in words for people: shape, techniques, sharing."""

from collections.abc import Iterator, Sequence
from typing import Any

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import OUTSIDE, SKIPS, Replaced
from effconvert.options import as_typed
from effconvert.steps import arguments

PLACES = {"scores": "softmax attention"}  # name of a place, where people use another word


def shape(config: Config) -> str:
    """Return the layers and heads of a model in a few words."""
    if config.latent:
        numbers = f"{config.get('kv_lora_rank')} latents and a key of {config.get('qk_rope_head_dim')}"
        return f"{config.layers} layers, {config.heads} query heads, {numbers} that they share"
    attention = f"{config.heads} query and {config.kv_heads} KV heads of {config.head_dim}" if config.attention else "none of which attends"
    return f"{config.layers} layers, {attention}"


def differences(config: Config) -> Iterator[str]:
    """Yield a sentence on each technique, on what layers share, and on what they lack."""
    groups: dict[tuple[str, str], list[Replaced]] = {}
    for record in config.replaced:
        groups.setdefault((record.technique, record.place), []).append(record)
    for (name, place), records in groups.items():
        technique = " ".join(
            [name, *arguments(name, {key.replace("_", "-"): _range([record.options[key] for record in records]) for key in records[0].options})]
        )
        if place in OUTSIDE:
            tied = " and of the head, which is the same" if place == "embed" and config.tied and config.predicts else ""
            yield f"{technique} in place of the {'embedding' if place == 'embed' else place}{tied}"
            continue
        count = sum(len(record.layers) for record in records)
        yield f"{count} of {config.layers} layers have {technique} in place of {PLACES.get(place, place)}"
    for common in config.shared:
        what = {"layer": "all that they have", "cache": "keys and values"}.get(common.what, f"their {common.what}")
        yield f"layers {', '.join(map(str, common.layers))} share {what}"
    for word, place in SKIPS.items():
        if gone := sum(place in config.skips(index) for index in range(config.layers)):
            yield f"{gone} of {config.layers} layers have no {word}"
    if config.decoder_lacks:
        yield "no layer of the decoder has an mlp"


def _range(values: Sequence[Any]) -> Any:
    """Return the one value of several records, or all of them; of numbers the least and the greatest."""
    if all(value == values[0] for value in values):
        return values[0]
    return f"{min(values)}-{max(values)}" if all(type(value) is int for value in values) else " or ".join(dict.fromkeys(map(as_typed, values)))
