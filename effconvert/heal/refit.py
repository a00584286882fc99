"""Recover quality without training: least squares on q, v and o."""

from __future__ import annotations  # what only types need is not imported: `--help` must not wait for torch

from functools import partial
from typing import TYPE_CHECKING

from effconvert.heal._healing import Healing

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model


class Refit(Healing):
    """Refit a converted model to what the original computed.

    Linear algebra, no gradients. Layer by layer, each fed by the refitted layers below it, and the original's layer on the same inputs: queries
    are fitted to its scores, values and the output projection to what its attention gives. Where a mixer stands in place of attention it is the
    output projection alone; where nothing of attention is left, the MLP's output to what the original's layer gives. From the first gap that
    dropped layers left, the outputs of attention and MLP are fitted besides to what stands there in the original. What does not predict
    held-out windows of the text better than before stays as it is. MODEL is the converted model.

    \b
    Examples:
      effconvert refit ./SmolLM2-135M-gqa-1 --teacher ./SmolLM2-135M -o ./refitted
      effconvert refit --calibrate mine.txt --calibration-tokens 65536 ./mqa --teacher HuggingFaceTB/SmolLM2-135M
    """

    def notes(self, config: Config) -> str:
        """Say what norms and mixers forbid."""
        told = ["its queries go through a norm, so they are not refitted to scores; values and outputs are"] if config.normed else []
        told += ["its queries are clipped (clip_qkv), so they stay where the text shows it; values and outputs are refitted"] if config.get("clip_qkv") else []
        told += ["a norm follows its MLP, so little makes up for layers or attention that were dropped"] if "mlp_post_norm" in config.family.parts else []
        told += ["where a mixer stands in place of attention only the output projection is refitted; transfer does more"] if config.replaced else []
        return "; ".join(told)

    def changes(self, layer: Layer, originals: range) -> list[str]:
        """Queries, values and outputs of attention; the MLP's output where a technique stands in place of all of attention."""
        return ["q", "q.bias", "v", "v.bias", "o", *(["down"] if _without_attention(layer) else [])]

    def heal(self, layer: Layer, originals: range) -> None:
        """See `_layer`."""
        from effconvert.heal._layer import refit_attention, refit_output

        if _without_attention(layer):
            refit_output(layer, originals)
        else:
            refit_attention(layer, originals[0])

    def rewrite(self, model: Model) -> None:
        """Refit each layer to the one that it stands for, and from the first gap on to the stream of the original too."""
        super().rewrite(model)
        for layer, steps in zip(model.layers, after_gaps(model), strict=True):
            layer.later(partial(self._follow, steps=steps))

    def _follow(self, layer: Layer, steps: dict[str, int]) -> None:
        for part, step in steps.items():
            if part in layer:
                layer[part] = layer[part]
                if layer.activations:
                    from effconvert.heal._layer import refit_stream

                    refit_stream(layer, part, step)


def _without_attention(layer: Layer) -> bool:
    """Whether a technique stands in place of all of a layer's attention, its output projection too."""
    return any("o" in record.drops for record in layer.config.replaced_in(layer.index))


def after_gaps(model: Model) -> list[dict[str, int]]:
    """Return of each layer what writes to the stream behind something that was dropped, or just before, with the step of the original to which it leads.

    Step 2 l is what arrives at the original's layer l, 2 l + 1 what stands between its attention and its FFN.
    """
    half = {"attention": ("o", 0), "ffn": ("down", 1)}
    kept = [
        (layer.index, part, 2 * layer.originals.start + second)
        for layer in model.layers
        for place, (part, second) in half.items()
        if place not in model.config.skips(layer.index)
    ]
    had = {2 * layer + second for layer in range(model.original.layers) for place, (_, second) in half.items() if place not in model.original.skips(layer)}
    found: list[dict[str, int]] = [{} for _ in model.layers]
    dropped = not had.isdisjoint(range(kept[0][2]))
    for (index, part, step), (_, _, following) in zip(kept, [*kept[1:], (0, "", 2 * model.original.layers)], strict=True):
        dropped = dropped or not had.isdisjoint(range(step + 1, following))
        if dropped:
            found[index][part] = following
    return found
