"""Base classes of techniques that replace softmax attention: all of it, or what is between its projections."""
# B = batch, H = query heads, Hk = KV heads, T = tokens, D = head width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.surgery._replacement import Replacement
from effconvert.surgery._surgery import Layers, layers_field
from effconvert.surgery.mixing._recall import TOKENS, recall

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery._surgery import ForwardProtocol
    from effconvert.surgery.mixing._call import Call


class TokenMixing(Replacement):
    """A technique that replaces softmax attention in some layers."""

    where = frozenset({"layers", "keep_softmax", "keep_recall"})
    leaves_windows: ClassVar[bool] = False  # whether layers with a sliding window stay: they are linear in the length already

    keep_softmax: Layers = layers_field("Layers to leave as they are, written like --layers: 0,-1.")
    keep_recall: int | None = Field(
        None,
        ge=1,
        description="Decoders: number of layers to leave as they are, chosen on the calibration text: those that find best what followed an earlier copy.",
        json_schema_extra={"metavar": "N"},
    )

    @property
    def nothing_chosen(self) -> str:
        """The message for a choice without any layer."""
        return "no layer is left to change: --layers names none, --keep-softmax names all, or each has a window that is no longer; name other layers"

    @property
    def softmax_tokens(self) -> int:
        """How many of the last tokens softmax still attends to; layers with a window no longer than that stay as they are."""
        return 0

    def chosen(self, config: Config) -> set[int]:
        """Return the layers to change: without those of --keep-softmax, and those whose window leaves nothing to gain."""
        excluded = self.named_layers("keep_softmax", config) if self.keep_softmax else set()
        excluded |= {index for index, own in enumerate(config.windows()) if own and (self.leaves_windows or own <= self.softmax_tokens)}
        return super().chosen(config) - excluded

    def check(self, config: Config) -> None:
        """Refuse a choice of layers in encoders, and one that leaves nothing to change."""
        super().check(config)
        if self.keep_recall and not config.decoder:
            raise OptionError(f"--keep-recall is for decoders, whose layers look back, and {config.kind} is an {config.role}; name layers with --keep-softmax")
        if self.keep_recall and self.keep_recall >= (count := len(self.chosen(config))):
            raise OptionError(f"--keep-recall {self.keep_recall} leaves none of the {count} layers that could be changed; give at most {count - 1}")

    @property
    def undecided(self) -> bool:
        """If only the number of layers to leave is known."""
        return self.keep_recall is not None

    @property
    def rule(self) -> str:
        """What is measured, and on how much text."""
        return f"induction heads, on up to {TOKENS:,} tokens"

    def decide(self, forward: ForwardProtocol) -> Self:
        """Name the layers with the strongest induction heads beside those of --keep-softmax; layers with a window come last, as they recall no further."""
        shares, windows = recall(forward, self.chosen(forward.config)), forward.config.windows()
        kept = sorted(shares, key=lambda layer: (bool(windows[layer]), -shares[layer]))[: self.keep_recall]
        named = self.named_layers("keep_softmax", forward.config) if self.keep_softmax else set()
        return self.model_copy(update={"keep_softmax": ",".join(map(str, sorted({*kept, *named}))), "keep_recall": None})


class Mixing(TokenMixing):
    """A technique with its own mixer between q, k, v and o. One file holds its options, parameters, cache slots and maths."""

    place = "scores"
    softcaps: ClassVar[bool] = False  # whether it computes soft-capped scores

    @abstractmethod
    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Return the output of each query, [B, H, T, D]; the result does not depend on how the tokens are split into calls."""

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse families whose kind of attention this mixer cannot replace."""
        super().check_family(config)
        name = cls.__module__.rpartition(".")[2].replace("_", "-")
        if config.get("attn_logit_softcapping") and not cls.softcaps:
            raise ModelError(
                f"{config.kind} caps its scores (attn_logit_softcapping), which no feature map can follow, so {name} cannot take the place of its attention; "
                "streaming, linformer-causal and sparse can"
            )
