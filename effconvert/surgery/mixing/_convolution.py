"""Long convolutions of tokens, and the filter that is closest to attention.

A filter has a number for each lag: the distance from a token back to another, negative where the other one comes later.
"""
# B = batch, H = filters, Hk = KV heads, R = filters that share one, T = tokens, N = tokens with those before, D = head width, n = lags of a filter.

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

DIRECT = 128  # tokens up to which a matrix of lags is multiplied, which a processor does sooner than a transform


@dataclass(frozen=True)
class Filter:
    """Filters [H, n] for lags from `first` on; 0 at all others."""

    taps: Tensor
    first: int

    def at(self, first: int, last: int) -> Tensor:
        """Return the numbers for the lags from `first` to `last`."""
        taps: Tensor = pad(self.taps, (self.first - first, last - (self.first + self.taps.shape[-1] - 1)))
        return taps


def convolve(rows: Tensor, filters: Filter, tokens: int) -> Tensor:
    """Return the filtered rows of the last `tokens` tokens, [B, H, T, D] in float32, from those of all, [B, Hk, N, D]: sum over s of h(t - s) rows(s)."""
    lags, rows = filters.at(1 - tokens, rows.shape[2] - 1).float().unflatten(0, (rows.shape[1], -1)), rows.float()  # [Hk, R, N + T - 1]
    return by_matrix(rows, lags, tokens) if tokens <= DIRECT else by_transform(rows, lags, tokens, lags.shape[-1])


def by_matrix(rows: Tensor, lags: Tensor, tokens: int) -> Tensor:
    """Multiply by the matrix of lags, [T, N] for each filter: see `convolve`."""
    matrix = lags.flip(-1).unfold(-1, rows.shape[2], 1).flip(-2)  # [Hk, R, T, N]
    product: Tensor = (matrix.flatten(1, 2) @ rows).unflatten(2, (-1, tokens)).flatten(1, 2)
    return product


def by_transform(rows: Tensor, lags: Tensor, tokens: int, least: int) -> Tensor:
    """Multiply Fourier transforms of `least` points or more: see `convolve`. With fewer points than lags, what leaves at one end comes in at the other."""
    size = 1 << (least - 1).bit_length()
    spectrum = torch.fft.rfft(rows, size, dim=2)[:, :, None] * torch.fft.rfft(lags, size)[..., None]  # [B, Hk, R, size / 2 + 1, D]
    sums: Tensor = torch.fft.irfft(spectrum, size, dim=3)
    new: Tensor = sums[:, :, :, rows.shape[2] - 1 :][:, :, :, :tokens].flatten(1, 2)
    return new


def sums_by_lag(matrix: Tensor) -> Tensor:
    """Sum a matrix [..., T, T] along its diagonals: [..., 2 T - 1], for lags from 1 - T on."""
    size = matrix.shape[-1]
    skewed = pad(matrix.flip(-1), (0, size)).flatten(-2)[..., :-size].unflatten(-1, (size, 2 * size - 1))  # diagonals are columns
    sums: Tensor = skewed.sum(-2)
    return sums


def mean_by_lag(batches: Iterable[Tensor], causal: bool) -> Filter:
    """Return the mean of attention at each lag in float64, from weights [B, H, T, T]: of all filters it is closest to them.

    Lags reach over half of a text. Of decoders only the later half of the queries counts, which have all these lags: earlier ones share their attention among
    fewer keys, and much of it is the first key's.
    """
    sums = []
    for weights in batches:
        tokens = weights.shape[-1]
        counted = (torch.arange(tokens) >= (tokens // 2 if causal else 0)).double()[:, None].expand(-1, tokens)
        pairs = torch.cat([weights.double().sum(0).cpu() * counted, len(weights) * counted[None]])  # [H + 1, T, T]
        reach = max(tokens // 2, 1)
        sums.append(Filter(sums_by_lag(pairs)[:, tokens - reach : tokens + reach - 1], 1 - reach))
    furthest = -min(each.first for each in sums)
    total = torch.stack([each.at(0 if causal else -furthest, furthest) for each in sums]).sum(0)
    return Filter(total[:-1] / total[-1], 0 if causal else -furthest)
