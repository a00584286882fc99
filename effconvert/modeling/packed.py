"""Several texts in one row, as in packed training. Each gets a row of its own, so mixers need not handle packing."""
# B = rows, T = tokens in a row, N = texts in all rows, L = tokens of the longest text, D = width.

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The positions of texts in packed rows."""

    slots: Tensor  # slot among the N x L of each token, [B, T]
    sources: Tensor  # token among the B x T in each slot, [N, L]; after the end of a text its last token
    live: Tensor  # which slots are inside a text, bool [N, L]

    @classmethod
    def from_starts(cls, starts: Tensor) -> "Packing | None":
        """Find the texts by their first tokens, bool [B, T]; None where no row has two texts."""
        if bool((starts.sum(1) < 2).all()):
            return None
        first = starts.flatten().nonzero()[:, 0]  # first token of each text, [N]
        lengths = torch.cat([first, first.new_tensor([starts.numel()])]).diff()
        position = torch.arange(int(lengths.max()), device=starts.device)
        live = position < lengths[:, None]
        sources = first[:, None] + position.minimum(lengths[:, None] - 1)
        slots = live.flatten().nonzero()[:, 0].view_as(starts)
        return cls(slots, sources, live)

    def split(self, rows: Tensor) -> Tensor:
        """Move each text of rows [B or 1, ..., T, D] to a row of its own: [N, ..., L, D]."""
        tokens = rows.expand(len(self.slots), *rows.shape[1:]).movedim(-2, 1).flatten(0, 1)  # [B*T, ..., D]
        texts: Tensor = tokens[self.sources].movedim(1, -2)
        return texts

    def join(self, texts: Tensor) -> Tensor:
        """Undo `split`: [N, ..., L, D] to [B, ..., T, D]."""
        rows: Tensor = texts.movedim(-2, 1).flatten(0, 1)[self.slots].movedim(1, -2)
        return rows
