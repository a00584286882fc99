"""Check that an exact conversion changes no logit. Texts are as long as the model reads, since an error beyond a window shows only there."""
# T = tokens, V = vocabulary.

import math
import time
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from effconvert.checkpoint.config import Config
from effconvert.errors import ModelError
from effconvert.eval.quality.perplexity import values_of
from effconvert.progress import Advance

TOLERANCE = 1e-5  # of the largest logit, in float32
SHORT, GROWTH = 128, 4  # tokens of the first text, and how many times longer the next is
PLACES = 96  # spread over a text, whose logits are compared
PATIENCE = 120  # seconds that a text may take


def texts(config: Config, tokens: int, free: int) -> list[Tensor]:
    """Make random texts [T], each the beginning of the next. The longest has `tokens`, or what the model reads, or what fits `free` bytes of memory."""
    tokens = min(config.longest or tokens, tokens)
    logits = 0 if config.decoder else 8 * config.vocabulary  # bytes a token; encoders compute all logits
    while tokens > SHORT and 16 * config.heads * tokens**2 + logits * tokens > free:  # several copies of all attention scores
        tokens //= 2
    text = torch.randint(config.vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    lengths = [SHORT * GROWTH**step for step in range(tokens.bit_length()) if SHORT * GROWTH**step < tokens]
    return [text[:length] for length in (*lengths, tokens)]


def logits(model: Any, inputs: Sequence[Tensor], decoder: bool, advance: Advance) -> list[Tensor]:
    """Return the logits [places, V] of each text, the shortest first. Stop at the first that would take too long or too much memory.

    Raises:
        ModelError: one is NaN or infinite.
    """
    results: list[Tensor] = []
    seconds: list[float] = []
    for text in inputs:
        if results and _next_seconds(len(text), list(map(len, inputs[: len(results)])), seconds) > PATIENCE:
            break
        start = time.perf_counter()
        try:
            results.append(_spread_logits(model, text, decoder))
        except torch.OutOfMemoryError:
            if not results:
                raise
            break
        seconds.append(time.perf_counter() - start)
        if not results[-1].isfinite().all():
            raise ModelError("the model computes NaN or infinity")
        advance(len(text))
    return results


def _next_seconds(tokens: int, lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Extrapolate the seconds for a text from the two before it. The power of its length is between 1 and 3."""
    power = 1.0
    if len(seconds) > 1 and seconds[-2]:
        power = math.log(max(seconds[-1] / seconds[-2], 1)) / math.log(lengths[-1] / lengths[-2])
    return float(seconds[-1] * (tokens / lengths[-1]) ** min(max(power, 1), 3))


@torch.inference_mode()
def _spread_logits(model: Any, text: Tensor, decoder: bool) -> Tensor:
    """Return logits spread over a text, or hidden states without a head. A decoder computes the last one from its cache."""
    places = torch.linspace(0, len(text) - 1, min(len(text), PLACES)).long().to(model.device)
    ids = text[None].to(model.device)
    if not decoder or len(text) == 1:
        return values_of(model(ids))[places].float().cpu()
    keep = {"logits_to_keep": places[:-1]} if "logits_to_keep" in signature(model.forward).parameters else {}
    from effconvert.modeling.transformers_internals import cache_among, cache_name  # imported late, as it imports transformers

    before = model(ids[:, :-1], use_cache=True, **keep)
    last = values_of(model(ids[:, -1:], use_cache=True, **{cache_name(model): cache_among(before.values())}))
    return torch.cat([values_of(before) if keep else values_of(before)[places[:-1]], last]).float().cpu()


def compare(inputs: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, int]:
    """Return the largest change of a logit, and the length of the longest text that both models have read.

    Raises:
        ModelError: it is more than rounding.
    """
    largest, longest = 0.0, 0
    for text, expected, actual in zip(inputs, before, after, strict=False):
        change = (actual - expected).abs().max().item()
        if change > TOLERANCE * expected.abs().max().item():
            raise ModelError(
                f"a logit changed by {change:.3g} on a text of {len(text)} tokens, and this conversion must not change any: "
                "a fault of effconvert, please report it"
            )
        largest, longest = max(largest, change), max(longest, len(text))
    return largest, longest
