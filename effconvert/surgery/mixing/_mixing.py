"""What techniques are that mix tokens otherwise than softmax attention does: in the place of all of it, or between its projections."""
# B = batch, H = query heads, Hk = KV heads, T = tokens, D = head width.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from effconvert.errors import ModelError
from effconvert.surgery._replacement import Replacement
from effconvert.surgery._surgery import Layers, layers_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call


class TokenMixing(Replacement):
    """A technique that does in some layers what softmax attention does in the others."""

    where = frozenset({"layers", "keep_softmax"})
    leaves_windows: ClassVar[bool] = False  # whether layers that see no more than a window stay as they are: these are linear in the length already

    keep_softmax: Layers = layers_field("Layers to leave as they are, written like --layers: 0,-1.")

    @property
    def nothing_chosen(self) -> str:
        """Why no layer may be left to change."""
        return "no layer is left to change: --layers names none, --keep-softmax all of them, or they have a window that is no longer"

    @property
    def softmax_tokens(self) -> int:
        """How many of the last tokens are attended to by softmax all the same: layers with a window of their own that is no longer stay as they are."""
        return 0

    def chosen(self, config: Config) -> set[int]:
        """Return the layers to change: not those that are kept, nor those with a window that has nothing to gain."""
        kept = self.named("keep_softmax", config) if self.keep_softmax else set()
        kept |= {index for index, own in enumerate(config.windows()) if own and (self.leaves_windows or own <= self.softmax_tokens)}
        return super().chosen(config) - kept


class Mixing(TokenMixing):
    """A technique with a mixer of its own, between q, k, v and o: in one file are its options, its parameters, what it remembers and how it mixes."""

    place = "scores"
    softcaps: ClassVar[bool] = False  # whether soft-capped scores are computed as such

    @abstractmethod
    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Return what each query mixes, [B, H, T, D]; after T tokens in any number of calls the same."""

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse what attends otherwise than this mixer can follow."""
        super().check_family(config)
        name = cls.__module__.rpartition(".")[2].replace("_", "-")
        if config.get("attn_logit_softcapping") and not cls.softcaps:
            raise ModelError(
                f"{config.kind} caps its scores (attn_logit_softcapping), which no feature map can follow, so {name} cannot take the place of its attention; "
                "streaming and linformer-causal can"
            )
