"""Project keys and values block by block (block-causal Linformer)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, P = tokens before these, S = block, K = rank,
# N = sinks, U = Hk, or 1 where shared, G = blocks with tokens of a call, C = most blocks that can be finished by now, Q = queries of a block: S, or 1 while
# decoding.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing
from effconvert.surgery.mixing.linformer import ROPE_MEANS, segment_means

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call, Slots


class LinformerCausal(Mixing):
    """Project keys and values block by block (block-causal Linformer).

    An extension of Linformer to decoders that is not in its paper. One softmax covers the tokens of a query's own block of S, the first tokens of the
    text, and K mixtures of the other keys and values of each earlier block, made by two matrices of K x S. So the cache grows by K for S tokens. Each
    head adds a trainable number to its scores of mixtures; it starts as log(S / K), as a mixture stands for S / K tokens. Exact where K is S. Layers
    with a sliding window stay as they are. After Wang et al. 2020, arXiv 2006.04768; first tokens: Xiao et al. 2023, arXiv 2309.17453.

    \b
    Examples:
      effconvert linformer-causal --rank 16 ./SmolLM2-135M -o ./linformer
      effconvert linformer-causal --block 128 --rank 16 --keep-softmax 0,-1 ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("decoders", saves="KV cache: it grows more slowly", native="", exact="with --rank as many as --block")

    no_encoders = "keeps what was before a token from what comes after it; encoders see all of a text at once: linformer and nystrom are for them"
    softcaps = True
    leaves_windows = True

    block: int = Field(64, ge=2, description="Tokens of a block, S.", json_schema_extra={"metavar": "S"})
    rank: int = Field(ge=1, description="Mixtures of keys and values for a finished block, K.", json_schema_extra={"metavar": "K"})
    sinks: int = Field(4, ge=0, description="First tokens of the text that all tokens see unmixed.", json_schema_extra={"metavar": "N"})
    share: Literal["none", "headwise", "key-value"] = Field(
        "headwise",
        description="Matrices: one for keys and one for values, for each KV head (none) or for all heads of a layer (headwise); or one for both (key-value).",
    )

    @model_validator(mode="after")
    def _sound(self) -> LinformerCausal:
        if self.rank > self.block:
            raise ValueError(f"--rank {self.rank} is more than the {self.block} tokens of a block; give at most {self.block}, which is exact")
        if self.sinks > self.block:
            raise ValueError(f"--sinks {self.sinks} are more than the {self.block} tokens of a block; give at most {self.block}")
        return self

    def is_exact(self, config: Config) -> bool:
        """Where each mixture is one token."""
        return self.rank == self.block

    def notes(self, config: Config) -> str:
        """Warn of mixtures of rotated keys."""
        return ROPE_MEANS if config.family.rope and self.rank < self.block else ""

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The matrices of a block, E for keys and F for values, and the number added to scores of mixtures."""
        shape = (config.kv_heads if self.share == "none" else 1, self.rank, self.block)
        maps = {"key_map": shape} if self.share == "key-value" else {"key_map": shape, "value_map": shape}
        return {**maps, "weight": (config.heads,)}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Means of consecutive tokens, weighted by their number of tokens."""
        import torch

        means, weight = segment_means(self.rank, self.block), math.log(self.block / self.rank)
        shapes = self.parameters(config)
        return {name: torch.full(shape, weight) if name == "weight" else means.expand(shape).clone() for name, shape in shapes.items()}

    def cache_slots(self, config: Config) -> Slots:
        """The tokens of the unfinished block, the sinks, the number of tokens, and the mixtures, which grow from none."""
        from effconvert.surgery.mixing._call import past, sinks

        heads = config.kv_heads, config.head_dim
        mixtures = ((config.kv_heads, 0, config.head_dim), "model")
        return {**past(self.block - 1, *heads), **sinks(self.sinks, *heads), "count": ((), "int64"), "mixed_key": mixtures, "mixed_value": mixtures}

    def cache_bytes(self, config: Config, itemsize: int, context: int = 0) -> int:
        """Return the bytes of the slots and of K keys and values for each finished block."""
        return super().cache_bytes(config, itemsize) + context // self.block * self._block_bytes(config, itemsize)

    def token_bytes(self, config: Config, itemsize: int) -> float:
        """Return a token's share of the mixtures of its block."""
        return self._block_bytes(config, itemsize) / self.block

    def _block_bytes(self, config: Config, itemsize: int) -> int:
        return 2 * config.kv_heads * self.rank * config.head_dim * itemsize

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """One softmax over the tokens of a query's own block, the sinks, and the mixtures of earlier blocks.

        A token's position among live tokens gives its block. Live tokens are last in the call and next to each other, so the position also gives the row.
        """
        import torch

        from effconvert.surgery.mixing._call import reorder

        size, tokens, device, least = self.block, call.query.shape[-2], call.key.device, torch.finfo(torch.float32).min
        call = call.prescaled
        positions = call.positions()  # [B, T]
        key, value, _ = call.with_window(size - 1)  # [B, Hk, P + T, D]
        count = positions[:, -1:] + 1  # [B, 1], live tokens so far
        first = (count - call.live.sum(1, keepdim=True)) // size  # [B, 1], the block of the first new token
        reach = -(-(tokens + size - 1) // size)  # G
        cells = size * first + torch.arange(reach * size, device=device) - count  # [B, G S]: the cells of these blocks; existing tokens count back from -1
        near_key, near_value = (reorder(rows, (cells + rows.shape[-2]).clamp(0, rows.shape[-2] - 1)).unflatten(2, (reach, size)) for rows in (key, value))
        if tokens == 1:
            query, place = call.grouped[:, :, :, None], positions - size * first  # [B, Hk, R, G, Q, D], [B, Q]: positions of queries in their block
        else:
            query = reorder(call.grouped, (cells + tokens).clamp(0, tokens - 1)).unflatten(3, (reach, size))
            place = torch.arange(size, device=device)[None]
        own = first + torch.arange(reach, device=device)  # [B, G]
        mixed_key = self._mixtures(call, "mixed_key", weights["key_map"], near_key, own)  # [B, Hk, C K, D]
        mixed_value = self._mixtures(call, "mixed_value", weights.get("value_map", weights["key_map"]), near_value, own)
        far_key, far_value = (
            torch.cat(both, 2) for both in zip(call.first_tokens(self.sinks, positions), (mixed_key, mixed_value), strict=True)
        )  # [B, Hk, N + C K, D]
        visible = torch.arange(size, device=device) <= place[..., None]  # [B or 1, Q, S]
        number = torch.arange(mixed_key.shape[2], device=device)  # [C K], of each mixture
        over = number // self.rank < own[..., None]  # [B, G, C K]: whether the mixture is of an earlier block
        fewer = self._first_block_share(device).log().clamp_min(least)[number.clamp_max(self.rank - 1)]  # in the first block the sinks are not mixed
        weight = weights["weight"].float().unflatten(0, (key.shape[1], 1, -1, 1, 1)) + torch.where(number < self.rank, fewer, 0.0)  # [Hk, 1, R, 1, C K]
        near_bias = torch.where(visible[:, None, None, None], 0.0, least)  # [B or 1, 1, 1, 1, Q, S]
        far_bias = torch.where(over[:, None, :, None, None], weight, least)  # [B, Hk, G, R, 1, C K]
        sink_bias = torch.where(own > 0, 0.0, least)[:, None, :, None, None, None].expand(*far_bias.shape[:-1], self.sinks)
        far_bias = torch.cat([sink_bias, far_bias], -1)

        view = (query.shape[2], query.shape[4])  # R, Q
        rows = query.transpose(2, 3).flatten(3, 4)  # [B, Hk, G, R Q, D]
        near = _scores((rows @ near_key.mT).unflatten(3, view), near_bias, call)
        far = _scores((rows.flatten(2, 3) @ far_key.mT).unflatten(2, (reach, *view)), far_bias, call)
        near, far = torch.cat([near, far], -1).softmax(-1).to(value.dtype).flatten(3, 4).split([size, far.shape[-1]], -1)  # [B, Hk, G, R Q, S or N + C K]
        mixed = near @ near_value + (far.flatten(2, 3) @ far_value).unflatten(2, rows.shape[2:4])  # [B, Hk, G, R Q, D]
        mixed = mixed.unflatten(3, view).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, H, G Q, D]
        out: Tensor = mixed if tokens == 1 else reorder(mixed, (positions - size * first).clamp_min(0))
        return out

    def _first_block_share(self, device: Any) -> Tensor:
        """Return the share of each mixture's tokens that the first block mixes, [K]: all but the sinks."""
        own = segment_means(self.rank, self.block).to(device) > 0
        share: Tensor = own[:, self.sinks :].sum(-1) / own.sum(-1)
        return share

    def _mixtures(self, call: Call, name: str, matrix: Tensor, near: Tensor, own: Tensor) -> Tensor:
        """Return the mixtures of all blocks [B, Hk, C K, D]; those of the blocks `near` [B, Hk, G, S, D], numbers `own` [B, G], are computed anew.

        An unfinished block has mixtures too. No token sees them, and the finished block overwrites them.
        """
        import torch

        from effconvert.surgery.mixing._call import extended

        old = call.read(name, {name: ((near.shape[1], 0, near.shape[-1]), "model")})
        begins = (own == 0)[:, None, :, None, None]  # [B, 1, G, 1, 1]
        sink = (torch.arange(self.block, device=old.device) < self.sinks)[:, None]
        left = self._first_block_share(old.device)[:, None]  # [K, 1]
        mixtures = matrix.float()[:, None] @ near.float().masked_fill(begins & sink, 0)
        mixtures = torch.where(begins, mixtures / left.clamp_min(1 / self.block), mixtures).to(old.dtype).flatten(2, 3)  # [B, Hk, G K, D]
        start = own[:, :1] * self.rank
        result = extended(old, mixtures, start, start, call.max_tokens // self.block * self.rank)
        call.write(**{name: result})
        return result


def _scores(products: Tensor, bias: Tensor, call: Call) -> Tensor:
    """Return scores in float32 from products of queries and keys, plus a bias."""
    import torch

    if call.softcap is None:
        return torch.add(bias, products.float(), alpha=call.scaling)
    return bias + call.softcap * torch.tanh(products.float() * (call.scaling / call.softcap))
