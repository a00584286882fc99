"""Scores of a model while it is trained, as `effconvert eval` measures them: lm-eval's tasks, and passkeys."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from effconvert import processes
from effconvert.convert.plan import Plan
from effconvert.convert.teacher_cache import options_of
from effconvert.errors import OptionError
from effconvert.eval.quality import language
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.harness import Harness
from effconvert.modeling import loading
from effconvert.paths import expand


def scores(plan: Plan) -> Callable[[Any], Mapping[str, float]] | None:
    """Return the function that measures what --tasks and --passkey name; None where they name nothing.

    Raises:
        OptionError: they cannot be measured of this model, or there is no such task.
        EffconvertError: a task's data is not here, and the Hub cannot be reached.
    """
    options, config = options_of(plan), plan.config
    if not options.tasks and not options.passkey:
        return None
    if not (config.decoder and config.predicts):
        raise OptionError(f"--tasks and --passkey are for models that predict the next token, and {config.architecture} does not; leave them out")
    if processes.count() > 1:
        raise OptionError("--tasks and --passkey are for one process; measure the result with effconvert eval")
    if options.include_path and not expand(options.include_path).is_dir():
        raise OptionError(f"--include-path {options.include_path} is no folder; give one with task files")
    tokenizer = loading.load_tokenizer(plan.checkpoint.folder)
    if options.passkey and min(options.passkey) < (need := language.shortest(tokenizer)):
        raise OptionError(f"--passkey {min(options.passkey)} is too short: the question alone takes {need} tokens; give at least {need}")
    if options.passkey and config.longest and max(options.passkey) > config.longest:
        raise OptionError(f"--passkey {max(options.passkey)} is more than the {config.longest} tokens that the model reads; give at most that")
    given = EvalOptions(tasks=options.tasks, include_path=options.include_path, limit=options.limit, passkey=options.passkey) if options.tasks else None
    harness = Harness(given, show_bars=False) if given else None
    tasks = [(name, harness.run) for name in harness.tasks] if harness else []

    def measure(model: Any) -> dict[str, float]:
        values: dict[str, float] = {}
        with unchanged_chance():
            for length in options.passkey:
                result = language.passkey(model, tokenizer, length, lambda _: None)
                values[f"passkey {length}"] = result.samples[0].value
            for name, task in tasks:
                for samples in task(name, model, tokenizer, config.longest).samples:
                    values[f"{name} {samples.metric}"] = samples.value
        return values

    return measure


@contextmanager
def unchanged_chance() -> Iterator[None]:
    """Leave the random numbers of the training as they would be without the measurement."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
