"""Replace the embedding table by two thin factors."""
# V = vocabulary, M = width of the table, N = tokens of a block, K = its rank.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from effconvert.checkpoint.replaced import OUTSIDE, OWN
from effconvert.errors import ModelError, OptionError
from effconvert.quantities import count
from effconvert.surgery._replacement import OuterReplacement, Rows
from effconvert.surgery._surgery import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.outer import Outer
    from effconvert.surgery._surgery import ForwardProtocol
    from effconvert.surgery.embedding._blocks import Block

Rank = Annotated[str | None, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
ORDER = "order"  # [V]: the place of each token among all, sorted by block


class FactorEmbed(OuterReplacement):
    """Replace the embedding table by two thin factors.

    The table [V, M] becomes, for each of some blocks of tokens sorted by frequency, [tokens, rank] times [rank, M]; blocks that are better kept whole stay
    so. A head that is tied to the table computes logits with the same factors, and so with less arithmetic. Ranks are chosen so that the sum of losses on
    the calibration text is least for this many parameters; the head's loss is weighted by the hidden states that it gets. --blocks 1 is the plain
    factorisation. Half of the table cost MiniLM, an encoder, nothing that was measured; of SmolLM2, a small decoder, dropping layers costs less quality
    at equal size (docs/factor-embed.md). Chen et al. 2018, arXiv 1806.06950 (GroupReduce).

    \b
    Examples:
      effconvert factor-embed --rank 384 ./SmolLM2-135M
      effconvert factor-embed --ratio 0.5 --calibrate mine.txt ./SmolLM2-135M -o ./thin
    """

    facts: ClassVar[Facts] = Facts(
        "all models with a plain or scaled embedding", saves="parameters of the embedding, arithmetic of the head", native="", exact="with --ratio 1"
    )
    whole_numbers: ClassVar[tuple[str, ...]] = (ORDER,)

    rank: Rank = Field(
        None,
        pattern=r"^0*[1-9]\d*(,0*[1-9]\d*)*$",
        description="As many parameters as two factors of this rank have; or the rank of each block, the most frequent tokens first.",
        json_schema_extra={"metavar": "R"},
    )
    ratio: float | None = Field(None, gt=0, le=1, description="Share of the table's parameters to keep, instead of --rank.", json_schema_extra={"metavar": "R"})
    blocks: int = Field(6, ge=1, description="Blocks of tokens, each twice as large as the one before.", json_schema_extra={"metavar": "B"})
    where: Literal["both", "embed", "head"] = Field("both", description="Of a model whose head is no embedding: what to replace.")

    @property
    def label(self) -> str:
        """The name, with the ratio or the rank; a list of ranks would be too long."""
        size = self.rank if self.ratio is None and "," not in str(self.rank) else self.ratio
        return "-".join([self.name, *([] if size is None else [str(size)])])

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The ratio, or ranks up to the full one."""
        cls(rank="1", blocks=1).check(config)
        return f"--ratio R, or --rank 1 to {config.embed_width}"

    def places(self, config: Config) -> tuple[str, ...]:
        """Return the embedding alone if a head is tied to it, or where there is none."""
        if config.tied or not config.predicts:
            return ("embed",)
        return OUTSIDE if self.where == "both" else (self.where,)

    def check(self, config: Config) -> None:
        """Refuse ranks, blocks and places that the model cannot have."""
        if (self.ratio is None) == (self.rank is None):
            raise OptionError("give either --rank or --ratio, the share of parameters to keep")
        if taken := next(filter(None, map(config.replaced_outside, self.places(config))), None):
            raise ModelError(f"this {config.kind} has {taken.technique} in place of the {taken.place} already; begin from the original")
        super().check(config)
        if self.where != "both" and config.tied and config.predicts:
            raise OptionError("the head is the embedding (tie_word_embeddings), so both are replaced together; leave out --where")
        if self.where == "head" and not config.predicts:
            raise OptionError(f"{config.architecture} has no head that predicts tokens; leave out --where")
        if self.blocks > (most := config.vocabulary.bit_length()):
            raise OptionError(f"--blocks {self.blocks} is more than {config.vocabulary} tokens can be cut into, each twice as large; give at most {most}")
        self._ranks(config)

    @property
    def undecided(self) -> bool:
        """If the ranks of several blocks are to be chosen."""
        return self.blocks > 1 and "," not in str(self.rank)

    @property
    def rule(self) -> str:
        """What is compared."""
        return "the least sum of losses in the layers and the head"

    def decide(self, forward: ForwardProtocol) -> FactorEmbed:
        """Choose the rank of each block."""
        from effconvert.surgery.embedding._blocks import fill

        config = forward.config
        places, width = self.places(config), config.embed_width
        whole = len(places) * config.vocabulary * width
        budget = self.ratio * whole if self.ratio is not None else len(places) * int(self.rank or 1) * (config.vocabulary + width)
        if budget >= whole:
            ranks = [width] * self.blocks * len(places)
        else:
            blocks = self._analysed(forward)[1]
            ranks = fill([block.losses for place in places for block in blocks[place]], self._sizes(config) * len(places), budget)
        return self.model_copy(update={"ratio": None, "rank": ",".join(map(str, ranks))})

    def is_exact(self, config: Config) -> bool:
        """If all blocks stay whole."""
        return all(rank == config.embed_width for ranks in self._ranks(config).values() for rank in ranks)

    def needs_survey(self, config: Config) -> bool:
        """If a block does not stay whole."""
        return not self.is_exact(config)

    def fit_bytes(self, config: Config) -> int:
        """A few square matrices for each block of a table, in float64."""
        return 8 * (3 * self.blocks + 6) * config.embed_width**2

    def notes(self, config: Config) -> str:
        """Say what is saved."""
        from effconvert.surgery.embedding._blocks import parameters

        ranks, width = self._ranks(config), config.embed_width
        before = len(ranks) * config.vocabulary * width
        after = sum(parameters(*block) for own in ranks.values() for block in zip(self._sizes(config), [width] * self.blocks, own, strict=True))
        if after >= before:
            return f"nothing is saved: at these ranks there are {count(after)} parameters, and the table has {count(before)}"
        what = "embedding and head" if len(ranks) == 2 else self.places(config)[0].replace("embed", "embedding")
        return f"{what} {'keep' if len(ranks) == 2 else 'keeps'} {after / before:.1%} of {count(before)} parameters"

    def parameters(self, config: Config, place: str = "") -> Mapping[str, tuple[int, ...]]:
        """The order of tokens if there are several blocks, and for each block [N, K] and [K, M]; [N, M] where it stays whole."""
        shapes: dict[str, tuple[int, ...]] = {ORDER: (config.vocabulary,)} if self.blocks > 1 else {}
        for block, (size, rank) in enumerate(zip(self._sizes(config), self._ranks(config)[place], strict=True)):
            shapes[f"left_{block}"] = (size, rank)
            if rank < config.embed_width:
                shapes[f"right_{block}"] = (rank, config.embed_width)
        return shapes

    def initial_values(self, config: Config, index: int, place: str = "") -> Mapping[str, Tensor]:
        """Random factors of a model that is trained from scratch, and tokens in their own order."""
        import torch

        draw = torch.Generator().manual_seed(0)
        shapes = self.parameters(config, place)
        values = {name: torch.randn(shape, generator=draw) * 0.02 for name, shape in shapes.items() if name.startswith("left")}
        values |= {name: torch.eye(*shape) for name, shape in shapes.items() if name.startswith("right")}
        return values | ({ORDER: torch.arange(config.vocabulary)} if ORDER in shapes else {})

    def survey(self, forward: ForwardProtocol) -> Mapping[str, Tensor]:
        """Return the tokens of all blocks in order, and each block's factors: rows of the table times [M, K] are the left one."""
        import torch

        groups, blocks = self._analysed(forward)
        results = {"tokens": torch.cat(groups)}
        for place, ranks in self._ranks(forward.config).items():
            for number, (block, rank) in enumerate(zip(blocks[place], ranks, strict=True)):
                if rank < forward.config.embed_width:
                    factors = block.factors(rank)
                    results |= {f"{place}.{side}_{number}": factor.float() for side, factor in zip(("left", "right"), factors, strict=True)}
        return results

    def outer(self, outer: Outer) -> None:
        """Replace the tables. The left factors are computed from rows of the table when they are written."""
        import torch

        config = outer.config
        known, shapes_only = outer.survey or {}, outer.shapes_only or (outer.survey is None and self.needs_survey(config))
        tokens = known.get("tokens", torch.arange(config.vocabulary))
        for place in self.places(config):
            table = outer.table(place)
            if table not in outer or outer.shape(table) != (config.vocabulary, config.embed_width):
                raise ModelError(f"the head of this {config.kind} is no module of its own on disk, so it cannot be replaced; give --where embed")
            duplicates = [part for part in outer if part.partition(".")[0] in config.family.head and outer.shape(part) == outer.shape(table)]
            start = 0
            for name, shape in self.parameters(config, place).items():
                part = f"{table}.{OWN}{name}"
                if name == ORDER:
                    outer[part] = torch.empty(shape, dtype=torch.int64, device="meta") if shapes_only else tokens.argsort()
                elif name.startswith("right"):
                    outer[part] = torch.empty(shape, device="meta") if shapes_only else known[f"{place}.{name}"]
                else:
                    group = tokens[start : start + shape[0]]
                    outer.defer_rows(part, shape, partial(_left, outer, table, group, known.get(f"{place}.{name}")))
                    start += shape[0]
            for part in {table, *(duplicates if config.tied else ())}:
                del outer[part]

    def lookup(self, config: Config, place: str, read: Rows, tokens: Tensor) -> Tensor:
        """Compute a row in each block, and take that of the token's own."""
        import torch

        places = read(ORDER, tokens) if self.blocks > 1 else tokens
        start, result = 0, None
        for block, (size, rank) in enumerate(zip(self._sizes(config), self._ranks(config)[place], strict=True)):
            rows = read(f"left_{block}", (places - start).clamp(0, size - 1))  # [..., K]
            if rank < config.embed_width:
                rows = rows @ read(f"right_{block}", None)
            result = rows if result is None else torch.where((places < start)[..., None], result, rows)
            start += size
        assert result is not None
        return result

    def logits(self, config: Config, place: str, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Multiply by one factor after the other in each block, and put tokens in their own order."""
        import torch

        parts = []
        for block in range(self.blocks):
            right = weights.get(f"right_{block}")
            inner = hidden if right is None else hidden @ right.T  # [..., K]
            parts.append(inner @ weights[f"left_{block}"].T)
        return torch.cat(parts, -1).index_select(-1, weights[ORDER]) if self.blocks > 1 else parts[0]

    def _sizes(self, config: Config) -> list[int]:
        from effconvert.surgery.embedding._blocks import sizes

        return sizes(config.vocabulary, self.blocks)

    def _ranks(self, config: Config) -> dict[str, list[int]]:
        """Return the rank of each block at each place; before they are chosen, that which all have together.

        Raises:
            OptionError: a rank is more than the full one, or there is another number of them.
        """
        places, width = self.places(config), config.embed_width
        if self.ratio is not None:
            even = width if self.ratio == 1 else max(1, int(self.ratio * config.vocabulary * width / (config.vocabulary + width)))
            return {place: [even] * self.blocks for place in places}
        ranks = [int(rank) for rank in str(self.rank).split(",")]
        if above := next((rank for rank in ranks if rank > width), None):
            raise OptionError(f"--rank {above} is more than the full rank of the table; give at most {width}")
        if len(ranks) == 1:
            ranks *= self.blocks * len(places)
        if len(ranks) != self.blocks * len(places):
            each = f"{self.blocks} blocks" + (" each of the embedding and of the head" if len(places) > 1 else "")
            raise OptionError(f"--rank has {len(ranks)} ranks, and there are {each}; give one for each, or a single one")
        return {place: ranks[number * self.blocks : (number + 1) * self.blocks] for number, place in enumerate(places)}

    def _analysed(self, forward: ForwardProtocol) -> tuple[list[Tensor], dict[str, list[Block]]]:
        """Return the tokens of each block, and what each block of a table loses."""
        from effconvert.surgery.attention._heads import moment_of
        from effconvert.surgery.embedding._blocks import HEAD_SHARE, analyse, weights_of

        config, counts = forward.config, forward.counts
        groups = list(counts.argsort(descending=True, stable=True).split(self._sizes(config)))
        second = moment_of(forward.head_inputs()) if config.decoder and config.predicts and (config.tied or self.where != "embed") else None
        shares = {"embed": (1 - HEAD_SHARE, HEAD_SHARE if config.tied and second is not None else 0.0), "head": (0.0, HEAD_SHARE)}
        if second is None:
            shares = {"embed": (1.0, 0.0), "head": (1.0, 0.0)}
        rows = {place: partial(forward.table_rows, place) for place in self.places(config)}
        blocks = {place: analyse(rows[place], groups, weights_of(counts), shares[place], second) for place in rows}
        return groups, blocks


def _left(outer: Outer, table: str, group: Tensor, projection: Tensor | None, numbers: Tensor) -> Tensor:
    """Return rows of a left factor: rows of the table, by [M, K]."""
    rows = outer.rows_before(table, group[numbers])
    return rows if projection is None else rows @ projection
