"""Turn queries and keys by position, in place of a position table."""
# M = hidden width, T = positions of the table, P = pairs of a head's numbers.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES, Family
from effconvert.families.encoders import BERT
from effconvert.surgery._surgery import Facts, Surgery

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer
    from effconvert.checkpoint.outer import Outer
    from effconvert.surgery._surgery import ForwardProtocol

# Keys of gpt2's config -> what the others call them; of a shape's keys the families' rows know the names.
RENAMED = {"activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps", "resid_pdrop": "hidden_dropout", "attn_pdrop": "attention_dropout"}
PRETRAINING = "head.seq_relationship"  # of BERT's head; a masked language model does not read it
HEAD = {"predictions.transform.LayerNorm": "layer_norm", "predictions.transform.": "", "predictions.": ""}  # BERT's names of the rest -> RoBERTa's


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
        target = self.config(config)
        if config.predicts and _renames_head(config, target.family) and target.get("hidden_act") != "gelu":
            raise ModelError(f"the head of a {target.kind} has gelu where this {config.kind} has {target.get('hidden_act')}; save the encoder alone")

    def is_exact(self, config: Config) -> bool:
        """Never."""
        return False

    def config(self, config: Config) -> Config:
        """Become the family with RoPE."""
        before, kind = config.family, self._kind(config)
        family = FAMILIES[kind]
        sizes = {"heads_key": config.heads, "layers_key": config.layers, "hidden_key": config.hidden, "ffn_key": config.ffn, "positions_key": config.longest}
        raw = {RENAMED.get(key, key): value for key, value in config.raw.items() if key not in {getattr(before, name) for name in sizes}}
        keys: dict[str, Any] = {getattr(family, name): size for name, size in sizes.items()}
        if family.embed_key:
            keys[family.embed_key] = config.hidden
        if "angles" not in family.outer:
            keys["rope_parameters"] = {"rope_type": "default", "rope_theta": self.theta}
        target = config.become(kind)
        keys |= {"model_type": kind, "architectures": target.raw["architectures"]}
        return replace(target, raw={key: value for key, value in {**before.with_rope[kind], **raw, **keys}.items() if key not in family.absent})

    def needs_calibration(self, config: Config) -> bool:
        """If queries and keys are fitted."""
        return self.fit == "scores"

    def needs_original(self, config: Config) -> bool:
        """Likewise: its scores are what they are fitted to."""
        return self.needs_calibration(config)

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

            assert config.longest
            turns = angles(config.longest, config.head_dim, self.theta)
            outer["angles"] = torch.cat([turns.sin(), turns.cos()], 1).float().to(device)  # as roformer keeps them, [T, 2 P]
        if config.bare and "pooler" in family.outer and "pooler.dense.weight" not in outer:  # its class always has one
            shapes = {"weight": (config.hidden, config.hidden), "bias": (config.hidden,)}
            for name, shape in shapes.items():
                outer[f"pooler.dense.{name}"] = torch.zeros(shape, device=device)
        left_out = ("positions", PRETRAINING, *(() if "pooler" in family.outer else ("pooler",)))
        for part in [part for part in outer if part.startswith(left_out)]:
            del outer[part]
        if _renames_head(config, family):
            for part in [part for part in outer if part.startswith("head.")]:
                outer.copy(part, _renamed(part))
                del outer[part]

    def _kind(self, config: Config) -> str:
        """Return the family to become."""
        return self.to or next(iter(config.family.with_rope))


def _table(outer: Outer) -> Tensor:
    """Return the table, [T, M], without rows for padding, which are its first."""
    assert outer.config.longest
    return outer["positions"][-outer.config.longest :]


def _renames_head(config: Config, family: Family) -> bool:
    """Whether the parts of the head have other names in `family`."""
    return config.family.head != family.head and config.family.head["head"] == BERT.head["head"]


def _renamed(part: str) -> str:
    """Return the name of a part of BERT's head in RoBERTa's."""
    for bert, roberta in HEAD.items():
        part = part.replace(bert, roberta)
    return part


def _obstacle(config: Config) -> str:
    """Return why there is no family that is this one with RoPE."""
    if not config.attention:
        return f"{config.kind} does not attend, so there are no queries and keys to turn"
    if config.family.rope:
        return f"{config.kind} has RoPE already"
    if not config.has_table:
        return f"{config.kind} adds distances to its scores, and has no position table to replace"
    return f"{config.kind} has a position table, and no family of transformers is the same with RoPE; give a bert, a roberta or a gpt2"
