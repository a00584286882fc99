"""The angles of RoPE that config.json gives, and rewritten for a class in which each pair has its own."""
# P = pairs of a head's numbers.

import math
from collections.abc import Mapping, Sequence
from typing import Any

from effconvert.checkpoint.config import Config
from effconvert.errors import ModelError


def rope_of(config: Config) -> Mapping[str, Any]:
    """Return what config.json says of RoPE, in transformers' present words."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


def frequencies(config: Config) -> list[float]:
    """Return by how much each pair of a head turns from one token to the next, in radians, [P].

    Raises:
        ModelError: that depends on the length of the text, or scales queries and keys too.
    """
    rope = rope_of(config)
    plain = [float(rope["rope_theta"]) ** (-2 * pair / config.rotary) for pair in range(config.rotary // 2)]
    if rope["rope_type"] == "default":
        return plain
    if rope["rope_type"] == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    if rope["rope_type"] == "llama3":
        return [_llama3(frequency, rope) for frequency in plain]
    raise ModelError(
        f"RoPE of this {config.kind} is of the type {rope['rope_type']}, which changes with the length of the text or scales its numbers, and deepseek_v3 "
        "gets fixed angles (default, linear, llama3); narrow-kv takes it, in a class of effconvert"
    )


def said_anew(config: Config, counts: Sequence[int]) -> dict[str, Any]:
    """Return RoPE's entry in config.json for a key with so many pairs of each frequency, [P], the frequencies in order.

    One pair of each is plain RoPE. Else transformers has longrope: each pair has a number that its frequency is divided by. With a base of 1 that number
    is one over the frequency, so nothing is rounded twice.
    """
    rope = rope_of(config)
    if rope["rope_type"] == "default" and all(count == 1 for count in counts):
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    divisors = [1 / frequency for frequency, count in zip(frequencies(config), counts, strict=True) for _ in range(count)]
    same = {"rope_type": "longrope", "rope_theta": 1.0, "short_factor": divisors, "long_factor": divisors}
    return {**same, "attention_factor": 1.0, "factor": 1.0, "original_max_position_embeddings": config.longest}


def _llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    """Divide slow frequencies, keep fast ones, and go over from one to the other between them, as Llama 3.1 does."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in a text as long as those it was first trained on
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return float(frequency * ((1 - kept) / rope["factor"] + kept))
