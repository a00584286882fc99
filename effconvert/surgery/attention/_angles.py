"""The angles of RoPE that config.json gives, and rewritten for a class in which each pair has its own."""
# P = pairs of a head's numbers.

import math
from collections.abc import Mapping, Sequence
from typing import Any

from effconvert.checkpoint.config import Config
from effconvert.errors import ModelError
from effconvert.families import Family

LARGEST = 3e38  # base that fits into float32, in which transformers computes angles


def rope_of(config: Config) -> Mapping[str, Any]:
    """Return what config.json says of RoPE, in transformers' present words."""
    rope = dict(config.ropes)
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
    if rope["rope_type"] == "proportional":
        raise ModelError(f"RoPE turns {turned(config)} of {config.head_dim} numbers of a head of this {config.kind}, and deepseek_v3 turns all; take narrow-kv")
    raise ModelError(
        f"RoPE of this {config.kind} is of the type {rope['rope_type']}, which changes with the length of the text or scales its numbers, and deepseek_v3 "
        "gets fixed angles (default, linear, llama3); narrow-kv takes it, in a class of effconvert"
    )


def rope_entry_of_pairs(config: Config, counts: Sequence[int]) -> dict[str, Any]:
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


def turned(config: Config) -> int:
    """Return how many numbers of a head RoPE turns by more than nothing."""
    rope = rope_of(config)
    return 2 * int(rope.get("partial_rotary_factor", 1.0) * config.head_dim // 2) if rope["rope_type"] == "proportional" else config.rotary


def rope_entry(config: Config, family: Family) -> dict[str, Any]:
    """Return RoPE's entry in config.json for a model of `family` whose pairs turn by the same angles.

    A class that reads the part of a head to turn gets it so. Others turn all of a head: with `proportional` RoPE the pairs behind that part have the
    frequency 0, and its base goes by the width of a head where the other's goes by that of the part.

    Raises:
        ModelError: there is no such entry.
    """
    rope, count, width = {key: value for key, value in rope_of(config).items() if key != "partial_rotary_factor"}, turned(config), config.head_dim
    reads_part, proportional = family.rotary_key in family.defaults, rope["rope_type"] == "proportional"
    part = {"partial_rotary_factor": part_of(count, width)} if reads_part or count < width else {}
    _check_type(config.family, rope)
    if count < width and reads_part == proportional:
        if rope["rope_type"] not in ("default", "linear", "proportional"):
            raise ModelError(f"RoPE of the type {rope['rope_type']} would turn {count} of {width} numbers of a head, and this class turns all")
        base = float(rope["rope_theta"]) ** (count / width if proportional else width / count)
        if base > LARGEST:
            raise ModelError(f"the base of RoPE that turns all {width} numbers of a head would be {base:.1e}, which float32 does not hold")
        rope |= {"rope_type": ("linear" if "factor" in rope else "default") if proportional else "proportional", "rope_theta": base}
    _check_type(family, rope)
    return rope | part


def part_of(count: int, width: int) -> float:
    """Return the part of a head that is `count` numbers, which classes multiply by its width and round down."""
    part = count / width
    return part if int(width * part) == count else math.nextafter(part, 1)


def _check_type(family: Family, rope: Mapping[str, Any]) -> None:
    """Refuse a type of RoPE that a family's class does not take, or takes for another."""
    if family.rope_types and rope["rope_type"] not in family.rope_types:
        raise ModelError(f"the type of RoPE is {rope['rope_type']}, and {family.base} knows {' and '.join(family.rope_types)}")


def _llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    """Divide slow frequencies, keep fast ones, and go over from one to the other between them, as Llama 3.1 does."""
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in a text as long as those it was first trained on
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return float(frequency * ((1 - kept) / rope["factor"] + kept))
