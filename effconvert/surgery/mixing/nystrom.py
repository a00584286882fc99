"""Attention by way of a few landmarks (Nyströmformer)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, m = landmarks.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from effconvert.surgery.mixing._mixing import Mixing
from effconvert.surgery.mixing.linformer import MEANS_OF_ROTATED, attended

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call


class Nystrom(Mixing):
    """Attention by way of a few landmarks (Nyströmformer).

    Landmarks are means of consecutive tokens, m of them whatever the length. Attention is that of tokens to landmarks, times the pseudo-inverse of that
    among landmarks, times that of landmarks to tokens; a depthwise convolution of the values is added, which begins as nothing. Weights may be negative.
    Neutral where m is the longest text and the pseudo-inverse exact (--iterations 0). Layers that see no more than a window are left alone.
    Xiong et al. 2021, arXiv 2102.03902.

    \b
    Examples:
      effconvert nystrom --landmarks 64 google-bert/bert-base-uncased
      effconvert nystrom --landmarks 32 --conv 0 ./MiniLM -o ./nystrom
    """

    no_decoders = (
        "takes landmarks from all of a text, later tokens among them, which a decoder must not see; streaming, linear, performer and retnet are for decoders"
    )
    leaves_windows = True

    landmarks: int = Field(ge=1, description="Means of consecutive tokens, m; a shorter text is taken as it is.", json_schema_extra={"metavar": "M"})
    iterations: int = Field(
        6, ge=0, le=100, description="Steps towards the pseudo-inverse; more magnify more of what landmarks miss. 0: all the way, by singular values."
    )
    conv: int = Field(
        65, ge=0, le=1023, description="Tokens that the convolution of a head's values is wide, odd; 0: none.", json_schema_extra={"metavar": "WIDTH"}
    )

    @model_validator(mode="after")
    def _sound(self) -> Nystrom:
        if self.conv and self.conv % 2 == 0:
            raise ValueError(f"--conv {self.conv} is even, so that it would look further to one side; give {self.conv + 1}, or 0 for none")
        return self

    def is_exact(self, config: Config) -> bool:
        """Where every token is a landmark, and the pseudo-inverse is exact."""
        return config.longest is not None and self.landmarks >= config.longest and self.iterations == 0

    def notes(self, config: Config) -> str:
        """Say what becomes of rotated keys."""
        return MEANS_OF_ROTATED if config.family.rope else ""

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The convolution, a kernel for each head."""
        return {"conv": (config.heads, self.conv)} if self.conv else {}

    def begin(self, config: Config, index: int) -> Mapping[str, Tensor]:
        """Nothing is convolved."""
        import torch

        return {name: torch.zeros(shape) for name, shape in self.parameters(config).items()}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Attend to landmarks, from these to each other backwards, and from them to tokens: not in half precision, whose errors a pseudo-inverse magnifies."""
        import torch
        from torch.nn import functional

        precise = torch.promote_types(call.query.dtype, torch.float32 if self.iterations else torch.float64)  # nothing limits what the exact one magnifies
        query, key, value = (rows.to(precise) for rows in (call.grouped, call.key, call.value * call.live[:, None, :, None]))
        means = segments(call.live, min(self.landmarks, call.live.shape[1])).to(precise)  # [B, m, T]
        alive = means.any(-1)[:, None]  # [B, 1, m]
        query_marks, key_marks = means[:, None, None] @ query, means[:, None] @ key  # [B, Hk, R, m, D], [B, Hk, m, D]
        scores = query_marks @ key_marks[:, :, None].mT * call.scaling  # [B, Hk, R, m, m]
        among = scores.masked_fill(~alive[:, :, None, None], torch.finfo(scores.dtype).min).softmax(-1)
        unit = torch.eye(among.shape[-1], dtype=precise, device=among.device)
        among = torch.where(alive[..., None, :, None], among, unit)  # what is no landmark stands alone
        seen = attended(query_marks, key, value, call.live[:, None], call.scaling)  # [B, H, m, D]
        told = pseudo_inverse(among, self.iterations).flatten(1, 2) @ seen
        every = key_marks.repeat_interleave(query.shape[2], 1)
        mixed = attended(query.flatten(1, 2)[:, :, None], every, told, alive, call.scaling)
        if self.conv:
            values = value.repeat_interleave(query.shape[2], 1)
            mixed = mixed + functional.conv2d(values, weights["conv"].to(precise)[:, None, :, None], padding=(self.conv // 2, 0), groups=values.shape[1])
        return mixed


def segments(live: Tensor, count: int) -> Tensor:
    """Return weights [B, m, T] that make means of consecutive live tokens; of a text with fewer than m each token alone, and rows of 0."""
    import torch

    tokens = live.sum(1, keepdim=True)  # [B, 1]
    place = (live.cumsum(1) - 1) * count // tokens.clamp_min(1)  # [B, T], of each token's landmark
    member = ((place[:, None] == torch.arange(count, device=live.device)[:, None]) & live[:, None]).float()
    return member / member.sum(-1, keepdim=True).clamp_min(1)


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Return the Moore-Penrose inverse of matrices [..., m, m] whose rows sum to 1.

    By the paper's iteration (its eq. 14), begun for each matrix from its own norms, so that no text depends on what others are in its batch; or with
    0 iterations by singular values.
    """
    import torch

    if not iterations:
        inverse: Tensor = torch.linalg.pinv(matrix)
        return inverse
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    sums = matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1)
    inverse = matrix.mT / sums[..., None, None]
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * unit - product @ (15 * unit - product @ (7 * unit - product))) / 4
    return inverse
