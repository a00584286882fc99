"""Hold a conversion that must change no logit to that, on texts as long as the model reads: what is wrong beyond a window shows beyond it."""
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
from effconvert.progress import Advance

TOLERANCE = 1e-5  # of the largest logit, in float32
SHORT, GROWTH = 128, 4  # tokens of the first text, and how many times longer the next is
PLACES = 96  # of a text, all over it, whose logits are compared
SEEN = 1e-3  # of the largest number: a change below it is rounding, as in experts that get other tokens together
PATIENCE = 120  # seconds that one may take


def texts(config: Config, tokens: int, free: int) -> list[Tensor]:
    """Make random texts [T], each of which begins the next: the longest has `tokens`, or what the model reads, or what fits into `free` bytes of memory."""
    tokens = min(config.longest or tokens, tokens)
    logits = 0 if config.decoder else 8 * config.vocabulary  # bytes a token: encoders give all of them
    while tokens > SHORT and 16 * config.heads * tokens**2 + logits * tokens > free:  # as if the scores of all tokens were kept, a few times over
        tokens //= 2
    text = torch.randint(config.vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    lengths = [SHORT * GROWTH**step for step in range(tokens.bit_length()) if SHORT * GROWTH**step < tokens]
    return [text[:length] for length in (*lengths, tokens)]


def logits(model: Any, read: Sequence[Tensor], decoder: bool, advance: Advance) -> list[Tensor]:
    """Return the logits [places, V] of each text, which grow longer, up to the first that would take too long, or more memory than a device has.

    Raises:
        ModelError: one is NaN or infinite.
    """
    made: list[Tensor] = []
    took: list[float] = []
    for text in read:
        if made and _next(len(text), list(map(len, read[: len(made)])), took) > PATIENCE:
            break
        start = time.perf_counter()
        try:
            made.append(_all_over(model, text, decoder))
        except torch.OutOfMemoryError:
            if not made:
                raise
            break
        took.append(time.perf_counter() - start)
        if not made[-1].isfinite().all():
            raise ModelError("the model computes NaN or infinity")
        advance(len(text))
    return made


def _next(tokens: int, lengths: Sequence[int], took: Sequence[float]) -> float:
    """Return what a text will take if seconds go on to grow as they did over those before it: at least with its length, at most with the cube of that."""
    power = 1.0
    if len(took) > 1 and took[-2]:
        power = math.log(max(took[-1] / took[-2], 1)) / math.log(lengths[-1] / lengths[-2])
    return float(took[-1] * (tokens / lengths[-1]) ** min(max(power, 1), 3))


@torch.inference_mode()
def _all_over(model: Any, text: Tensor, decoder: bool) -> Tensor:
    """Return logits at places all over a text, or hidden states where there is no head; a decoder goes on to the last one from a cache."""
    places = torch.linspace(0, len(text) - 1, min(len(text), PLACES)).long().to(model.device)
    ids = text[None].to(model.device)
    if not decoder or len(text) == 1:
        return _given(model(ids))[places].float().cpu()
    keep = {"logits_to_keep": places[:-1]} if "logits_to_keep" in signature(model.forward).parameters else {}
    from effconvert.modeling.transformers_internals import cache_among, cache_name  # as late as transformers itself: a plan does not need it

    before = model(ids[:, :-1], use_cache=True, **keep)
    last = _given(model(ids[:, -1:], use_cache=True, **{cache_name(model): cache_among(before.values())}))
    return torch.cat([_given(before) if keep else _given(before)[places[:-1]], last]).float().cpu()


def _given(output: Any) -> Tensor:
    given: Tensor = (output.logits if "logits" in output else output.last_hidden_state)[0]
    return given


@torch.inference_mode()
def sees_later(model: Any, text: Tensor) -> bool:
    """Whether what `model` makes of some token of a text [T] depends on a later one: on the last, or on one in the middle."""
    before = _given(model(text[None].to(model.device)))
    for place in {len(text) // 2, len(text) - 1} - {0}:
        changed = text.clone()
        changed[place] = changed[place] - 1 if changed[place] else 1
        earlier = (_given(model(changed[None].to(model.device))) - before)[:place].abs()
        if earlier.max() > SEEN * before.abs().max():
            return True
    return False


def compare(read: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, int]:
    """Return the largest change of a logit, and the length of the longest text that both models have read.

    Raises:
        ModelError: it is more than rounding.
    """
    largest, longest = 0.0, 0
    for text, expected, found in zip(read, before, after, strict=False):
        change = (found - expected).abs().max().item()
        if change > TOLERANCE * expected.abs().max().item():
            raise ModelError(
                f"a logit changed by {change:.3g} on a text of {len(text)} tokens, and this conversion must not change any: "
                "a fault of effconvert, please report it"
            )
        largest, longest = max(largest, change), max(longest, len(text))
    return largest, longest
