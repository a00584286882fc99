"""Long convolutions and Monarch FFNs in every layer (Monarch Mixer)."""

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, ClassVar

from effconvert.surgery._several import Several, option
from effconvert.surgery._surgery import Facts, Layers, Step
from effconvert.surgery.mixing.hyena import Hyena
from effconvert.surgery.projections.monarch import Monarch

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config


class MonarchMixer(Several):
    """Long convolutions and Monarch FFNs in every layer (Monarch Mixer).

    Monarch Mixer (M2): no layer has attention, or a dense FFN (experts stay). It is `hyena`, and then `monarch --parts mlp` on what that computes: these two
    steps are done, healed and written into effconvert.yaml; for their other options write them into a recipe. M2's mixer is one long convolution with a gate
    on either side; hyena has one more before the first gate, which begins as a copy. Encoders convolve to both sides, decoders to the past. Convolutions are
    evaluated by torch's Fourier transform: by Monarch factors, as in the paper, it is 5 to 6 times slower on a CPU, and not measured on a GPU. The paper
    trains from the start, and what is left of a pretrained model has to be trained on. On a CPU it reads prompts 1.5 to 4 times slower than the original at
    every length measured (512 to 16,384), as Monarch products are slow there: `hyena` alone is faster, and nearer to the original.
    Fu et al. 2023, arXiv 2310.12109; docs/mixers.md has measurements.

    \b
    Examples:
      effconvert monarch-mixer --blocks 192 --transfer ./SmolLM2-135M -o ./m2
      effconvert monarch-mixer --blocks 96 --length 512 --layers 1-29/2 --refit ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("models that attend, with an FFN of single projections", saves="parameters of FFNs", native="", exact="")
    kinds = Hyena, Monarch

    blocks: int = option(Monarch, "blocks")
    length: int | None = option(Hyena, "length")
    layers: Layers = option(Hyena, "layers")

    def stands_for(self, config: Config) -> tuple[Step, ...]:
        """Return the steps for attention and for the FFN, in the order in which a layer computes them."""
        return Hyena(length=self.length, layers=self.layers), Monarch(blocks=self.blocks, parts="mlp", layers=self.layers)
