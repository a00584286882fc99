"""The order in which tokens are read: padding first, and several texts in one row (packed training) each in a row of its own, so no technique sees either."""
# B = rows, T = tokens in a row, N = texts in all rows, L = tokens of the longest text, D = width.

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effconvert.surgery.mixing._call import padding_first, reorder


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


@dataclass(frozen=True)
class Arranged:
    """The tokens of a call in the order in which they are read."""

    live: Tensor  # which are no padding, in that order, bool [B, T]
    packing: Packing | None  # None: a text in each row
    order: Tensor | None  # of tokens, [B, T]; None: as they came

    def rows(self, rows: Tensor) -> Tensor:
        """Arrange rows [B, ..., T, D]."""
        rows = self.packing.split(rows) if self.packing else rows
        return rows if self.order is None else reorder(rows, self.order)

    def back(self, rows: Tensor) -> Tensor:
        """Undo `rows`."""
        rows = rows if self.order is None else reorder(rows, self.order.argsort(1))
        return self.packing.join(rows) if self.packing else rows


def arrange(mask: Tensor | None, like: Tensor, causal: bool, alone: bool) -> Arranged:
    """Arrange the new tokens of a call.

    Args:
        mask: of attention, [B, 1, T, N], of any kind; None: nothing is hidden but later tokens.
        like: rows [B, ..., T, D].
        causal: whether live tokens have to stand side by side.
        alone: whether no tokens came before, so that there may be several texts in a row.
    """
    batch, tokens = len(like), like.shape[-2]
    live = _visible(mask, 0, tokens, batch, like.device)
    order = packing = None
    if causal and mask is not None and alone and (packing := _packing(mask, live)):
        live = packing.live
    if causal and mask is not None and live.shape[1] > 1:  # move padding to the front, so that live tokens are contiguous
        order = padding_first(live)
        live = live.gather(1, order)
    return Arranged(live, packing, order)


def _visible(mask: Tensor | None, back: int, tokens: int, batch: int, device: torch.device) -> Tensor:
    """Return which new tokens may see the token `back` before them, [B, T - back]. Padding may not even see itself."""
    if mask is None:
        return torch.ones(batch, tokens - back, dtype=torch.bool, device=device)
    diagonal = mask[:, 0].diagonal(mask.shape[-1] - tokens - back, -2, -1)
    return (diagonal if mask.dtype == torch.bool else diagonal == 0).expand(batch, -1)


def _packing(mask: Tensor, live: Tensor) -> Packing | None:
    """Find texts that share a row, where no token is padding: the first token of each text may not see the token before it."""
    if not bool(live.all()):
        return None
    follows = _visible(mask, 1, live.shape[1], len(live), live.device)
    return Packing.from_starts(live & ~nn.functional.pad(follows, (1, 0)))
