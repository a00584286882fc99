"""Attention through a few landmarks (Nyströmformer)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, m = landmarks.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing
from effconvert.surgery.mixing.linformer import ROPE_MEANS, masked_attention

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call


class Nystrom(Mixing):
    """Attention through a few landmarks (Nyströmformer).

    Landmarks are m means of consecutive tokens, for any length. Attention is a product of three matrices: tokens to landmarks, the pseudo-inverse of
    landmarks to landmarks, and landmarks to tokens. Its weights may be negative. A depthwise convolution of the values is added, which starts at zero.
    Exact where m is the longest text and the pseudo-inverse exact (--iterations 0). Layers with a sliding window stay as they are.
    Xiong et al. 2021, arXiv 2102.03902.

    \b
    Examples:
      effconvert nystrom --landmarks 64 google-bert/bert-base-uncased
      effconvert nystrom --landmarks 32 --conv 0 ./MiniLM -o ./nystrom
    """

    facts: ClassVar[Facts] = Facts("encoders", saves="time on long texts", native="", exact="with --landmarks as many as tokens and --iterations 0")

    no_decoders = (
        "takes landmarks from all of a text, later tokens among them, which a decoder must not see; streaming, linear, performer and retnet are for decoders"
    )
    leaves_windows = True

    landmarks: int = Field(ge=1, description="Landmarks, m; a text with fewer tokens has one for each token.", json_schema_extra={"metavar": "M"})
    iterations: int = Field(
        6, ge=0, le=100, description="Iterations of the pseudo-inverse; more magnify the landmarks' errors. 0: the exact inverse, by singular values."
    )
    conv: int = Field(
        65, ge=0, le=1023, description="Width of the convolution of a head's values in tokens, odd; 0: none.", json_schema_extra={"metavar": "WIDTH"}
    )

    @model_validator(mode="after")
    def _sound(self) -> Nystrom:
        if self.conv and self.conv % 2 == 0:
            raise ValueError(f"--conv {self.conv} is even, so it would reach further to one side; give {self.conv + 1}, or 0 for none")
        return self

    def is_exact(self, config: Config) -> bool:
        """Where every token is a landmark, and the pseudo-inverse is exact."""
        return config.longest is not None and self.landmarks >= config.longest and self.iterations == 0

    def notes(self, config: Config) -> str:
        """Warn of means of rotated keys."""
        return ROPE_MEANS if config.family.rope else ""

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The convolution, a kernel for each head."""
        return {"conv": (config.heads, self.conv)} if self.conv else {}

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Zeros: the convolution adds nothing."""
        import torch

        return {name: torch.zeros(shape) for name, shape in self.parameters(config).items()}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """Multiply the three matrices; not in half precision, as the pseudo-inverse magnifies rounding errors."""
        import torch
        from torch.nn import functional

        precise = torch.promote_types(call.query.dtype, torch.float32 if self.iterations else torch.float64)  # the exact inverse magnifies without limit
        query, key, value = (rows.to(precise) for rows in (call.grouped, call.key, call.value * call.live[:, None, :, None]))
        means = segments(call.live, min(self.landmarks, call.live.shape[1])).to(precise)  # [B, m, T]
        alive = means.any(-1)[:, None]  # [B, 1, m]
        query_marks, key_marks = means[:, None, None] @ query, means[:, None] @ key  # [B, Hk, R, m, D], [B, Hk, m, D]
        scores = query_marks @ key_marks[:, :, None].mT * call.scaling  # [B, Hk, R, m, m]
        kernel = scores.masked_fill(~alive[:, :, None, None], torch.finfo(scores.dtype).min).softmax(-1)
        unit = torch.eye(kernel.shape[-1], dtype=precise, device=kernel.device)
        kernel = torch.where(alive[..., None, :, None], kernel, unit)  # rows without a landmark become those of the identity
        landmark_outputs = masked_attention(query_marks, key, value, call.live[:, None], call.scaling)  # [B, H, m, D]
        landmark_values = pseudo_inverse(kernel, self.iterations).flatten(1, 2) @ landmark_outputs
        landmark_keys = key_marks.repeat_interleave(query.shape[2], 1)
        output = masked_attention(query.flatten(1, 2)[:, :, None], landmark_keys, landmark_values, alive, call.scaling)
        if self.conv:
            values = value.repeat_interleave(query.shape[2], 1)
            output = output + functional.conv2d(values, weights["conv"].to(precise)[:, None, :, None], padding=(self.conv // 2, 0), groups=values.shape[1])
        return output


def segments(live: Tensor, count: int) -> Tensor:
    """Return the weights [B, m, T] of means of consecutive live tokens; for a text with fewer than m tokens one row each, and rows of 0."""
    import torch

    tokens = live.sum(1, keepdim=True)  # [B, 1]
    place = (live.cumsum(1) - 1) * count // tokens.clamp_min(1)  # [B, T], of each token's landmark
    member = ((place[:, None] == torch.arange(count, device=live.device)[:, None]) & live[:, None]).float()
    return member / member.sum(-1, keepdim=True).clamp_min(1)


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Return the Moore-Penrose inverse of matrices [..., m, m] whose rows sum to 1.

    Uses the paper's iteration (its eq. 14), or with 0 iterations singular values. Each matrix starts from its own norms, so that no text depends on
    the others in its batch.
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
