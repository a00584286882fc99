"""Filters that are sums of decaying waves, which a recurrence computes: fitted to other filters, and run.

h(0) = own, and h(t) = sum over k of d_k exp(-d_k (t - 1)) (a_k cos(w_k (t - 1)) + b_k sin(w_k (t - 1))) for t > 0. Filters of one group have the same decays d
and turns w. So the state of a group is that of one filter: a complex number for each wave, the sum of earlier rows, turned and faded.
Massaroli et al. 2023, arXiv 2310.18780, section 3. Decays and turns by Kung's realisation (1978): balanced truncation of the Hankel matrix of known lags.
"""
# B = batch, G = groups of filters, R = filters of a group, K = waves, N = numbers of the state: 2 K, T = tokens, C = tokens of a chunk, D = head width,
# n = lags.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

CHUNK = 128
SLOWEST, FASTEST = 0.25, 8.0  # decays: over all lags that are known, and over one token
STILL = 1 / 8  # least turn, in decays: a wave that is nearly an exponential
RANK, RIDGE, TINY = 1e-6, 1e-5, 1e-30  # of the largest singular value; of the Gram matrix's diagonal; the least ridge


@dataclass(frozen=True)
class Waves:
    """Filters of G groups."""

    fall: Tensor  # d, [G, K]
    turn: Tensor  # w, [G, K]
    cosines: Tensor  # d a, [G, R, K]
    sines: Tensor  # d b, [G, R, K]
    own: Tensor  # [G, R]

    @classmethod
    def stored(cls, weights: Mapping[str, Tensor], number: int, filters: slice) -> Self:
        """Return the filters of convolution `number`, whose rows among those of all are `filters`, in float32 or float64.

        A decay is stored so that it stays above 0 and a turn between 0 and pi, and both so that equal steps are equal shares of them.
        """
        exact = torch.promote_types(weights["fall"].dtype, torch.float32)
        fall, turn = (weights[name][number].to(exact) for name in ("fall", "turn"))
        own, cosines, sines = (weights[name][filters].to(exact).unflatten(0, (len(fall), -1)) for name in ("own", "cosines", "sines"))
        fall, turn = softplus(fall), math.pi * turn.sigmoid()
        return cls(fall, turn, fall[:, None] * cosines, fall[:, None] * sines, own)

    def taps(self, count: int) -> Tensor:
        """Return the filters for the lags from 0 to `count` - 1, [G, R, n]."""
        later = self.readout(torch.arange(count - 1, device=self.fall.device)[None])[0, ..., : self.fall.shape[1]].sum(-1)
        return torch.cat([self.own[..., None], later], -1)

    def powers(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the real and the imaginary part of exp((-d + i w) steps), for steps [B or 1, n]: [B or 1, G, K, n]."""
        times = steps[:, None, None].to(self.fall.dtype)
        size, angle = (-self.fall[..., None] * times).exp(), self.turn[..., None] * times
        return size * angle.cos(), size * angle.sin()

    def readout(self, steps: Tensor) -> Tensor:
        """Return what the state counts for in outputs that many steps after the next token's, for steps [B or 1, n]: [B or 1, G, R, n, N]."""
        real, imaginary = (part[:, :, None] for part in self.powers(steps))
        cosines, sines = self.cosines[..., None], self.sines[..., None]
        return torch.cat([cosines * real + sines * imaginary, sines * real - cosines * imaginary], 3).mT


def recur(waves: Waves, rows: Tensor, state: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return the filtered rows [B, G R, T, D], and the state after them. One token is a step of the recurrence; more go in chunks, by a matrix of lags.

    Args:
        waves: the filters.
        rows: [B, G, T, D], zeros for padding.
        state: real parts, then imaginary ones, [B, G, N, D].
        live: which rows are not padding, bool [B or 1, T]; padding is in front.
    """
    size, outputs = min(CHUNK, rows.shape[2]), []
    taps = pad(waves.taps(size), (size - 1, 0))
    matrix = taps.flip(-1).unfold(-1, size, 1).flip(2)  # [G, R, C, C]
    for start in range(0, rows.shape[2], size):
        new, steps = rows[:, :, start : start + size], live[:, start : start + size].cumsum(1)
        count = new.shape[2]
        near = matrix[:, :, :count, :count].flatten(1, 2) @ new
        far = waves.readout((steps - 1).clamp_min(0)).flatten(2, 3) @ state
        outputs.append((near + far).unflatten(2, (-1, count)).flatten(1, 2))
        state = _turned(state, *waves.powers(steps[:, -1:])) + torch.cat(waves.powers(torch.arange(count - 1, -1, -1, device=rows.device)[None]), 2) @ new
    return torch.cat(outputs, 2), state


def _turned(state: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """Multiply a state [B, G, N, D] by complex numbers, [B or 1, G, K, 1] each part."""
    one, other = state.chunk(2, 2)
    return torch.cat([one * real - other * imaginary, one * imaginary + other * real], 2)


def shapes(convolutions: int, groups: int, filters: int, waves: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters of some filters."""
    poles, sizes = (convolutions, groups, waves), (filters, waves)
    return {"fall": poles, "turn": poles, "cosines": sizes, "sines": sizes, "own": (filters,)}


def fitted(targets: Sequence[Tensor], waves: int) -> dict[str, Tensor]:
    """Return the parameters, float32, whose filters come close to those of each convolution, `targets` [G, R, n] each; at lag 0 they are equal.

    Decays and turns come from the filters, and then the sizes of the waves by least squares.
    """
    each = [_fitted(taps.double(), waves) for taps in targets]
    join = {name: torch.stack if name in ("fall", "turn") else torch.cat for name in each[0]}
    return {name: join[name]([values[name] for values in each]).float() for name in join}


def _fitted(taps: Tensor, waves: int) -> dict[str, Tensor]:
    """Return the parameters of one convolution: fall and turn [G, K], the others [G R, ...]."""
    poles = [_poles(group[:, 1:], waves) for group in taps]
    # Rounded to what every type can store, since the sizes are fitted to that.
    fall = torch.stack([decay.expm1().log() for decay, _ in poles]).bfloat16().double()
    turn = torch.stack([(angle / math.pi).logit() for _, angle in poles]).bfloat16().double()
    decay = softplus(fall)
    bare = Waves(decay, math.pi * turn.sigmoid(), *(decay.new_zeros(len(decay), 1, waves),) * 2, decay.new_zeros(len(decay), 1))
    inputs = torch.cat(bare.powers(torch.arange(taps.shape[-1] - 1)[None]), 2)[0] * decay.repeat(1, 2)[..., None]  # [G, N, n - 1]
    gram = inputs @ inputs.mT
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1) + TINY
    sizes = torch.linalg.solve(gram + ridge.diag_embed(), inputs @ taps[..., 1:].mT).mT.flatten(0, 1)  # [G R, N]
    return {"fall": fall, "turn": turn, "cosines": sizes[:, :waves], "sines": sizes[:, waves:], "own": taps[..., 0].flatten()}


def _poles(taps: Tensor, waves: int) -> tuple[Tensor, Tensor]:
    """Return the decays and turns [K] of waves that filters [R, n] consist of, from lag 1 on; where they consist of fewer, others are added."""
    lags = taps.shape[1]
    poles = _modes(taps, waves)
    decay = torch.cat([-poles.abs().clamp_min(TINY).log(), 2.0 ** -torch.linspace(0, 8, waves).double()[: waves - len(poles)]])
    decay = decay.clamp(min(SLOWEST / max(lags, 1), FASTEST), FASTEST)
    angle = torch.cat([poles.angle().abs(), torch.zeros(waves - len(poles)).double()])
    return decay, torch.maximum(angle, STILL * decay).clamp(max=math.pi * (1 - 2.0**-8))


def _modes(taps: Tensor, most: int) -> Tensor:
    """Return complex numbers whose powers filters [R, n] are sums of, as near as `most` of them come; of two conjugate ones the one above."""
    rows = taps.shape[1] // 2
    hankel = taps.unfold(1, taps.shape[1] - rows + 1, 1).flatten(0, 1) if rows > 1 else taps.new_zeros(1, 1)  # [R n / 2, n / 2]
    left, sizes, _ = torch.linalg.svd(hankel, full_matrices=False)
    rank = min(int((sizes > RANK * sizes[0]).sum()), 2 * most, len(taps) * (rows - 1))
    for order in range(rank, 0, -1):
        seen = (left[:, :order] * sizes[:order].sqrt()).unflatten(0, (len(taps), rows))
        step = torch.linalg.lstsq(seen[:, :-1].flatten(0, 1), seen[:, 1:].flatten(0, 1)).solution  # the state's matrix of one token to the next
        modes = torch.linalg.eigvals(step)
        upper: Tensor = modes[modes.imag >= 0]
        if len(upper) <= most:
            return upper
    return taps.new_zeros(0, dtype=torch.complex128)
