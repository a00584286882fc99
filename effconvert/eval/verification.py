"""What the verification of a conversion measured, as its manifest keeps it."""

from dataclasses import dataclass

from effconvert.eval.quality.perplexity import Quality


@dataclass(frozen=True)
class Side:
    """What was measured on one of the two models."""

    parameters: int
    kv_bytes: int  # of the cache object, for a token
    quality: Quality | None
    continuation: str
    state_bytes: int = 0  # of the cache object, what mixers hold however few tokens went by


@dataclass(frozen=True)
class Verification:
    """What a conversion cost. `difference` is the largest change of a logit, on texts of up to `compared` tokens, for conversions that must not change any."""

    before: Side
    after: Side
    difference: float | None
    text: str
    dtype: str
    device: str
    unmeasured: str  # why there is no quality, empty where there is
    compared: int = 0
