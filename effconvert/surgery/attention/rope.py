"""Turn queries and keys by position, in place of a position table."""
# M = hidden width, T = positions of the table, P = pairs of a head's numbers.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.surgery._surgery import Facts, Surgery
from effconvert.surgery.attention._restated import check_head, restate, restated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.checkpoint.outer import Outer
    from effconvert.surgery._surgery import ForwardProtocol

# Keys of gpt2's config -> what the others call them; of a shape's keys the families' rows know the names.
RENAMED = {"activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps", "resid_pdrop": "hidden_dropout", "attn_pdrop": "attention_dropout"}


class Rope(Surgery):
    """Turn queries and keys by position, in place of a position table.

    transformers opens the result without effconvert: a bert becomes a roformer (--to jina_embeddings_v3 keeps its pooler, and techniques between
    projections apply to it), roberta and its like a jina_embeddings_v3, gpt2 a gpt_neox. No RoPE computes what a table does: what a position adds to the
    stream is lost. The mean of the table stays. Queries and keys of each layer are fitted by least squares to the scores of the original, which knows
    the positions, and the norm of the embeddings to its embeddings. On all-MiniLM-L6-v2 that loses 0.03 of 0.87 on STS-B, and --refit adds nothing.
    docs/rope.md has the measurements. RoFormer: Su et al. 2021, arXiv 2104.09864.

    \b
    Examples:
      effconvert rope ./all-MiniLM-L6-v2 -o ./turned
      effconvert rope --to jina_embeddings_v3 --calibrate mine.txt ./all-MiniLM-L6-v2
    """

    facts: ClassVar[Facts] = Facts("bert, roberta and its like, gpt2", saves="the position table", native="roformer, jina_embeddings_v3, gpt_neox", exact="")
    transfer_first = True

    to: str | None = Field(
        None, description="The family to become: roformer or jina_embeddings_v3 for a bert. Default: the first.", json_schema_extra={"metavar": "FAMILY"}
    )
    theta: float = Field(
        10000.0, gt=1, allow_inf_nan=False, description="The base of the angles: pair p of P turns by theta^(-p/P) from one token to the next."
    )
    fit: Literal["scores", "none"] = Field(
        "scores", description="Fit queries and keys to the original's scores on the calibration text (scores), or turn them as they are (none)."
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The families."""
        cls().check(config)
        return " or ".join(f"--to {kind}" for kind in config.family.with_rope)

    def check(self, config: Config) -> None:
        """Refuse models without a table of positions, and those that no family of transformers is like."""
        config.check_alone()
        if not config.family.with_rope:
            raise ModelError(f"{_obstacle(config)}; `effconvert inspect` lists what works")
        if self.to and self.to not in config.family.with_rope:
            raise OptionError(f"--to {self.to} is no family that is {config.kind} with RoPE; give {' or '.join(config.family.with_rope)}")
        if config.needs_effconvert:
            raise ModelError(f"this {config.kind} has parts of effconvert in it, for which {self._kind(config)} has no place; begin from the original")
        if config.head_dim % 2:
            raise ModelError(f"a head of this {config.kind} has {config.head_dim} numbers, and RoPE turns pairs; take a model with heads of an even width")
        check_head(config, self.config(config))

    def is_exact(self, config: Config) -> bool:
        """Never."""
        return False

    def config(self, config: Config) -> Config:
        """Become the family with RoPE."""
        kind = self._kind(config)
        keys = {} if "angles" in FAMILIES[kind].outer else {"rope_parameters": {"rope_type": "default", "rope_theta": self.theta}}
        return restated(config, kind, config.family.with_rope[kind], RENAMED, keys)

    def needs_calibration(self, config: Config) -> bool:
        """If queries and keys are fitted."""
        return self.fit == "scores"

    def needs_original(self, config: Config) -> bool:
        """Likewise: its scores are what they are fitted to."""
        return self.needs_calibration(config)

    @property
    def keeps_attention(self) -> bool:
        """Likewise."""
        return self.fit == "scores"

    def needs_survey(self, config: Config) -> bool:
        """Likewise, if the embeddings go through a norm, which is fitted."""
        return self.needs_calibration(config) and "embed_norm" in config.family.outer

    def survey(self, forward: ForwardProtocol) -> Mapping[str, Tensor]:
        """Return the mean of positions, and the gain and the bias of the embeddings' norm."""
        from effconvert.surgery.attention._turned import fit_norm

        return fit_norm(forward, _table(forward.outer))

    def notes(self, config: Config) -> str:
        """Say what is left out."""
        pooler = "pooler" in config.family.outer and "pooler" not in FAMILIES[self._kind(config)].outer
        return f"{self._kind(config)} has no pooler, so that of a {config.kind} is left out; --to jina_embeddings_v3 keeps it" if pooler and config.bare else ""

    def layer(self, layer: Layer) -> None:
        """Fit queries and keys."""
        if not self.needs_calibration(layer.config):
            return
        for part in ("q", "q.bias", "k", "k.bias"):
            layer[part] = layer[part]  # marks it as changed, for the plan
        if layer.activations:
            from effconvert.surgery.attention._turned import fit_scores

            fit_scores(layer, self.theta, FAMILIES[self._kind(layer.config)].rope)

    def outer(self, outer: Outer) -> None:
        """Add the mean of the table to what stays, and leave out the table."""
        import torch

        config, family, mean = outer.config, FAMILIES[self._kind(outer.config)], _table(outer).mean(0)
        if outer.survey:
            mean = outer.survey["mean"]
            outer["embed_norm"], outer["embed_norm.bias"] = outer.survey["gain"], outer.survey["bias"]
        elif self.needs_survey(config):
            outer["embed_norm"], outer["embed_norm.bias"] = outer["embed_norm"], outer["embed_norm.bias"]  # marks them as changed, for the plan
        if "types" in outer:
            outer["types"] = outer["types"] + mean
        else:  # of a tied head this adds the same number to all logits of a token, which no probability notices
            outer.defer_rows("embed", outer.shape("embed"), lambda numbers: outer.rows_before("embed", numbers) + mean)
        device = "meta" if outer.shapes_only else "cpu"
        if "angles" in family.outer:
            from effconvert.surgery.attention._turned import angles

            turns = angles(config.stated_length, config.head_dim, self.theta)
            outer["angles"] = torch.cat([turns.sin(), turns.cos()], 1).float().to(device)  # as roformer keeps them, [T, 2 P]
        for part in [part for part in outer if part.startswith("positions")]:
            del outer[part]
        restate(outer, family)

    def _kind(self, config: Config) -> str:
        """Return the family to become."""
        return self.to or next(iter(config.family.with_rope))


def _table(outer: Outer) -> Tensor:
    """Return the table, [T, M], without rows for padding, which are its first."""
    return outer["positions"][-outer.config.stated_length :]


def _obstacle(config: Config) -> str:
    """Return why there is no family that is this one with RoPE."""
    if not config.attention:
        return f"{config.kind} does not attend, so there are no queries and keys to turn"
    if config.family.rope:
        return f"{config.kind} has RoPE already; rope-layout changes its pairs" if config.family.relaid else f"{config.kind} has RoPE already"
    if not config.has_table:
        return f"{config.kind} adds distances to its scores, and has no position table to replace"
    return f"{config.kind} has a position table, and no family of transformers is the same with RoPE; give a bert, a roberta or a gpt2"
