"""Keep libraries from talking, and give them their voice back: the process belongs to whoever called."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_hub(bars: bool = False) -> Iterator[None]:
    """Keep huggingface_hub's warnings to itself, what matters of them is said by us; and its bars of progress, unless `bars` may stay."""
    from huggingface_hub import utils
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        with _bars_of(utils, bars):
            yield
    finally:
        set_verbosity(verbosity)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from talking, and give it its voice back."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_hub():  # whose bars transformers turns off and on with its own
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep the bars of progress of `datasets` to itself."""
    from datasets import utils

    with _bars_of(utils, False):
        yield


@contextmanager
def _bars_of(library: Any, shown: bool) -> Iterator[None]:
    """Turn a library's bars off unless they are to be shown, and leave them as they were."""
    disabled = library.are_progress_bars_disabled()
    if not shown and not disabled:
        library.disable_progress_bars()
    try:
        yield
    finally:
        if library.are_progress_bars_disabled() != disabled:
            (library.disable_progress_bars if disabled else library.enable_progress_bars)()
