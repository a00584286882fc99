"""The pairs of dimensions that RoPE rotates in a head: "halves" (j, j + n/2) or "interleaved" (2j, 2j + 1) of the first n; the others it leaves alone."""
# P = n/2 pairs, D = head width.

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


def laid_out_anew(rows: Tensor, rotary: int, layout: str, new_rotary: int, new_layout: str, dim: int = -1) -> Tensor:
    """Put the dimensions of a head [D] into another order, in which the same pairs have the same numbers.

    Where more of them are rotary afterwards, the first of the rest fill up the pairs; where fewer are, the last pairs go to the front of the rest. So a
    second call with the sizes exchanged undoes the first.
    """
    first, second, rest = split_pairs(rows, rotary, layout, dim)
    pairs, new = rotary // 2, new_rotary // 2
    if new > pairs:
        more, other, rest = rest.split([new - pairs, new - pairs, rest.shape[dim] - 2 * (new - pairs)], dim)
        first, second = torch.cat([first, more], dim), torch.cat([second, other], dim)
    else:
        (first, fewer), (second, other) = (part.split([new, pairs - new], dim) for part in (first, second))
        rest = torch.cat([fewer, other, rest], dim)
    return join_pairs(first, second, rest, new_layout, dim)
