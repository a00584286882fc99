"""The pairs of a head's dimensions that RoPE turns together: "halves" (j, j + n/2) or "interleaved" (2j, 2j + 1) of the first n, where others stand still."""
# P = n/2 pairs.

import torch
from torch import Tensor


def apart(rows: Tensor, rotary: int, layout: str, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Take rows apart along `dim`, in which the dimensions of a head lie: the first of each pair [P], the second [P], and what is in none."""
    turned, still = rows.split([rotary, rows.shape[dim] - rotary], dim)
    pairs = (2, rotary // 2) if layout == "halves" else (rotary // 2, 2)
    first, second = turned.unflatten(dim, pairs).unbind(dim - 1 if layout == "halves" else dim)
    return first, second, still


def together(first: Tensor, second: Tensor, still: Tensor, layout: str, dim: int = -1) -> Tensor:
    """Undo `apart`."""
    turned = torch.cat([first, second], dim) if layout == "halves" else torch.stack([first, second], dim).flatten(dim - 1, dim)
    return torch.cat([turned, still], dim)
