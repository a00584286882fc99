"""Refit a converted model to what the original computed."""
# B = windows run at a time, T = tokens, M = hidden width, H = query heads, Hk = KV heads, G = KV heads after, D = head width.

from __future__ import annotations  # what only types need is not imported: `--help` must not wait for torch

from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from effconvert.errors import ModelError
from effconvert.surgery._surgery import Surgery

if TYPE_CHECKING:
    from effconvert.convert.config import Config
    from effconvert.convert.layer import Layer


class Refit(Surgery):
    """Refit a converted model to what the original computed.

    Linear algebra, no gradients. Layer by layer, each fed by the refitted layers below it, and the original's layer on the same inputs:
    queries are fitted to its scores, values and the output projection to what its attention gives, and after layers that were dropped the
    MLP's output to what they would have made of it. What does not predict held-out windows of the text better than before stays as it is.
    MODEL is the converted model.

    \b
    Examples:
      effconvert refit ./SmolLM2-135M-gqa-1 --teacher ./SmolLM2-135M -o ./refitted
      effconvert refit --calibrate mine.txt --calibration-tokens 65536 ./mqa --teacher HuggingFaceTB/SmolLM2-135M
    """

    teacher: str | None = Field(
        None,
        description="The original: folder, Hub id or .gguf file. In a recipe by default the model that it begins from.",
        json_schema_extra={"metavar": "MODEL"},
    )

    @classmethod
    def suits(cls, config: Config) -> str:
        """Any model."""
        return "--teacher the model that it was made from"

    def check(self, config: Config) -> None:
        """Refuse nothing: what has to fit is teacher and student, see `rewrite`."""

    def exact(self, config: Config) -> bool:
        """Never: it is there to change what is computed."""
        return False

    def config(self, config: Config) -> Config:
        """Change nothing."""
        return config

    def looks(self, config: Config) -> bool:
        """Always."""
        return True

    def remark(self, config: Config) -> str:
        """Say what norms forbid."""
        told = ["its queries go through a norm, so they are not refitted to scores; values and outputs are"] if config.normed else []
        told += ["a norm follows its MLP, so nothing makes up for layers that were dropped"] if "mlp_post_norm" in config.family.parts else []
        return "; ".join(told)

    def rewrite(self, layers: list[Layer]) -> list[Layer]:
        """Refit each layer towards those of the original that it stands for: its own, and those that were dropped after it."""
        starts = [layer.originals.start for layer in layers]
        stops = [*starts[1:], max(layers[-1].originals.stop, layers[-1].depth)]
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            raise ModelError("the layers stand in another order than in the original, or twice, so there is nothing that each could be refitted towards")
        for layer, start, stop in zip(layers, starts, stops, strict=True):
            layer.later(partial(self._refit, originals=range(start, stop)))
        return layers

    def _refit(self, layer: Layer, originals: range) -> None:
        parts = ["q", "q.bias", "v", "v.bias", "o"] + (["down"] if len(originals) > 1 else [])
        for part in parts:
            if part in layer:
                layer[part] = layer[part]  # what will be written is known before what is in it
        if layer.walk:
            from effconvert.heal._layer import refit_attention, refit_output

            refit_attention(layer, originals[0])
            if len(originals) > 1:
                refit_output(layer, originals)
