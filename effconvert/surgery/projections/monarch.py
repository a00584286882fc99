"""Replace projections by Monarch matrices."""
# O = outputs of a projection, I = its inputs, K = blocks.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from effconvert.checkpoint.replaced import Replaced
from effconvert.errors import ModelError, OptionError
from effconvert.surgery._replacement import PlaceContext
from effconvert.surgery._surgery import Facts
from effconvert.surgery.projections._factored import Factored

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config


class Monarch(Factored):
    """Replace projections by Monarch matrices.

    A projection [out, in] becomes two block-diagonal matrices of K blocks with a permutation between them: K (out + in) numbers, as many as two plain thin
    matrices of rank K. Each of its K x K blocks has rank 1. They are fitted on the calibration text block by
    block (activation-whitened), and the second matrix then to the whole output, layer by layer on the outputs of the converted layers below. On real weights
    this is worse than low-rank at equal size, and on a CPU it reads text far slower than the original: take low-rank, unless you train on and want
    block-diagonal products.
    Dao et al. 2022, arXiv 2204.00595; docs/low-rank.md has measurements.

    \b
    Examples:
      effconvert monarch --blocks 192 ./SmolLM2-135M
      effconvert monarch --blocks 64 --parts up,down --layers 10-20 ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts("models whose projections are modules of their own", saves="parameters and arithmetic of projections", native="", exact="")

    blocks: int = Field(
        ge=1,
        description="Blocks of each factor, K, which divide inputs and outputs; more blocks are more parameters.",
        json_schema_extra={"metavar": "K"},
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The numbers that divide all dimensions."""
        cls(blocks=1).check(config)
        return f"--blocks {_divisors(config, cls(blocks=1).places(config))}"

    def check(self, config: Config) -> None:
        """Refuse blocks that do not divide a projection, and models without such projections."""
        super().check(config)
        for place in self.places(config):
            if any(side % self.blocks for side in config.matrices[place]):
                out, inner = config.matrices[place]
                raise OptionError(
                    f"--blocks {self.blocks} does not divide the {inner} inputs and {out} outputs of {place}; give {_divisors(config, self.places(config))}"
                )

    def is_exact(self, config: Config) -> bool:
        """If each block is one row or one column."""
        return all(self.blocks in config.matrices[place] for place in self.places(config))

    def notes(self, config: Config) -> str:
        """Say what is saved."""
        sizes = [config.matrices[place] for _, place in self.pairs(config)]
        share = sum(self.blocks * (out + inner) for out, inner in sizes) / sum(out * inner for out, inner in sizes)
        return f"{len(sizes)} projections keep {share:.1%} of their parameters" if share < 1 else f"nothing is saved: {share:.1f} times the parameters"

    def config(self, config: Config) -> Config:
        """Record the layers that have each projection."""
        pairs = self.pairs(config)
        for place in self.places(config):
            layers = tuple(index for index, part in pairs if part == place)
            config = config.with_replaced(Replaced(self.name, {"parts": place, "blocks": self.blocks}, place, layers, (place,)))
        return config

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The blocks of both factors: [K, O/K, K] for outputs, and [K, K, I/K] for inputs."""
        out, inner = config.matrices[place]
        return {"left": (self.blocks, out // self.blocks, self.blocks), "right": (self.blocks, self.blocks, inner // self.blocks)}

    def replaces(self, config: Config, index: int) -> list[str]:
        """Return those that the layer has."""
        return [place for layer, place in self.pairs(config) if layer == index]

    def factors(self, weight: Tensor, moment: Tensor | None, index: int, place: str, config: Config) -> Mapping[str, Tensor]:
        """Return the blocks of both factors."""
        from effconvert.surgery.projections._blocks import monarch

        if weight.is_meta:
            return {name: weight.new_empty(shape) for name, shape in self.parameters(config, place).items()}
        left, right = monarch(weight, moment, self.blocks)
        return {"left": left.float(), "right": right.float()}

    def product(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix with the blocks of rank 1."""
        import torch

        return torch.einsum("kpr,rks->pkrs", factors["left"], factors["right"]).flatten(2).flatten(0, 1)

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Multiply [B, T, I] by the blocks of inputs, sort by output block, and multiply by those of outputs; the family's bias is added to it."""
        import torch

        inner = torch.einsum("rks,...rs->...kr", weights["right"], hidden.unflatten(-1, (self.blocks, -1)))
        return torch.einsum("kpr,...kr->...pk", weights["left"], inner).flatten(-2)


def _divisors(config: Config, places: tuple[str, ...]) -> str:
    """Return the numbers of blocks above 1 that divide inputs and outputs of all these projections.

    Raises:
        ModelError: there is none.
    """
    common = gcd(*(side for place in places for side in config.matrices[place]))
    if divisors := [str(number) for number in range(2, common + 1) if common % number == 0]:
        return ", ".join(divisors)
    raise ModelError(f"the projections of this {config.kind} have no common divisor, so there are no blocks; take low-rank")
