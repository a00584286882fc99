"""The results of verifying a conversion, as the manifest keeps them."""

from dataclasses import dataclass

from effconvert.eval.quality.perplexity import Quality


@dataclass(frozen=True)
class Side:
    """The results for one of the two models."""

    parameters: int
    kv_bytes: int  # of the cache object, per token
    quality: Quality | None
    continuation: str
    state_bytes: int = 0  # of the cache object: mixers' states, of any number of tokens


@dataclass(frozen=True)
class Verification:
    """The cost of a conversion. For exact conversions `difference` is the largest change of a logit, on texts of up to `compared` tokens."""

    before: Side
    after: Side
    difference: float | None
    text: str
    dtype: str
    device: str
    unmeasured: str  # why there is no quality; empty where there is
    compared: int = 0
