"""Run the FFN some tokens at a time."""
# B = texts, T = tokens, M = hidden width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.errors import ModelError
from effconvert.surgery._replacement import PlaceContext, Replacement
from effconvert.surgery._surgery import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config

NATIVE = "chunk_size_feed_forward"


class ChunkFfn(Replacement):
    """Run the FFN some tokens at a time.

    An FFN treats each token by itself, and the numbers inside it, several times as many as outside, need not be in memory for all tokens at once. So no
    logit changes, and long prompts need less memory. Where gradients are wanted, what is inside is computed again for the backward pass, chunk by
    chunk: training needs less memory, for one more forward pass of each FFN. The last chunk may be shorter. No weight changes; do this last, as
    nothing else can then be put in the FFN's place. Kitaev et al. 2020, arXiv 2001.04451.

    \b
    Examples:
      effconvert chunk-ffn --size 256 ./SmolLM2-135M -o ./chunked
      effconvert chunk-ffn --size 128 openai-community/gpt2
    """

    by_token: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts("models whose FFN is a module of its own", saves="memory of activations", native="", exact="always")
    place: ClassVar[str] = "ffn"
    chunks = True

    size: int = Field(ge=1, description="Tokens of a chunk.", json_schema_extra={"metavar": "N"})

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse experts, and families without a module for the FFN, some of which have chunks in transformers' own class."""
        super().check_family(config)
        if config.family.experts_key:
            raise ModelError(f"{config.kind} has experts in place of an FFN, and each gets some of the tokens already; give a model without")
        if not config.family.ffn and config.family.chunks_ffn:
            raise ModelError(
                f"a layer of {config.kind} has no module of its own for ffn, and transformers' own class does this: set {NATIVE} in config.json. "
                "It refuses texts whose length is no multiple of that"
            )
        config.place("ffn")  # raises where it has no module

    def is_exact(self, config: Config) -> bool:
        """Always."""
        return True

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """None."""
        return {}

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Return the FFN's output for hidden states [B, T, M]."""
        import torch
        from torch.utils.checkpoint import checkpoint

        pieces = [piece.contiguous() for piece in hidden.split(self.size, 1)]  # gpt2's class needs that
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(context.original, piece, use_reentrant=False) for piece in pieces], 1)
        return torch.cat([context.original(piece) for piece in pieces], 1)
