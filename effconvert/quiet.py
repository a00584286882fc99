"""Silence libraries for a while, and restore their settings: the process belongs to the caller."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_hub(bars: bool = False) -> Iterator[None]:
    """Silence huggingface_hub's warnings, as our errors say what matters, and its progress bars, unless `bars` is true."""
    from huggingface_hub import utils
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        with _without_bars(utils, bars):
            yield
    finally:
        set_verbosity(verbosity)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers, and restore its settings."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_hub():  # transformers switches the Hub's bars with its own
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
    """Silence the progress bars of `datasets`."""
    from datasets import utils

    with _without_bars(utils, False):
        yield


@contextmanager
def _without_bars(library: Any, shown: bool) -> Iterator[None]:
    """Turn a library's bars off unless `shown`, and restore them."""
    disabled = library.are_progress_bars_disabled()
    if not shown and not disabled:
        library.disable_progress_bars()
    try:
        yield
    finally:
        if library.are_progress_bars_disabled() != disabled:
            (library.disable_progress_bars if disabled else library.enable_progress_bars)()
