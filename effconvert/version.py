"""The version of effconvert."""

__version__ = "0.1.0"
