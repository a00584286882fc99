"""Short convolutions of tokens, and the rows of earlier tokens that convolutions read."""
# B = batch, G = heads, T = tokens, D = head width, S = tokens of a short convolution.

import torch
from torch import Tensor
from torch.nn.functional import pad

from effconvert.surgery.mixing._call import Call, padding_first, reorder


def near(call: Call, name: str, rows: Tensor, size: int) -> Tensor:
    """Return rows [B, G, T, D] with those that a convolution of `size` tokens, S, needs beside them, [B, G, T + S - 1, D]: before, or half on each side."""
    if call.causal:
        return behind(call, f"near_{name}", rows, size - 1, size - 1)[:, :, -rows.shape[2] - size + 1 :]
    return pad(rows.masked_fill(~call.live[:, None, :, None], 0), (0, 0, size // 2, size // 2))


def short(rows: Tensor, taps: Tensor) -> Tensor:
    """Convolve each channel of rows [B, G, T + S - 1, D] with its short filter, taps [G, D, S]: [B, G, T, D] in float32."""
    tokens = rows.shape[2] - taps.shape[-1] + 1
    sums: Tensor = sum(tap[:, None].float() * rows[:, :, at : at + tokens].float() for at, tap in enumerate(taps.unbind(-1)))  # type: ignore[assignment]
    return sums


def behind(call: Call, name: str, rows: Tensor, least: int, most: int | None) -> Tensor:
    """Return rows [B, G, T, D] behind those of earlier tokens, with zeros for padding, which comes first; keep the last `most` of them, or all."""
    old = call.read(name, {name: ((rows.shape[1], least, rows.shape[3]), "model")})
    both = torch.cat([old, rows.masked_fill(~call.live[:, None, :, None], 0)], 2)
    if call.padded and old.shape[2]:
        order = padding_first(torch.cat([call.live.new_ones(len(old), old.shape[2]), call.live], 1))
        both = reorder(both, order)
    call.write(**{name: both[:, :, 0 if most is None else max(both.shape[2] - most, 0) :].clone()})
    return both
