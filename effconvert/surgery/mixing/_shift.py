"""RWKV's token shift: each token's rows mixed with those of the token before."""
# B = batch, T = tokens.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.surgery.mixing._call import Call


def shifted(call: Call, slot: str, rows: Tensor, *shares: Tensor) -> list[Tensor]:
    """Mix rows with those of the last live token before, zeros before the first; one result for each of `shares`.

    Args:
        call: whose live tokens stand last.
        slot: where the state keeps the last row, [B, ...].
        rows: [B, ..., T, width].
        shares: of the token before, that of channels [..., 1, width] or [width].
    """
    import torch
    from torch.nn import functional

    earlier = call.read(slot, {slot: ((*rows.shape[1:-2], rows.shape[-1]), "model")}).to(rows.dtype)
    live = call.live.view(len(rows), *[1] * (rows.ndim - 3), -1, 1)
    before = torch.cat([earlier.unsqueeze(-2), rows[..., :-1, :]], -2)
    before = torch.where(functional.pad(live[..., :-1, :], (0, 0, 1, 0)), before, earlier.unsqueeze(-2))
    call.write(**{slot: torch.where(live[..., -1, :], rows[..., -1, :], earlier)})
    return [rows + (before - rows) * share.to(rows.dtype) for share in shares]
