"""Layers of a transformers model that share parameters, tied as transformers ties a head to the embedding."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from effconvert.checkpoint.config import Config


class Sharing:
    """Ties layers. Each has its own modules, and so its own cache layer; a shared parameter is in memory and on disk once."""

    all_tied_weights_keys: dict[str, str]
    _tied_weights_keys: Any
    _shared_keys: Mapping[str, str] = MappingProxyType({})  # name of a parameter -> the name under which it is stored

    def _share(self, layers: Sequence[nn.Module], config: Config) -> None:
        names = {module: name for name, module in self.named_modules()}  # type: ignore[attr-defined]
        self._shared_keys = {
            f"{names[layer]}.{name}": f"{names[layers[first]]}.{name}"
            for index, layer in enumerate(layers)
            for name, _ in layer.named_parameters()
            if (first := config.stored_in(index, name)) != index
        }
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **self._shared_keys}  # `save_pretrained` leaves these out
        self.all_tied_weights_keys = {**self.all_tied_weights_keys, **self._shared_keys}  # `from_pretrained` does not report these as missing
        self.tie_weights(recompute_mapping=False)  # type: ignore[attr-defined]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return the tied parameters: name -> name it is stored under. transformers returns none if `tie_word_embeddings` is off, which is for the head."""
        tied: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)  # type: ignore[misc]
        return {**tied, **self._shared_keys}

    def _adjust_bias(self, module: nn.Module, weight: Tensor) -> None:
        """Resize a bias to its weight, for the head only. Biases that layers share fit, and Conv1D's transposed weights would mislead this."""
        if module is self.get_output_embeddings():  # type: ignore[attr-defined]
            super()._adjust_bias(module, weight)  # type: ignore[misc]
