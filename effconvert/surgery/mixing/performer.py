"""Random features that estimate the softmax kernel (Performer)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, m = features, C = tokens in a chunk.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call, Slots


class Performer(Mixing):
    """Random features that estimate the softmax kernel (Performer).

    exp(q k / sqrt D) is the mean of products of random features of q and k. So attention needs no T^2 weights, and a decoder's state is a matrix of
    fixed size for each head. Nothing is trained, and no text is needed. The variance grows exponentially in the squared norms of queries and keys;
    these are large in language models, so quality is poor before they are trained again. Choromanski et al. 2020, arXiv 2009.14794.

    \b
    Examples:
      effconvert performer --features 256 google-bert/bert-base-uncased
      effconvert performer --features 256 --keep-softmax 0,-1 ./SmolLM2-135M -o ./performer
    """

    facts: ClassVar[Facts] = Facts("models that attend", saves="KV cache: a state of fixed size", native="", exact="")

    frozen = ("omega",)

    features: int = Field(ge=1, le=65536, description="Random features, m: the error falls with their square root.", json_schema_extra={"metavar": "M"})
    seed: int = Field(0, ge=0, lt=2**31, description="Random seed of the features.")

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The random projections; one set for all heads of a layer."""
        return {"omega": (self.features, config.head_dim)}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Random projections, different for each layer."""
        import torch

        return {"omega": orthogonal(self.features, config.head_dim, torch.Generator().manual_seed((self.seed << 16) + index)).float()}

    def cache_slots(self, config: Config) -> Slots:
        """The sum over all tokens, and the exponent of its scale."""
        if not config.decoder:
            return {}
        return {"state": ((config.kv_heads, 1, self.features, config.head_dim + 1), "float32"), "highest": ((config.kv_heads,), "float32")}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Apply the features to the values and to ones, and divide the two: scales of a query's features, or of all keys', cancel."""
        import torch
        from torch.nn import functional

        from effconvert.surgery.mixing._features import attend

        omega, root, lowest, tiny = weights["omega"].float(), call.scaling**0.5, torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny
        query = exponents(call.grouped.float() * root, omega)  # [B, Hk, R, T, m]
        query = (query - query.detach().amax(-1, keepdim=True)).exp()
        key = exponents(call.key.float() * root, omega).masked_fill(~call.live[:, None, :, None], -torch.inf)  # [B, Hk, T, m]
        height = key.detach().amax(-1).clamp_min(lowest)  # [B, Hk, T]
        if not call.causal:
            augmented = functional.pad(call.value.float(), (0, 1), value=1.0)  # [B, Hk, T, D + 1]: the ones give the normaliser
            key = (key - height.amax(-1)[..., None, None]).exp()
            sums = query @ (key.mT @ augmented)[:, :, None]
            output: Tensor = sums[..., :-1] / sums[..., -1:].clamp_min(tiny)
            return output.flatten(1, 2)
        # Keys are scaled by the largest exponent so far, and the state is scaled down as that rises. So no token depends on later ones.
        slots = {
            "state": ((key.shape[1], 1, len(omega), call.value.shape[-1] + 1), "float32"),
            "highest": ((key.shape[1],), "float32"),
        }
        state = call.read("state", slots)
        before = call.read("highest", slots).masked_fill(~state[..., -1].any(-1)[..., 0], lowest)  # no key came yet
        highest = torch.cat([before[..., None], height], -1).cummax(-1).values  # [B, Hk, 1 + T]
        fall = (highest[..., :-1] - highest[..., 1:]).masked_fill(highest[..., :-1] == lowest, 0)
        key = (key - highest[..., 1:, None]).exp()
        output, state = attend(query, key, call.value, state, fall[:, :, None], tiny, kernels=call.kernels)
        call.write(state=state, highest=highest[..., -1].clone())
        return output.flatten(1, 2)


def orthogonal(features: int, width: int, generator: Generator) -> Tensor:
    """Draw Gaussian rows [features, width], orthogonal within each block of `width` rows; float64."""
    import torch

    blocks = -(-features // width)
    q, r = torch.linalg.qr(torch.randn(blocks, width, width, generator=generator, dtype=torch.float64))
    rotations = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # the signs make it uniform over all rotations (Mezzadri 2007), and the estimate unbiased
    lengths = torch.randn(features, width, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    rows: Tensor = rotations.mT.flatten(0, 1)[:features] * lengths
    return rows


def exponents(rows: Tensor, omega: Tensor) -> Tensor:
    """Return log(phi sqrt m) of rows x [..., D]: omega x - |x|^2 / 2, [..., m]."""
    result: Tensor = rows @ omega.mT - rows.square().sum(-1, keepdim=True) / 2
    return result
