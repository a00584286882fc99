"""Refit a converted model to what the original computed."""

from __future__ import annotations  # what only types need is not imported: `--help` must not wait for torch

from typing import TYPE_CHECKING

from effconvert.heal._healing import Healing

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer


class Refit(Healing):
    """Refit a converted model to what the original computed.

    Linear algebra, no gradients. Layer by layer, each fed by the refitted layers below it, and the original's layer on the same inputs:
    queries are fitted to its scores, values and the output projection to what its attention gives, and after layers that were dropped the
    MLP's output to what they would have made of it. Where a mixer stands in place of attention it is the output projection alone. What does
    not predict held-out windows of the text better than before stays as it is. MODEL is the converted model.

    \b
    Examples:
      effconvert refit ./SmolLM2-135M-gqa-1 --teacher ./SmolLM2-135M -o ./refitted
      effconvert refit --calibrate mine.txt --calibration-tokens 65536 ./mqa --teacher HuggingFaceTB/SmolLM2-135M
    """

    def remark(self, config: Config) -> str:
        """Say what norms and mixers forbid."""
        told = ["its queries go through a norm, so they are not refitted to scores; values and outputs are"] if config.normed else []
        told += ["a norm follows its MLP, so nothing makes up for layers that were dropped"] if "mlp_post_norm" in config.family.parts else []
        told += ["it has experts, which do not make up for layers that were dropped"] if config.experts else []
        told += ["where a mixer stands in place of attention only the output projection is refitted; transfer does more"] if config.replaced else []
        return "; ".join(told)

    def changes(self, layer: Layer, originals: range) -> list[str]:
        """Queries, values and outputs of attention; the MLP's output after layers that were dropped."""
        return ["q", "q.bias", "v", "v.bias", "o", *(["down"] if len(originals) > 1 else [])]

    def heal(self, layer: Layer, originals: range) -> None:
        """See `_layer`."""
        from effconvert.heal._layer import refit_attention, refit_output

        refit_attention(layer, originals[0])
        if len(originals) > 1:
            refit_output(layer, originals)
