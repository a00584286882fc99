"""The pairs of dimensions that RoPE rotates in a head: "halves" (j, j + n/2) or "interleaved" (2j, 2j + 1) of the first n; the others it leaves alone."""
# P = n/2 pairs.

import torch
from torch import Tensor


def split_pairs(rows: Tensor, rotary: int, layout: str, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """Split rows along `dim`, the dimensions of a head: the first of each pair [P], the second [P], and the rest, which RoPE leaves alone."""
    rotary_rows, rest = rows.split([rotary, rows.shape[dim] - rotary], dim)
    pairs = (2, rotary // 2) if layout == "halves" else (rotary // 2, 2)
    first, second = rotary_rows.unflatten(dim, pairs).unbind(dim - 1 if layout == "halves" else dim)
    return first, second, rest


def join_pairs(first: Tensor, second: Tensor, rest: Tensor, layout: str, dim: int = -1) -> Tensor:
    """Undo `split_pairs`."""
    rotary_rows = torch.cat([first, second], dim) if layout == "halves" else torch.stack([first, second], dim).flatten(dim - 1, dim)
    return torch.cat([rotary_rows, rest], dim)
