"""Prepare calibration: its tokens, and the memory it takes. The run itself is in `effconvert.convert.calibrate`."""

from typing import Any

import psutil
import torch

from effconvert.checkpoint.config import Config
from effconvert.convert import selftext
from effconvert.convert.plan import Plan
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import windows
from effconvert.eval.quality.text import MOST, calibration_text, read_calibration
from effconvert.heal._calibration import BATCH, Calibration
from effconvert.modeling import loading
from effconvert.options import Conversion

DOCSTRINGS = "docstrings"  # the value of --calibrate
WINDOW = 512  # tokens
PIECES = (1, 4, 16)  # texts that an encoder's windows are cut into, in turn: short texts must count too
SHORTEST = 14  # tokens of such a text, without special tokens
LEAST = 8  # windows; one of them is held out
LIBRARIES = 400_000_000  # bytes of transformers and PyTorch


def prepare(plan: Plan, options: Conversion) -> Calibration:
    """Make the calibration tokens: windows from all over the text. Encoders get texts of several lengths, with special tokens.

    Raises:
        OptionError: the text cannot be read, or is too short.
        ModelError: there is no tokenizer, or it is damaged or does not belong to the model.
    """
    config, folder = plan.checkpoint.config, plan.checkpoint.folder
    if not loading.has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer, so the model cannot be run on a text; put it there, or take options that need no calibration")
    if any(step.needs_original(shape) for step, shape in zip(plan.surgeries, plan.configs, strict=False)):
        check_caches(plan.teacher.config, "the original", "begin from the model as it was before, or name that as --teacher")
    if plan.teacher.config.vocabulary < config.vocabulary:
        raise ModelError(
            f"the teacher has a vocabulary of {plan.teacher.config.vocabulary} and the student of {config.vocabulary}, so they do not read the same text; "
            "name the model that the student was made from"
        )
    window = _window(options, min(config.longest or MOST, plan.teacher.config.longest or MOST))
    tokenizer = loading.load_tokenizer(folder)
    chosen = options.calibrate
    if chosen is None:
        chosen = DOCSTRINGS if selftext.refusal(plan.teacher) else selftext.SELF
    if chosen == selftext.SELF:
        return selftext.prepare(plan, tokenizer, options.calibration_tokens // window, window)
    text = calibration_text() if chosen == DOCSTRINGS else read_calibration(chosen)
    advice = f"--calibration-tokens is {options.calibration_tokens}; give a longer text, or a smaller number"
    try:
        ids = windows(tokenizer, text, window, MOST, config.vocabulary)
    except OptionError:  # whose message names the options of evaluation
        length = len(tokenizer(text.content, add_special_tokens=False).input_ids)
        raise OptionError(f"{text.name} has {length} tokens, and {advice}") from None
    count = options.calibration_tokens // window
    if len(ids) < count:
        raise OptionError(f"{text.name} has {ids.numel()} tokens in windows of {window}, and {advice}")
    ids = ids[[index * len(ids) // count for index in range(count)]]
    if config.decoder:
        return Calibration(text.name, ids)
    ends = special_ends(tokenizer)
    least = SHORTEST + sum(map(len, ends))
    return Calibration(text.name, ids, tuple(pieces for pieces in PIECES if pieces == 1 or window // pieces >= least), ends)


def check_caches(config: Config, what: str, advice: str) -> None:
    """Refuse a model of which some layers read an earlier layer's keys and values, where each layer must run by itself on any input.

    Raises:
        ModelError: it has such layers.
    """
    if config.readers:
        reader = config.readers[0]
        raise ModelError(f"layer {reader} of {what} reads the keys and values of layer {config.cache_of(reader)}, so it cannot run by itself; {advice}")


def _window(options: Conversion, longest: int) -> int:
    """Return the tokens of a window, for a model that reads at most `longest`."""
    window, tokens = options.calibration_window, options.calibration_tokens
    if window is None:
        return min(WINDOW, longest, tokens // LEAST)
    if window > longest:
        raise OptionError(f"--calibration-window {window} is more than the {longest} tokens that the model reads; give at most that")
    if window > tokens // LEAST:
        raise OptionError(f"--calibration-window {window} needs --calibration-tokens {LEAST * window} ({LEAST} windows) or more, and it is {tokens}")
    return window


def special_ends(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that the tokenizer puts before and after a text; none if they cannot be recognised."""
    plain, whole = (tokenizer("a 1 .", add_special_tokens=special, verbose=False).input_ids for special in (False, True))
    start = next((index for index in range(len(whole)) if plain and whole[index : index + len(plain)] == plain), None)
    if start is None:
        return (), ()
    return tuple(whole[:start]), tuple(whole[start + len(plain) :])


def calibration_bytes(plan: Plan) -> int:
    """Estimate the bytes of memory that calibration takes."""
    assert plan.calibration
    rest, token = _bytes(plan)
    return rest + plan.calibration.ids.numel() * token


def check_memory(plan: Plan) -> None:
    """Refuse a calibration that does not fit. On an accelerator the activations are in its own memory, which nobody asks here.

    Raises:
        OptionError: there is not enough memory; the message says how many tokens would fit.
    """
    assert plan.calibration
    need, free = calibration_bytes(plan), psutil.virtual_memory().available
    room = free + psutil.Process().memory_info().rss  # what this process has already is in the estimate
    if need <= room or torch.accelerator.is_available():
        return
    (rest, token), (count, window) = _bytes(plan), plan.calibration.ids.shape
    fits = 1 << max(0, (room - rest) // token).bit_length() >> 1  # a power of two below, as what is free changes
    advice = f"give --calibration-tokens {fits}" if fits >= LEAST * window else "convert on a larger machine, or take options that need no calibration"
    raise OptionError(f"calibration on {count * window} tokens takes about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; {advice}")


def _bytes(plan: Plan) -> tuple[int, int]:
    """Return the most bytes of memory that calibration takes beside the tokens' activations, and of these for each token; fragmentation adds half to them."""
    assert plan.calibration
    steps = [*zip(plan.surgeries, plan.configs, strict=False)]
    config, window = plan.checkpoint.config, plan.calibration.ids.shape[1]
    inner = config.heads * config.head_dim
    # Hidden states before and after a layer, and of a technique; beside them those of the original, and the inputs and targets of healing.
    token = 4 * config.hidden * (8 if any(step.needs_original(shape) for step, shape in steps) else 3)
    if any(step.keeps_attention for step in plan.surgeries):
        token += 16 * inner + 2 * config.heads * window  # queries and keys; attention in half precision
    batch = BATCH * 4 * window * (4 * config.heads * window + 3 * config.ffn)
    squares = 6 * 8 * max(config.hidden, inner) ** 2
    own = max((step.fit_bytes(shape) for step, shape in steps), default=0)
    return plan.peak + LIBRARIES + batch + squares + own, 3 * token // 2
