"""The layer of a transformers cache that holds what a mixer remembers."""
# B = batch.

from typing import Any

import torch
from torch import Tensor

from effconvert.modeling.transformers_internals import CacheLayerMixin
from effconvert.surgery.mixing._call import Slots


class State(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a transformers cache that holds what a mixer remembers: tensors of a fixed size, however many tokens went by, or that a mixer makes larger.

    Attributes:
        held: name -> tensor [B, ...].
        seen: tokens that went by, padding among them.
    """

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots, self.held, self.seen = slots, dict[str, Tensor](), 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for a batch like this."""
        for name, (shape, kind) in self.slots.items():
            dtype = key_states.dtype if kind == "model" else getattr(torch, kind)
            self.held[name] = torch.zeros(len(key_states), *shape, dtype=dtype, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Count the tokens; the mixer takes what it wants of them itself."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Have masks reach back to the first token: softmax layers may share them."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that went by."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.held, self.seen, self.is_initialized = {}, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self.held = {name: tensor.index_select(0, indices.to(tensor.device)) for name, tensor in self.held.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self.held = {name: tensor.repeat_interleave(repeats, 0) for name, tensor in self.held.items()}

    def crop(self, tokens: int, *_: int) -> None:  # transformers' own caches refuse by this error, and its callers know it
        """Refuse: what was mixed into a state cannot be taken out again; where nothing is held, forget -`tokens` (in old versions all but `tokens`)."""
        if not self.slots:
            self.seen = min(self.seen, tokens if tokens > 0 else max(0, self.seen + tokens))
            return
        raise NotImplementedError("a mixer's state cannot be cropped to earlier tokens; assisted generation and prompt lookup need softmax layers only")

    def offload(self) -> None:
        """Stay: the mixer is about to use it, and it is small."""

    def prefetch(self) -> None:
        """Nothing was offloaded."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.held.values())
