"""Layers that read the keys and values of an earlier layer. They compute none, and cache none."""
# B = batch, T = tokens, M = hidden width, Hk = KV heads, D = head width.

from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.shared import CACHE_PARTS
from effconvert.modeling.transformers_internals import CacheLayerMixin


class Outputs(dict[str, Tensor]):
    """What an attention module lends: name of a module in it -> its latest output. A copy of a model begins empty."""

    def __deepcopy__(self, _: Any) -> "Outputs":
        return Outputs()

    def __reduce__(self) -> Any:
        return Outputs, ()


class BorrowedOutput(nn.Module):
    """In place of a projection to keys or values, or of the norm of keys: returns the output of the earlier layer's, [B, T, Hk*D] or by head."""

    def __init__(self, lender: nn.Module, name: str) -> None:
        super().__init__()
        self.lender, self.name = [lender], name  # in a list, so that the lender is no child of this module

    def forward(self, *_: Any) -> Tensor:
        """Return the latest output, whatever the arguments."""
        output: Tensor = self.lender[0].lent_outputs[self.name]  # type: ignore[index]
        return output


def lend(lender: nn.Module, borrower: nn.Module, config: Config) -> None:
    """Make an attention module read the keys and values of an earlier layer's."""
    names = [config.parts[part].removeprefix(f"{config.attention}.") for part in CACHE_PARTS if part in config.parts]
    for name in names:
        borrower.set_submodule(name, BorrowedOutput(lender, name))
    if not hasattr(lender, "lent_outputs"):
        lender.lent_outputs = Outputs()  # type: ignore[assignment]
        lender.register_forward_pre_hook(partial(_attach, names))


def _attach(names: list[str], lender: nn.Module, *_: Any) -> None:
    """Record the outputs of the modules of these names as they are now: PEFT wraps projections."""
    for name in names:
        outer = lender.get_submodule(name)
        for inner in outer.modules():
            for key in [key for key, hook in inner._forward_hooks.items() if getattr(hook, "func", None) is _note and inner is not outer]:
                del inner._forward_hooks[key]
        if not any(getattr(hook, "func", None) is _note for hook in outer._forward_hooks.values()):
            outer.register_forward_hook(partial(_note, name, lender))


def _note(name: str, lender: Any, _: nn.Module, __: Any, out: Tensor) -> None:
    lender.lent_outputs[name] = out


class LentLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache layer of a layer that reads the keys and values of an earlier one. It stores nothing; the earlier layer's does."""

    def __init__(self, lender: Any) -> None:
        super().__init__()
        self.lender, self.is_sliding = lender, lender.is_sliding
        lender.__class__ = _lending(lender.__class__)

    @property
    def is_croppable(self) -> bool:
        """As the earlier layer's cache."""
        return bool(self.lender.is_croppable)

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Do nothing: no tensor is stored."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values in the earlier layer's cache; they contain those of the new tokens."""
        return self.lender.latest  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As in the earlier layer's cache."""
        return self.lender.get_mask_sizes(query_length)  # type: ignore[no-any-return]

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return self.lender.get_seq_length()  # type: ignore[no-any-return]

    def get_max_length(self) -> int:
        """As in the earlier layer's cache."""
        return self.lender.get_max_length()  # type: ignore[no-any-return]

    def get_max_cache_shape(self) -> int:
        """As in the earlier layer's cache."""
        return self.lender.get_max_cache_shape()  # type: ignore[no-any-return]

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing: the earlier layer's cache does it."""

    reset = reorder_cache = batch_select_indices = batch_repeat_interleave = crop = offload = prefetch = _nothing
    nbytes = 0


@lru_cache(None)
def _lending(kind: Any) -> Any:
    """Return a class of cache layer that records its latest output; with a window that is more than it stores."""

    def update(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.latest = kind.update(self, *args, **kwargs)
        return self.latest  # type: ignore[no-any-return]

    return kind if kind.__dict__.get("lends") else type(kind.__name__, (kind,), {"update": update, "lends": True})
