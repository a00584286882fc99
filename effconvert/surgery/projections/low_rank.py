"""Replace projections by two thin matrices."""
# O = outputs of a projection, I = its inputs, K = rank.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field

from effconvert.checkpoint.replaced import Replaced
from effconvert.errors import OptionError
from effconvert.quantities import count
from effconvert.surgery._replacement import PlaceContext
from effconvert.surgery._surgery import Facts
from effconvert.surgery.projections._factored import Factored
from effconvert.surgery.projections._parts import equal_rank, thin_size

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.surgery._surgery import ForwardProtocol

Rank = Annotated[str | None, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class LowRank(Factored):
    """Replace projections by two thin matrices.

    A projection [out, in] becomes [out, rank] times [rank, in]. The two are chosen so that the projection's outputs on the calibration text change least
    (activation-whitened SVD: Wang et al. 2024, arXiv 2403.07378), layer by layer, on the outputs of the converted layers below. Some of the inputs or
    outputs are taken as they are (pivots), so that one factor has an identity inside, which is not stored: any rank below the full one is smaller than the
    projection. --ratio chooses the rank of each projection by what its truncation does to the hidden states behind the layer.

    The model gets smaller, and not faster: near ratio 1 --form plain decodes faster and loses more. On SmolLM2, narrow --ffn loses more at nine tenths of
    the FFNs' parameters, as much at three quarters, and less at half. Dropping layers costs less on 4,096
    calibration tokens (docs/low-rank.md).

    \b
    Examples:
      effconvert low-rank --ratio 0.9 --refit ./SmolLM2-135M
      effconvert low-rank --rank 64 --parts q,o --layers 4-29 ./SmolLM2-135M
    """

    facts: ClassVar[Facts] = Facts(
        "models whose projections are modules of their own", saves="parameters and arithmetic of projections", native="", exact="with --rank at full rank"
    )

    ratio: float | None = Field(None, gt=0, le=1, description="Share of these projections' parameters to keep.", json_schema_extra={"metavar": "R"})
    rank: Rank = Field(
        None,
        pattern=r"^(0*[1-9]\d*|\d+(,\d+)+)$",
        description="Rank of each projection, instead of --ratio; or one for each, layer by layer, where 0 leaves a projection as it is.",
        json_schema_extra={"metavar": "N"},
    )

    form: Literal["pivoted", "plain"] = Field(
        "pivoted",
        description="Factors with an identity inside one of them, which is not stored; or plain ones: larger at equal rank, faster to run.",
    )
    whole_numbers: ClassVar[tuple[str, ...]] = ("order",)

    @classmethod
    def recorded(cls, options: Mapping[str, Any]) -> Self:
        """Return what a record means: without a form it is of the time when there was only the plain one."""
        return super().recorded({"form": "plain", **options})

    @property
    def label(self) -> str:
        """The name, with the ratio or the rank; a list of ranks would be too long."""
        size = self.rank if self.ratio is None and "," not in str(self.rank) else self.ratio
        return "-".join([self.name, *([] if size is None else [str(size)])])

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The ratio, or ranks up to the full one."""
        cls(rank="1").check(config)
        return f"--ratio R, or --rank 1 to {min(min(config.matrices[place]) for place in cls().places(config))}"

    def check(self, config: Config) -> None:
        """Refuse models without such projections, and ranks that these cannot have."""
        if (self.ratio is None) == (self.rank is None):
            raise OptionError("give either --ratio, the share of parameters to keep, or --rank")
        super().check(config)

    @property
    def undecided(self) -> bool:
        """If only the share of parameters is known."""
        return self.ratio is not None and self.rank is None

    @property
    def rule(self) -> str:
        """What is compared, and the tokens that it is compared on."""
        from effconvert.surgery.projections._ranks import TOKENS

        return f"the least sum of losses, on up to {TOKENS:,} tokens"

    def decide(self, forward: ForwardProtocol) -> LowRank:
        """Choose the rank of each projection."""
        from effconvert.surgery.projections._ranks import choose

        pairs = list(self._ranks(forward.config))
        ranks = choose(forward, pairs, self.ratio, self._pivoted) if self.ratio and self.ratio < 1 else [0] * len(pairs)
        return self.model_copy(update={"ratio": None, "rank": ",".join(map(str, ranks))})

    def is_exact(self, config: Config) -> bool:
        """If all projections have full rank."""
        return all(rank in (0, min(config.matrices[place])) for (_, place), rank in self._ranks(config).items())

    def notes(self, config: Config) -> str:
        """Say what is saved."""
        ranks = self._ranks(config)
        before = sum(out * inner for out, inner in (config.matrices[place] for _, place in ranks))
        sizes = {place: config.matrices[place] for _, place in ranks}
        after = sum(thin_size(*sizes[place], rank, self._pivoted) if rank else sizes[place][0] * sizes[place][1] for (_, place), rank in ranks.items())
        if after >= before:
            return f"nothing is saved: at these ranks the two factors have {count(after)} parameters, and the projections have {count(before)}"
        return f"{sum(rank > 0 for rank in ranks.values())} of {len(ranks)} projections are replaced, and keep {after / before:.1%} of their parameters"

    def config(self, config: Config) -> Config:
        """Record each rank, with the layers that have it."""
        groups: dict[tuple[str, int], list[int]] = {}
        for (index, place), rank in self._ranks(config).items():
            groups.setdefault((place, rank), []).append(index)
        for (place, rank), layers in groups.items():
            if rank:
                config = config.with_replaced(Replaced(self.name, {"parts": place, "rank": rank, "form": self.form}, place, tuple(layers), (place,)))
        return config

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """Two factors, [O, K] and [K, I]; in the pivoted form less the identity, and the order of outputs or inputs."""
        return self._shapes(*config.matrices[place], int(self.rank or 0))

    def replaces(self, config: Config, index: int) -> list[str]:
        """Return those with a rank."""
        return [place for (layer, place), rank in self._ranks(config).items() if layer == index and rank]

    def factors(self, weight: Tensor, moment: Tensor | None, index: int, place: str, config: Config) -> Mapping[str, Tensor]:
        """Return them."""
        import torch

        from effconvert.surgery.projections._factors import thin

        rank, whole = self._ranks(config)[index, place], dict.fromkeys(self.whole_numbers, torch.int64)
        if weight.is_meta:
            return {name: weight.new_empty(shape, dtype=whole.get(name)) for name, shape in self._shapes(*config.matrices[place], rank).items()}
        return thin(weight, moment, rank, self._pivoted)

    def product(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Multiply them."""
        from effconvert.surgery.projections._factors import product

        return product(factors)

    def forward(self, weights: Mapping[str, Tensor], hidden: Tensor, context: PlaceContext) -> Tensor:
        """Multiply by one factor after the other; the family's bias is added to it."""
        if not self._pivoted:
            return hidden @ weights["right"].T @ weights["left"].T
        from effconvert.surgery.projections._pivoted import multiply

        return multiply(weights, hidden)

    @property
    def _pivoted(self) -> bool:
        return self.form == "pivoted"

    def _shapes(self, out: int, inner: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        if not self._pivoted:
            return {"left": (out, rank), "right": (rank, inner)}
        from effconvert.surgery.projections._pivoted import shapes

        return shapes(out, inner, rank)

    def _ranks(self, config: Config) -> dict[tuple[int, str], int]:
        """Return the rank of each projection, by layer and place; 0 for one that stays as it is.

        Raises:
            OptionError: a rank is more than the full one, there is another number of them, or a layer lacks a projection.
            ModelError: the family has no such projection by itself.
        """
        pairs = self.pairs(config)
        full = [min(config.matrices[place]) for _, place in pairs]
        if self.ratio is not None:
            return {(index, place): equal_rank(*config.matrices[place], self.ratio, self._pivoted) for index, place in pairs}
        ranks = [int(rank) for rank in str(self.rank).split(",")]
        ranks *= len(pairs) if len(ranks) == 1 else 1
        if len(ranks) != len(pairs):
            raise OptionError(f"--rank has {len(ranks)} ranks, and {len(pairs)} projections are chosen; give one for each, or a single one")
        if above := next(((place, rank, most) for (_, place), rank, most in zip(pairs, ranks, full, strict=True) if rank > most), None):
            raise OptionError(f"--rank {above[1]} is more than the full rank of {above[0]}; give at most {above[2]}")
        return dict(zip(pairs, ranks, strict=True))
