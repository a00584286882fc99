"""Layers that read the keys and values of an earlier one: they make none of their own, and keep none in a cache."""
# B = batch, T = tokens, M = hidden width, Hk = KV heads, D = head width.

from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.shared import CACHE_PARTS
from effconvert.modeling.transformers_internals import CacheLayerMixin


class Given(dict[str, Tensor]):
    """What an attention module lends: name of a module in it -> what that gave last. A copy of a model begins with nothing."""

    def __deepcopy__(self, _: Any) -> "Given":
        return Given()

    def __reduce__(self) -> Any:
        return Given, ()


class Lent(nn.Module):
    """What stands where a layer's projection to keys or values would be, or the norm of its keys: what the earlier layer's gives, [B, T, Hk*D] or by head."""

    def __init__(self, lender: nn.Module, name: str) -> None:
        super().__init__()
        self.lender, self.name = [lender], name  # in a list: the lender is no child of this

    def forward(self, *_: Any) -> Tensor:
        """Return it, whatever is asked."""
        lent: Tensor = self.lender[0].lent[self.name]  # type: ignore[index]
        return lent


def lend(lender: nn.Module, borrower: nn.Module, config: Config) -> None:
    """Have the attention module of one layer read the keys and values of an earlier layer's."""
    names = [config.parts[part].removeprefix(f"{config.attention}.") for part in CACHE_PARTS if part in config.parts]
    for name in names:
        borrower.set_submodule(name, Lent(lender, name))
    if not hasattr(lender, "lent"):
        lender.lent = Given()  # type: ignore[assignment]
        lender.register_forward_pre_hook(partial(_attach, names))


def _attach(names: list[str], lender: nn.Module, *_: Any) -> None:
    """Note what the modules of these names give: whatever stands there now, as PEFT puts layers around projections."""
    for name in names:
        outer = lender.get_submodule(name)
        for inner in outer.modules():
            for key in [key for key, hook in inner._forward_hooks.items() if getattr(hook, "func", None) is _note and inner is not outer]:
                del inner._forward_hooks[key]
        if not any(getattr(hook, "func", None) is _note for hook in outer._forward_hooks.values()):
            outer.register_forward_hook(partial(_note, name, lender))


def _note(name: str, lender: Any, _: nn.Module, __: Any, out: Tensor) -> None:
    lender.lent[name] = out


class LentLayer(CacheLayerMixin):  # type: ignore[misc]
    """The place of a layer in a cache that reads the keys and values of an earlier layer: it holds none, and that layer sees to them."""

    def __init__(self, lender: Any) -> None:
        super().__init__()
        self.lender, self.is_sliding = lender, lender.is_sliding
        lender.__class__ = _lending(lender.__class__)

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing is held."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the earlier layer, of all tokens that it sees now: of the new ones they are those given here."""
        return self.lender.given  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the earlier layer says."""
        return self.lender.get_mask_sizes(query_length)  # type: ignore[no-any-return]

    def get_seq_length(self) -> int:
        """Tokens that went by."""
        return self.lender.get_seq_length()  # type: ignore[no-any-return]

    def get_max_length(self) -> int:
        """As the earlier layer says."""
        return self.lender.get_max_length()  # type: ignore[no-any-return]

    def get_max_cache_shape(self) -> int:
        """As the earlier layer says."""
        return self.lender.get_max_cache_shape()  # type: ignore[no-any-return]

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Leave it to the earlier layer."""

    reset = reorder_cache = batch_select_indices = batch_repeat_interleave = crop = offload = prefetch = _nothing
    nbytes = 0


@lru_cache(None)
def _lending(kind: Any) -> Any:
    """Return the class of a layer of a cache that notes what it gives: of a window that is more than it keeps."""

    def update(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.given = kind.update(self, *args, **kwargs)
        return self.given  # type: ignore[no-any-return]

    return kind if kind.__dict__.get("lends") else type(kind.__name__, (kind,), {"update": update, "lends": True})
