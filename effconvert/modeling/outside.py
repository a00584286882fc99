"""Techniques in place of the embedding table and the head of transformers' models: both modules stay, and compute without a table."""
# M = hidden width, V = vocabulary.

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from effconvert.checkpoint.config import Config
from effconvert.checkpoint.replaced import OUTSIDE
from effconvert.errors import ModelError
from effconvert.modeling.places import NAME, Own
from effconvert.surgery._placed import outer_technique_of

_TABLES: WeakKeyDictionary[Own, tuple[tuple[Any, ...], Callable[[], Tensor | None]]] = WeakKeyDictionary()  # those in use
LENT = "_effconvert_lent"  # attribute of a head that is tied to the embedding: the embedding's own parameters


class Outside:
    """Puts techniques into a model's embedding and head, and unties their tables, which are gone."""

    config: Any
    all_tied_weights_keys: dict[str, str]
    _tied_weights_keys: Any

    def _put_outside(self, config: Config) -> None:
        modules: Mapping[str, Any] = {"embed": self.get_input_embeddings(), "head": self.get_output_embeddings()}  # type: ignore[attr-defined]
        names = {module: name for name, module in self.named_modules()}  # type: ignore[attr-defined]
        gone = []
        for record in filter(None, map(config.replaced_outside, OUTSIDE)):
            module, head = modules[record.place], modules["head"]
            if module is None:
                continue  # a class without the head, or with another
            own = Own(outer_technique_of(record), config, -1, record.place)
            _put(module, own)
            gone.append(module)
            if record.place == "embed" and config.tied and isinstance(head, nn.Linear):
                _put(head, own, lent=True)
                gone.append(head)
        if gone:
            tables = {f"{names[module]}.weight" for module in gone}
            self._tied_weights_keys = {name: to for name, to in (self._tied_weights_keys or {}).items() if name not in tables and to not in tables}
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=False)  # type: ignore[attr-defined]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the table, unless a technique is in its place."""
        modules = (self.get_input_embeddings(), self.get_output_embeddings())  # type: ignore[attr-defined]
        if any(map(has_no_table, modules)) and (args or kwargs):
            raise ValueError("the embedding or the head of this model is no table that could be resized; resize the original, and convert that")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]


def has_no_table(module: nn.Module | None) -> bool:
    """Whether a technique is in place of the table of an embedding or a head."""
    return module is not None and hasattr(type(module), LENT)


def _put(module: nn.Module, own: Own, lent: bool = False) -> None:
    """Let a module run a technique in place of its table; with `lent` the parameters are another module's."""
    if own.place == "embed" and not lent and type(module) is not nn.Embedding and not hasattr(module, "embed_scale"):
        raise ModelError(f"the embedding is a {type(module).__name__}, and effconvert knows no more than plain and scaled ones")
    module.register_parameter("weight", None)
    if lent:
        module.__dict__[LENT] = own  # not a child of this module: it has a name already
    else:
        module.add_module(NAME, own)
    kind: Any = type(module)
    module.__class__ = _embedding(kind) if own.place == "embed" and not lent else _head(kind)


def _own(module: Any) -> Own:
    own: Own = module.__dict__.get(LENT) or getattr(module, NAME)
    return own


def _table(module: Any) -> Tensor:
    """The table [V, M], computed when somebody reads `weight`. While one is in use it is returned again: PEFT compares addresses to see what is tied."""
    own = _own(module)
    state = (torch.is_grad_enabled(), *((tensor.data_ptr(), tensor._version) for tensor in own.weights.values()))
    known, table = _TABLES.get(own, ((), lambda: None))
    if known != state or (result := table()) is None:
        result = _rows(own, torch.arange(own.config.vocabulary, device=next(iter(own.weights.values())).device))
        _TABLES[own] = state, ref(result)
    return result


def _rows(own: Own, tokens: Tensor) -> Tensor:
    """Compute the rows [..., M] of tokens [...]."""
    weights = own.weights
    rows: Tensor = own.technique.lookup(own.config, own.place, lambda name, numbers: weights[name] if numbers is None else weights[name][numbers], tokens)
    return rows


@lru_cache(None)
def _embedding(family: type[nn.Module]) -> type[nn.Module]:
    """Return the class of an embedding that computes its rows."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        rows = _rows(_own(self), tokens)
        scale = getattr(self, "embed_scale", None)  # of gemma: its class multiplies the rows
        return rows if scale is None else rows * torch.as_tensor(scale).to(rows)

    return type(family.__name__, (family,), {"forward": forward, "weight": property(_table), LENT: None, "__module__": family.__module__})


@lru_cache(None)
def _head(family: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a head that computes logits without its table; a bias stays."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        own = _own(self)
        weights = own.weights
        logits: Tensor = own.technique.logits(own.config, own.place, weights, hidden.to(next(iter(weights.values())).device))
        return logits if self.bias is None else logits + self.bias

    return type(family.__name__, (family,), {"forward": forward, "weight": property(_table), LENT: None, "__module__": family.__module__})
