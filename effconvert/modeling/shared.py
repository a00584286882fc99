"""Layers of a model of transformers that compute with the very same parameters, tied as transformers ties a head to the embedding."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from effconvert.checkpoint.config import Config


class Sharing:
    """What ties layers: each has modules of its own, and so its own place in a cache; a parameter that they share is in memory and on disk once."""

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
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **self._shared_keys}  # what `save_pretrained` leaves out
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=False)  # what `from_pretrained` does not miss
        self.tie_weights(recompute_mapping=False)  # type: ignore[attr-defined]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Name the parameters that are others: name -> other; transformers names none where `tie_word_embeddings`, which speaks of the head alone, is off."""
        tied: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)  # type: ignore[misc]
        return {**tied, **self._shared_keys}

    def _adjust_bias(self, module: nn.Module, weight: Tensor) -> None:
        """Fit a bias to a table with other rows: of the head only, as what layers share fits, and Conv1D stores weights the other way round."""
        if module is self.get_output_embeddings():  # type: ignore[attr-defined]
            super()._adjust_bias(module, weight)  # type: ignore[misc]
