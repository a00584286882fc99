"""What mixers that decay with the distance have in common: decays fitted to attention, and outputs of its size."""
# B = batch, H = query heads, T = tokens, D = head width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from effconvert.checkpoint.layer import Layer

EPSILON = 1e-10  # of the norm of a head's outputs
OPEN = 1.2784645  # silu of it is 1
SHORTEST, LONGEST = 2.0**-3, 2.0**-12  # 1 - gamma of heads with the shortest reach, and with the longest
UNKNOWN = 2.0**-8  # that of heads whose attention tells nothing


def normed(sums: Tensor, gain: Tensor) -> Tensor:
    """Bring the sums of each token and head [B, H, T, D] to a root mean square of 1, times `gain` [H, D]."""
    scaled: Tensor = sums * (sums.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * gain.float()[:, None]
    return scaled


def gated(rows: Tensor, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Multiply rows [B, H, T, D] by silu(gate x + gate_bias) of hidden states [B, T, M]."""
    from torch.nn import functional

    gate = functional.linear(hidden, weights["gate"].to(hidden.dtype)).float() + weights["gate_bias"].float()
    opened: Tensor = rows * functional.silu(gate).unflatten(-1, (rows.shape[1], -1)).transpose(1, 2)
    return opened


def fitted(layer: Layer, values: Mapping[str, Tensor], name: str, stored: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
    """Return a mixer's parameters with decays as its attention falls with the distance, and gains for outputs of its size.

    Args:
        layer: with its activations.
        values: the parameters to begin with; decays whose attention tells nothing stay.
        name: the decays, of query heads or of KV heads, [H or Hk, ...].
        stored: what stands for a decay of 1 - far.
    """
    import torch

    attention, size = survey(layer)
    begun = values[name]
    far = fit_decay(attention.unflatten(0, (len(begun), -1)).sum(1)).view(-1, *[1] * (begun.ndim - 1))
    decay = torch.where(far.isnan(), begun.double(), stored(far)).float()
    return {**values, name: decay, "gain": size.float()[:, None].expand_as(values["gain"]).clone()}


def survey(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the attention of each head by distance [H, T // 2], and the root mean square of its outputs [H], both float64."""
    import torch

    assert layer.activations
    heads, attention, squares, count = layer.config.heads, torch.zeros(0), torch.zeros(layer.config.heads, dtype=torch.float64), 0
    for capture in layer.activations.capture(layer, ("o",), until="o"):
        assert capture.weights is not None
        batch = by_distance(capture.weights).double().cpu()  # [H, T // 2]
        attention = attention + batch if len(attention) else batch
        outputs = capture.inputs["o"].reshape(*capture.state.shape[:2], heads, -1)  # [B, T, H, D]
        squares += outputs.double().square().mean((1, 3)).sum(0).cpu()
        count += len(outputs)
    return attention, (squares / count).sqrt()


def by_distance(weights: Tensor) -> Tensor:
    """Sum attention [B, H, T, T] over the batch for each distance, [H, T // 2].

    Only the later half of the queries counts, which have all these distances: earlier ones share attention among fewer keys. This also leaves out the
    first token, an attention sink of many heads.
    """
    import torch

    tokens = weights.shape[-1]
    far = tokens // 2
    return torch.stack([weights[:, :, tokens - far :].diagonal(tokens - far - distance, -2, -1).sum((0, -1)) for distance in range(far)], -1)


def fit_decay(attention: Tensor) -> Tensor:
    """Return 1 - gamma of each head [H], by least squares of log attention [H, distances] on the distance; NaN where no two distances get attention.

    Distances are weighted by their attention, or the many distant ones with hardly any attention would decide.
    """
    import torch

    weight = attention / attention.sum(-1, keepdim=True).clamp_min(torch.finfo(attention.dtype).tiny)
    distance = torch.arange(attention.shape[-1], dtype=attention.dtype)
    log = attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
    off = distance - (weight * distance).sum(-1, keepdim=True)
    spread = (weight * off.square()).sum(-1)
    slope = (weight * off * log).sum(-1) / spread
    far = -torch.expm1(slope)
    return torch.where((attention > 0).sum(-1) > 1, far.clamp(LONGEST, SHORTEST), torch.nan)
