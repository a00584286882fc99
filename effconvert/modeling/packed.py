"""Several texts in one row, as training packs them: a mixer gets each in a row of its own, and need not know."""
# B = rows, T = tokens in a row, N = texts in all rows, L = tokens of the longest text, D = width.

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the texts of packed rows are."""

    slots: Tensor  # of each token among the N x L, [B, T]
    sources: Tensor  # token of the B x T that is in each slot, [N, L]; behind a text its last one
    live: Tensor  # which slots are not behind a text, bool [N, L]

    @classmethod
    def seen(cls, begins: Tensor) -> "Packing | None":
        """Find the texts by the tokens that begin one, bool [B, T]; None where no row has two."""
        if bool((begins.sum(1) < 2).all()):
            return None
        first = begins.flatten().nonzero()[:, 0]  # token that each text begins with, [N]
        lengths = torch.cat([first, first.new_tensor([begins.numel()])]).diff()
        place = torch.arange(int(lengths.max()), device=begins.device)
        live = place < lengths[:, None]
        sources = first[:, None] + place.minimum(lengths[:, None] - 1)
        slots = live.flatten().nonzero()[:, 0].view_as(begins)
        return cls(slots, sources, live)

    def apart(self, rows: Tensor) -> Tensor:
        """Put each text of rows [B or 1, ..., T, D] in a row of its own: [N, ..., L, D]."""
        tokens = rows.expand(len(self.slots), *rows.shape[1:]).movedim(-2, 1).flatten(0, 1)  # [B*T, ..., D]
        texts: Tensor = tokens[self.sources].movedim(1, -2)
        return texts

    def together(self, texts: Tensor) -> Tensor:
        """Go back: [N, ..., L, D] to [B, ..., T, D]."""
        rows: Tensor = texts.movedim(-2, 1).flatten(0, 1)[self.slots].movedim(1, -2)
        return rows
