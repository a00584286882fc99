"""Keep fewer neurons in each FFN."""
# M = hidden width, F = neurons of an FFN, S = neurons that stay.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.errors import OptionError
from effconvert.surgery._surgery import Facts, Surgery

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer


class Narrow(Surgery):
    """Keep fewer neurons in each FFN.

    Neurons go one after the other, each time the one whose output the others can best make up for on the calibration text (optimal brain surgeon);
    the output projection of those that stay is fitted to the output of all. Layers are converted in order, each on the outputs of the converted layers
    below it. The model stays in its own class, gets smaller, and computes less. --refit then fits the outputs to the original's hidden states. At the
    same number of parameters, dropping whole layers costs less on small models: compare with prune-layers.
    Frantar & Alistarh 2022, arXiv 2208.11580; Kurtic et al. 2023, arXiv 2302.04089 (ZipLM); docs/narrow.md has measurements.

    \b
    Examples:
      effconvert narrow --ffn 1344 --refit ./SmolLM2-135M
      effconvert narrow --ffn 12288 --calibrate mine.txt meta-llama/Llama-3.1-8B -o ./narrow
    """

    facts: ClassVar[Facts] = Facts("models with an FFN", saves="parameters and arithmetic", native="its own class", exact="with --ffn as many as there are")

    ffn: int = Field(ge=1, description="Neurons of each FFN to keep, F; GPUs like multiples of 64.", json_schema_extra={"metavar": "F"})

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The number of neurons that there are."""
        config.with_ffn(config.ffn)
        return f"--ffn F, fewer than {config.ffn}"

    def check(self, config: Config) -> None:
        """Refuse more neurons than there are, and families that cannot have fewer."""
        config.with_ffn(self.ffn)
        if self.ffn > config.ffn:
            raise OptionError(f"--ffn {self.ffn} is more than the {config.ffn} neurons of this model's FFNs; give at most {config.ffn}")

    def is_exact(self, config: Config) -> bool:
        """Only where all stay."""
        return self.ffn == config.ffn

    def config(self, config: Config) -> Config:
        """Write the new width."""
        return config.with_ffn(self.ffn)

    def needs_calibration(self, config: Config) -> bool:
        """If some go."""
        return not self.is_exact(config)

    def fit_bytes(self, config: Config) -> int:
        """Six matrices of all neurons in float64."""
        return 6 * 8 * config.ffn**2

    def notes(self, config: Config) -> str:
        """Say where nothing changes."""
        return f"the FFNs have {self.ffn} neurons already, so nothing changes" if self.is_exact(config) else ""

    def layer(self, layer: Layer) -> None:
        """Take the rows of the neurons that stay from gate and up, and fit down to the output of all."""
        if self.is_exact(layer.config) or "down" not in layer:
            return
        if layer.activations:
            from effconvert.surgery.ffn._fewer import fewer

            kept, down = fewer(layer, self.ffn)
        else:
            import torch

            kept, down = torch.arange(self.ffn), layer["down"][:, : self.ffn]
        for part in ("gate", "gate.bias", "up", "up.bias"):
            if part in layer:
                layer[part] = layer[part][kept]
        layer["down"] = down
