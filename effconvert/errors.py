"""The errors of effconvert. A message names the cause, what is needed, and what to do next."""

import signal
import time
from collections.abc import Iterator
from types import FrameType

STOPPED = "\nStopped. Conversions, trainings and evaluations keep what is finished: the same command goes on from there."  # after Ctrl-C,
INTERRUPTED = 130  # with this exit code
BROKEN_PIPE = 141  # exit code where nobody reads the output on, as of `head -1`: 128 + SIGPIPE, like that of other tools

SOON = 30.0  # seconds within which an error comes of an interrupt that was lost
_interrupts: list[float] = []  # when they came

# Names of errors of libraries that mean: no network.
OFFLINE = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectTimeout", "ConnectError", "DatasetNotFoundError", "HfHubHTTPError")


class EffconvertError(Exception):
    """The base class: the command line prints the message as one line and exits with `exit_code`."""

    exit_code = 1  # one of ours, unless a subclass says whose fault it is


class OptionError(EffconvertError):
    """The user's mistake: options that are impossible; the text says which are possible."""

    exit_code = 2


class ModelError(EffconvertError):
    """The model does not allow this; the text names the part of it, and the reason."""

    exit_code = 1


class UnknownLayoutError(ModelError):
    """effconvert has no row that describes this model, so it cannot be converted. Measuring it needs none; the text says what is unknown."""


class TechniqueError(EffconvertError):
    """The file of a technique is wrong; the text names the technique or its file, and the mistake that its author has to mend."""

    exit_code = 1


def is_offline(error: BaseException) -> bool:
    """Whether the network is missing, by the type of `error` or of one that caused it: nobody's mistake, and exit code 1."""
    return any(type(link).__name__ in OFFLINE or isinstance(link, ConnectionError) for link in _chain(error))


def remember_interrupts() -> None:
    """Remember Ctrl-C in this process: a library that is loading may lose it, and fail later for what it then lacks. A shell may have turned it off."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _interrupts.append(time.monotonic())
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def is_interrupt(error: BaseException) -> bool:
    """Whether `error` is an interrupt by the user, or came of one: transformers' lazy imports make ModuleNotFoundError of it, others lose it."""
    return bool(_interrupts and time.monotonic() < _interrupts[-1] + SOON) or any(isinstance(link, KeyboardInterrupt) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield `error`, what caused it, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
