"""Measurements of decoders beside lm-eval's tasks: how well they predict a text, whether they fall into loops, whether they find a passkey."""
# N = documents, T = tokens.

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from effconvert.eval.quality.paired import make
from effconvert.eval.quality.passages import Passages
from effconvert.eval.quality.perplexity import LogitsFile, greedy, logits_of, measure
from effconvert.eval.quality.store import Result
from effconvert.progress import Advance

PROMPTS, PROMPT, LENGTH = 8, 32, 64  # number of continuations, tokens in each prompt, tokens in each continuation
PERIOD, TAIL = 16, 24  # a loop repeats at most so many tokens, for at least so many at the end
KEYS = 10  # passkeys at each length

# The filler of Mohtashami and Jaggi 2023 (arXiv 2305.16300, section 4.2), usual in passkey tasks.
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
TASK = "There is an important piece of information hidden inside a lot of irrelevant text. Find it and memorize it. "
KEY, QUESTION = "The pass key is {0}. Remember it. {0} is the pass key. ", "What is the pass key? The pass key is"


def text(model: Any, passages: Passages, record: Path | None, reference: LogitsFile | None, advance: Advance) -> Result:
    """Measure how well `model` predicts `passages`, and how far it is from the model whose logits are the `reference`."""
    results = measure(model, passages.windows, record, reference, advance)
    names = [str(index) for index in range(len(results))]
    logs = [(-window.loss, size) for window, size in zip(results, passages.bytes, strict=True)]
    samples = [make("text", "bits_per_byte", "bits_per_byte", logs, names, "lower")]
    if passages.alike:
        samples.insert(0, make("text", "perplexity", "perplexity", [-window.loss / window.tokens for window in results], names, "lower"))
    if reference and not record:
        samples.append(make("text", "kl", "mean", [(window.kl or 0.0) / window.tokens for window in results], names, "lower"))
        samples.append(make("text", "same_top_token", "mean", [(window.same or 0) / window.tokens for window in results], names, "higher"))
    return Result(tuple(samples))


def generation(model: Any, tokenizer: Any, passages: Passages, length: int, advance: Advance) -> Result:
    """Let `model` continue the first tokens of some passages greedily for `length` tokens, and measure repetition."""
    chosen = passages.windows[:: max(1, len(passages.windows) // PROMPTS)][:PROMPTS]
    prompts = [window[: prompt_length(len(window))] for window in chosen]
    outputs = []
    for prompt in prompts:
        outputs.append(greedy(model, tokenizer, prompt, length))
        advance(1)
    names = [str(index) for index in range(len(outputs))]
    samples = (  # neither high nor low is better: a broken model writes noise that never repeats
        make("generation", "distinct_2", "mean", [distinct(tokens, 2) for tokens in outputs], names, None),
        make("generation", "repeated_4", "mean", [1 - distinct(tokens, 4) for tokens in outputs], names, None),
        make("generation", "loops", "mean", [float(loops(tokens)) for tokens in outputs], names, None),
    )
    example = (tokenizer.decode(prompts[0], skip_special_tokens=True), tokenizer.decode(outputs[0], skip_special_tokens=True))
    return Result(samples, texts=example)


def prompt_length(window: int) -> int:
    """Return how many tokens of a window make the prompt."""
    return min(PROMPT, window // 2 + 1)


def distinct(tokens: Sequence[int], n: int) -> float:
    """Return the share of n-grams that are different (distinct-n of Li et al. 2016, arXiv 1510.03055); 1 where there is no n-gram."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether `tokens` end in a cycle: the last `TAIL`, or three rounds if that is more, repeat with a period of at most `PERIOD`."""
    return any(
        len(tokens) >= need + period and all(tokens[-at] == tokens[-at - period] for at in range(1, need + 1))
        for period in range(1, PERIOD + 1)
        for need in [max(TAIL, 3 * period) - period]
    )


def passkey(model: Any, tokenizer: Any, length: int, advance: Advance) -> Result:
    """Hide a number at `KEYS` depths of a text of about `length` tokens, and test whether `model` finds it the most likely answer."""
    random_keys = random.Random(length)
    results = []
    for index in range(KEYS):
        key = random_keys.randint(10000, 99999)
        ids, answer = hide(tokenizer, key, (index + 0.5) / KEYS, length)
        logits = logits_of(model, torch.tensor(ids + answer))[-len(answer) - 1 : -1]  # [answer, V]
        results.append(float(logits.argmax(-1).tolist() == answer))
        advance(length)
    return Result((make("passkey", f"{length}_tokens", "mean", results, [str(index) for index in range(KEYS)], "higher", chance=0.0),))


def hide(tokenizer: Any, key: int, depth: float, length: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a text that hides `key` at `depth` (0 first, 1 last), and those of the answer; at most `length` tokens together."""

    def prompt(fillers: int) -> str:
        before = round(depth * fillers)
        return f"{TASK}{FILLER * before}{KEY.format(key)}{FILLER * (fillers - before)}{QUESTION}"

    def tokens(fillers: int) -> tuple[list[int], list[int]]:
        prompt_tokens, whole = (_going_on(tokenizer, text) for text in (prompt(fillers), f"{prompt(fillers)} {key}"))
        return prompt_tokens, whole[len(prompt_tokens) :]

    empty, with_filler = (sum(map(len, tokens(fillers))) for fillers in (0, 1))
    fillers = max(0, (length - empty) // max(1, with_filler - empty))
    while fillers and sum(map(len, tokens(fillers))) > length:
        fillers -= 1
    return tokens(fillers)


def _going_on(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that goes on: without the end of the text that some tokenizers add."""
    ids: list[int] = tokenizer(text, verbose=False).input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def shortest(tokenizer: Any) -> int:
    """Return the tokens of the shortest text that hides a key, with its answer."""
    return max(sum(map(len, hide(tokenizer, key, 0.5, 0))) for key in (10000, 71432, 99999))
