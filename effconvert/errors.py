"""The ways to fail. A message says what was found, what is needed and what to do next."""


class EffconvertError(Exception):
    """The root: the command line prints it as one line and exits with `exit_code`."""

    exit_code = 1  # one of ours, unless a subclass says whose fault it is


class OptionError(EffconvertError):
    """The asker wants something impossible; the text says what would be possible."""

    exit_code = 2


class ModelError(EffconvertError):
    """This model cannot be operated on; the text says which part of it, and why."""

    exit_code = 1


class UnknownLayoutError(ModelError):
    """effconvert has no row that describes this model, so it cannot be converted. Measuring it needs none; the text says what is unknown."""


class TechniqueError(EffconvertError):
    """The file of a technique is wrong; the text names the technique or its file, and the mistake that its author has to mend."""

    exit_code = 1
