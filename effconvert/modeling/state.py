"""The layer of a transformers cache with the state of a mixer."""
# B = batch.

from typing import Any

import torch
from torch import Tensor

from effconvert.modeling.transformers_internals import CacheLayerMixin
from effconvert.surgery.mixing._call import Slots


class State(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a transformers cache with the state of a mixer: tensors of a fixed size, or that the mixer makes larger.

    Attributes:
        tensors: name -> tensor [B, ...].
        tokens: number of tokens so far, padding included.
    """

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots, self.tensors, self.tokens = slots, dict[str, Tensor](), 0

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be removed: from a count alone."""
        return not self.slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the tensors for a batch of this size."""
        for name, (shape, kind) in self.slots.items():
            dtype = key_states.dtype if kind == "model" else getattr(torch, kind)
            self.tensors[name] = torch.zeros(len(key_states), *shape, dtype=dtype, device=key_states.device)
        self.is_initialized = True

    def to(self, dtype: torch.dtype) -> None:
        """Change the type of the tensors that are of the model's."""
        self.tensors |= {name: self.tensors[name].to(dtype) for name, (_, kind) in self.slots.items() if kind == "model" and name in self.tensors}

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Count the tokens; the mixer updates the tensors itself."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.tokens += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Let masks reach back to the first token, since softmax layers may share them."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return self.tokens

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Drop all tensors and the count."""
        self.tensors, self.tokens, self.is_initialized = {}, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences to those of the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self.tensors = {name: tensor.index_select(0, indices.to(tensor.device)) for name, tensor in self.tensors.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self.tensors = {name: tensor.repeat_interleave(repeats, 0) for name, tensor in self.tensors.items()}

    def crop(self, tokens: int, *_: int) -> None:
        """Refuse, since tokens cannot be removed from a state. Without tensors, subtract -`tokens` (in old versions keep `tokens`)."""
        if not self.slots:
            self.tokens = min(self.tokens, tokens if tokens > 0 else max(0, self.tokens + tokens))
            return
        # The error with which transformers' own caches refuse this; its callers catch it.
        raise NotImplementedError("a mixer's state cannot be cropped to earlier tokens; assisted generation and prompt lookup need softmax layers only")

    def offload(self) -> None:
        """Do nothing: the state is small, and the mixer needs it next."""

    def prefetch(self) -> None:
        """Do nothing: it was not offloaded."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
