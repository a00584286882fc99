"""Make the tokens to calibrate on, and say what calibration takes; the run itself is in `effconvert.convert.calibrate`."""

from typing import Any

from effconvert.convert import selftext
from effconvert.convert.plan import Plan
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import windows
from effconvert.eval.quality.text import MOST, calibration_text, read_calibration
from effconvert.heal._calibration import Calibration, batch_size
from effconvert.modeling import loading
from effconvert.options import Conversion

DOCSTRINGS = "docstrings"  # the value of --calibrate
WINDOW = 512  # tokens
PIECES = (1, 4, 16)  # an encoder's windows are cut into so many texts in turn: it is to be good at short ones too
SHORTEST = 14  # tokens of such a text, but for those that begin and end it
LEAST = 8  # windows: one of them is held out
LIBRARIES = 400_000_000  # bytes; transformers, and what PyTorch sets up to compute


def prepare(plan: Plan, options: Conversion) -> Calibration:
    """Make the tokens to calibrate on: windows from all over the text, for encoders texts of several lengths, begun and ended as theirs are.

    Raises:
        OptionError: the text cannot be read, or is too short.
        ModelError: there is no tokenizer, or it is damaged or does not belong to the model.
    """
    config, folder = plan.checkpoint.config, plan.checkpoint.folder
    if not loading.has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer, so the model cannot be run on a text; put it there, or take options that need no calibration")
    if lent := [layer for layer in range(plan.config.layers) if plan.config.cache_of(layer) != layer]:
        raise ModelError(
            f"layer {lent[0]} reads the keys and values of layer {plan.config.cache_of(lent[0])}, and calibration runs one layer at a time; "
            "do what needs calibration first, and share the cache last"
        )
    if plan.teacher.config.vocabulary < config.vocabulary:
        raise ModelError(
            f"the teacher knows {plan.teacher.config.vocabulary} tokens and the student {config.vocabulary}: they do not read the same text; "
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
    asked = f"--calibration-tokens {options.calibration_tokens} are asked for; give a longer text, or ask for fewer"
    try:
        ids = windows(tokenizer, text, window, MOST, config.vocabulary)
    except OptionError:  # which speaks of the options of measuring
        found = len(tokenizer(text.content, add_special_tokens=False).input_ids)
        raise OptionError(f"{text.name} has {found} tokens, and {asked}") from None
    count = options.calibration_tokens // window
    if len(ids) < count:
        raise OptionError(f"{text.name} has {ids.numel()} tokens in windows of {window}, and {asked}")
    ids = ids[[index * len(ids) // count for index in range(count)]]
    if config.decoder:
        return Calibration(text.name, ids)
    ends = _ends(tokenizer)
    least = SHORTEST + sum(map(len, ends))
    return Calibration(text.name, ids, tuple(pieces for pieces in PIECES if pieces == 1 or window // pieces >= least), ends)


def _window(options: Conversion, longest: int) -> int:
    """Return how many tokens are read together, of a model that reads `longest`."""
    asked, tokens = options.calibration_window, options.calibration_tokens
    if asked is None:
        return min(WINDOW, longest, tokens // LEAST)
    if asked > longest:
        raise OptionError(f"--calibration-window {asked} is more than the {longest} tokens that the model reads; give at most that")
    if asked > tokens // LEAST:
        raise OptionError(f"--calibration-window {asked} needs {LEAST * asked} --calibration-tokens, {LEAST} windows, and {tokens} are asked for")
    return asked


def _ends(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that the tokenizer puts before and after a text; none where that cannot be told."""
    plain, whole = (tokenizer("a 1 .", add_special_tokens=special, verbose=False).input_ids for special in (False, True))
    start = next((place for place in range(len(whole)) if plain and whole[place : place + len(plain)] == plain), None)
    if start is None:
        return (), ()
    return tuple(whole[:start]), tuple(whole[start + len(plain) :])


def calibration_bytes(plan: Plan) -> int:
    """Return about how many bytes of memory `calibrate` takes with a refit, the largest there is, and half of that again between freed blocks."""
    assert plan.calibration
    config, ids = plan.checkpoint.config, plan.calibration.ids
    window, inner = ids.shape[1], config.heads * config.head_dim
    token = 4 * (8 * config.hidden + 4 * inner) + 2 * config.heads * window  # inputs, outputs, queries and keys; attention in half precision
    batch = batch_size(window) * 4 * window * (4 * config.heads * window + 3 * config.ffn)
    squares = 6 * 8 * max(config.hidden, inner) ** 2
    return plan.peak + LIBRARIES + 3 * ids.numel() * token // 2 + batch + squares
