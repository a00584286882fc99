"""Attend to the last tokens and the first few only (StreamingLLM)."""
# B = batch, H = query heads, Hk = KV heads, R = query heads that share one, T = tokens, D = head width, W = window, S = sinks.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from effconvert.errors import ModelError
from effconvert.surgery._surgery import Facts
from effconvert.surgery.mixing._mixing import Mixing

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery.mixing._call import Call, Slots


class Streaming(Mixing):
    """Attend to the last tokens and the first few only (StreamingLLM).

    The KV cache stops growing at W + S tokens, and the model reads text of any length. Nothing is trained. Positions are those inside the cache: a
    query's distance to a sink is at most W + S - 1. Exact where the window is as long as the longest context. Without sinks, families with a sliding
    window of their own use that, as stock checkpoints (a llama becomes a mistral if all layers change). Xiao et al. 2023, arXiv 2309.17453.

    \b
    Examples:
      effconvert streaming --window 1024 meta-llama/Llama-2-7b-hf
      effconvert streaming --window 64 --sinks 4 --keep-softmax 0,-1 ./SmolLM2-135M -o ./streaming
    """

    facts: ClassVar[Facts] = Facts(
        "decoders",
        saves="KV cache: it stops growing",
        native="its own class with --sinks 0, where that has a window (else needs effconvert)",
        exact="with --window as long as the text",
    )

    no_encoders = (
        "keeps the first and the last tokens of a text that is still being written; encoders see all of theirs at once: linformer and nystrom are for them"
    )
    softcaps = True

    window: int = Field(ge=1, description="Last tokens that a token sees, itself included, W.", json_schema_extra={"metavar": "W"})
    sinks: int = Field(4, ge=0, description="First tokens of the text that all tokens see, S.")

    @model_validator(mode="after")
    def _sound(self) -> Streaming:
        if self.window < self.sinks:
            raise ValueError(f"--window {self.window} is smaller than --sinks {self.sinks}; give a window of at least {self.sinks}, or fewer sinks")
        return self

    @property
    def softmax_tokens(self) -> int:
        """The window."""
        return self.window

    @classmethod
    def check_family(cls, config: Config) -> None:
        """Refuse what does more to queries than RoPE: they cannot be put at another position."""
        super().check_family(config)
        family = config.family
        for holds, why in ((family.norms_turned, "norms its queries after RoPE"), (family.scales_queries, "scales its queries by their position")):
            if holds:
                raise ModelError(f"{config.kind} {why}, so that they cannot be put at a position inside the cache; take linformer-causal")

    def is_exact(self, config: Config) -> bool:
        """Where no text is longer than the window."""
        return config.longest is not None and self.window >= config.longest

    def notes(self, config: Config) -> str:
        """Warn where learnt positions limit the length."""
        return "" if config.family.rope else f"its positions are learnt, so texts still cannot be longer than {config.longest} tokens"

    def config(self, config: Config) -> Config:
        """Record the mixer for the chosen layers; without sinks write the family's own sliding window instead, where it has one."""
        native = None if self.sinks else config.with_window(self.window, self.chosen(config))
        return native or super().config(config)

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """None."""
        return {}

    def cache_slots(self, config: Config) -> Slots:
        """The window, the sinks, and the angles of the last position inside the cache."""
        from effconvert.surgery.mixing._call import past, sinks

        heads = config.kv_heads, config.head_dim
        angles: Slots = {"furthest": ((2, config.rotary), "float32")} if config.rotary else {}
        return {**past(self.window - 1, *heads), **sinks(self.sinks, *heads), "count": ((), "int64"), **angles}

    def mix(self, weights: Mapping[str, Tensor], call: Call) -> Tensor:
        """One softmax over the window and over the sinks outside it."""
        import torch

        from effconvert.kernels.window import window_scores, window_values

        call = call.prescaled
        positions = call.positions()  # [B, T]
        key, value, live = call.with_window(self.window - 1)
        sink_key, sink_value = call.first_tokens(self.sinks, positions)  # [B, Hk, S, D]
        moved = self._inside_cache(call, positions)
        if call.steps_by_kernel:
            return self._step(call, moved, torch.cat([sink_key, key], 2), torch.cat([sink_value, value], 2), live, positions)
        near, counted = window_scores(call.grouped, key, live, self.window)
        far = moved.unflatten(1, (key.shape[1], -1)) @ sink_key[:, :, None].mT  # [B, Hk, R, T, S]
        outside_window = positions[:, :, None] - torch.arange(self.sinks, device=positions.device) >= self.window  # [B, T, S]
        scores = torch.cat([near, far], -1).float() * call.scaling
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        every = torch.cat([counted, outside_window[:, None, None]], -1)
        weight = scores.masked_fill(~every, torch.finfo(scores.dtype).min).softmax(-1).to(value.dtype)
        near, far = weight.split([near.shape[-1], self.sinks], -1)
        output: Tensor = window_values(near, value) + far @ sink_value[:, :, None]
        return output.flatten(1, 2)

    def _step(self, call: Call, moved: Tensor, key: Tensor, value: Tensor, live: Tensor, positions: Tensor) -> Tensor:
        """Decode a token by the kernel: keys and values [B, Hk, S + W, D] of the sinks and of the window, whose live tokens are its last ones."""
        from effconvert.kernels.decode_attention import decode_attention

        sinks = (positions[:, 0] - self.window + 1).clamp(0, self.sinks)  # [B], outside the window
        start = (key.shape[2] - live.sum(1)) * (sinks == 0)
        output: Tensor = decode_attention(
            call.query, key, value, start, window=self.window, sinks=sinks, scaling=call.scaling, softcap=call.softcap, sink_query=moved
        )
        return output

    def _inside_cache(self, call: Call, positions: Tensor) -> Tensor:
        """Return the queries, with those past the cache's last position moved to it."""
        import torch

        if call.rotation is None:
            return call.query
        last = self.window + self.sinks - 1
        angles = call.rotation.angles  # [B, 2, T, rotary]
        at_last = ((positions == last) & call.live)[:, None, None].to(angles.dtype)  # [B, 1, 1, T]
        furthest = call.read("furthest", {"furthest": ((2, angles.shape[-1]), "float32")}) + (at_last @ angles)[:, :, 0].float()
        call.write(furthest=furthest)
        to = torch.where((positions > last)[:, None, :, None], furthest[:, :, None].to(angles.dtype), angles)
        return call.rotation.at_angles(call.query, to)
