"""Random features that estimate the softmax kernel (Performer)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, m = features, C = tokens in a chunk.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call, Slots


class Performer(Mixing):
    """Random features that estimate the softmax kernel (Performer).

    exp(q k / sqrt D) is the mean of a product of features of q and of k, so attention is computed without its T^2 weights, and what a decoder remembers is
    a matrix of fixed size a head. Nothing is trained, and no text is needed. How far off it is depends on the size of queries and keys: the variance
    grows exponentially in their squared norms, and language models have large ones, so little of them is left before they are trained again.
    Choromanski et al. 2020, arXiv 2009.14794.

    \b
    Examples:
      effconvert performer --features 256 google-bert/bert-base-uncased
      effconvert performer --features 256 --keep-softmax 0,-1 ./SmolLM2-135M -o ./performer
    """

    frozen = ("omega",)

    features: int = Field(ge=1, le=65536, description="Random features, m: the error falls with their square root.", json_schema_extra={"metavar": "M"})
    seed: int = Field(0, ge=0, lt=2**31, description="What the features are drawn by.")

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The projections that the features are made of; one set for all heads of a layer."""
        return {"omega": (self.features, config.head_dim)}

    def begin(self, config: Config, index: int) -> Mapping[str, Tensor]:
        """Draw them: others for each layer."""
        import torch

        return {"omega": orthogonal(self.features, config.head_dim, torch.Generator().manual_seed((self.seed << 16) + index)).float()}

    def remembers(self, config: Config) -> Slots:
        """The sum over all tokens, and the exponent that it is scaled down by."""
        if not config.family.decoder:
            return {}
        return {"state": ((config.kv_heads, 1, self.features, config.head_dim + 1), "float32"), "highest": ((config.kv_heads,), "float32")}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Divide what the features give of the values by what they give of ones: whatever a query's features, or those of all keys, are scaled by cancels."""
        import torch
        from torch.nn import functional

        from effconvert.kernels.linear_attention import linear_attention

        omega, root, lowest = weights["omega"].float(), call.scaling**0.5, torch.finfo(torch.float32).min
        query = exponents(call.grouped.float() * root, omega)  # [B, Hk, R, T, m]
        query = (query - query.detach().amax(-1, keepdim=True)).exp()
        key = exponents(call.key.float() * root, omega).masked_fill(~call.live[:, None, :, None], -torch.inf)  # [B, Hk, T, m]
        height = key.detach().amax(-1).clamp_min(lowest)  # [B, Hk, T]
        known = functional.pad(call.value.float(), (0, 1), value=1.0)  # [B, Hk, T, D + 1]: of ones the normaliser
        if not call.causal:
            key = (key - height.amax(-1)[..., None, None]).exp()
            made = query @ (key.mT @ known)[:, :, None]
        else:
            # Keys are scaled by the largest exponent so far. What is remembered is scaled down as that rises, and so is no token touched by later ones.
            slots = {"state": ((known.shape[1], 1, len(omega), known.shape[-1]), "float32"), "highest": ((known.shape[1],), "float32")}
            state = call.read("state", slots)
            before = call.read("highest", slots).masked_fill(~state[..., -1].any(-1)[..., 0], lowest)  # no key came yet
            highest = torch.cat([before[..., None], height], -1).cummax(-1).values  # [B, Hk, 1 + T]
            fall = (highest[..., :-1] - highest[..., 1:]).masked_fill(highest[..., :-1] == lowest, 0)
            key = (key - highest[..., 1:, None]).exp()
            made, state = linear_attention(query, key[:, :, None], known, state, fall[:, :, None])
            call.write(state=state, highest=highest[..., -1].clone())
        mixed: Tensor = (made[..., :-1] / made[..., -1:].clamp_min(torch.finfo(torch.float32).tiny)).flatten(1, 2)
        return mixed


def orthogonal(features: int, width: int, draw: Generator) -> Tensor:
    """Draw rows [features, width] that are each Gaussian, and orthogonal to the others of their block of `width` rows; float64."""
    import torch

    blocks = -(-features // width)
    q, r = torch.linalg.qr(torch.randn(blocks, width, width, generator=draw, dtype=torch.float64))
    turned = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # only so is it uniform over all rotations (Mezzadri 2007): else the estimate is biased
    lengths = torch.randn(features, width, generator=draw, dtype=torch.float64).norm(dim=-1, keepdim=True)
    drawn: Tensor = turned.mT.flatten(0, 1)[:features] * lengths
    return drawn


def exponents(rows: Tensor, omega: Tensor) -> Tensor:
    """Return log(phi sqrt m) of rows x [..., D]: omega x - |x|^2 / 2, [..., m]."""
    made: Tensor = rows @ omega.mT - rows.square().sum(-1, keepdim=True) / 2
    return made
