"""Base class of techniques that are several others, one after the other: they have a name and options, and no maths of their own."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from effconvert.surgery._surgery import Step, Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.options import Options


class Several(Surgery):
    """A technique that changes several places of a layer, each by a technique of its own.

    A conversion does those steps, and its records, recipe and model name them alone.
    """

    transfer_first = True
    kinds: ClassVar[tuple[type[Step], ...]]  # the techniques, in order

    @abstractmethod
    def stands_for(self, config: Config) -> tuple[Step, ...]:
        """Return one step of each of `kinds`."""

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The options that have to be given to any of them, or the reason why one cannot be done."""
        return " ".join(options for kind in cls.kinds if (options := kind.allowed_options(config)) != "as it is") or "as it is"

    def check(self, config: Config) -> None:
        """Refuse what any of the steps refuses, each after those before it."""
        for step in self.stands_for(config):
            step.check(config)
            config = step.config(config)

    def is_exact(self, config: Config) -> bool:
        """If all steps are."""
        steps, exact = self.stands_for(config), True
        for step in steps:
            exact, config = exact and step.is_exact(config), step.config(config)
        return exact

    def config(self, config: Config) -> Config:
        """Return the config after all steps."""
        for step in self.stands_for(config):
            config = step.config(config)
        return config


def option(kind: type[Options], name: str) -> Any:
    """Return the field of an option of another class: its bounds, default and description."""
    return kind.model_fields[name]
