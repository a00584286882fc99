"""Write a model as a family whose RoPE turns other pairs of a head."""
# Hk = heads of queries or of keys, D = head width, M = hidden width, T = positions.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from effconvert.errors import ModelError, OptionError
from effconvert.families import FAMILIES
from effconvert.surgery._surgery import Facts, Surgery
from effconvert.surgery.attention._restated import check_head, restate, restated

if TYPE_CHECKING:
    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.layer import Layer, Model
    from effconvert.checkpoint.outer import Outer

RENAMED = {"activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps", "attn_pdrop": "attention_dropout"}  # of gptj's config -> phi's
TURNS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim")  # keys that `rope_parameters` stands for
BASE = 10000.0  # of all roformers' sines and cosines
ROUNDED = 0.004  # of sines and cosines, if they were kept in bfloat16


class RopeLayout(Surgery):
    """Write a model as a family whose RoPE turns other pairs of a head.

    Some families turn neighbours (ernie4_5, helium, glm, gptj, codegen, roformer), others numbers that are half a head apart. The rows of queries and keys
    are put into the other order, and the result computes the same, in a class that more programs serve, or that more techniques of effconvert know: mla and
    moe take a llama, gqa and mixers a phi or a jina_embeddings_v3. Where RoPE turns only a part of a head and the new class turns all of it, the other pairs
    get the frequency 0. No number is computed anew, so `--to` the old family undoes it where that is possible. docs/rope-layout.md has the table.

    \b
    Examples:
      effconvert rope-layout ./ERNIE-4.5-0.3B-PT -o ./as-a-llama
      effconvert rope-layout --to llama ./glm-4-9b-chat
    """

    facts: ClassVar[Facts] = Facts(
        "ernie4_5, helium, glm, phi3, llama, gptj, codegen, roformer",
        saves="nothing: it is for loaders and techniques that know the other family",
        native="llama, phi3, phi, jina_embeddings_v3 and others",
        exact="always",
    )

    to: str | None = Field(
        None, description="The family to become, such as llama, phi3, phi. Default: the first that the model fits.", json_schema_extra={"metavar": "FAMILY"}
    )

    @classmethod
    def allowed_options(cls, config: Config) -> str:
        """The families."""
        cls().check(config)
        return "--to " + " or ".join(kind for kind in config.family.relaid if not _misfit(config, kind))

    def check(self, config: Config) -> None:
        """Refuse models that are no other family's, and families that the model does not fit."""
        config.check_alone()
        if not config.family.relaid:
            raise ModelError(f"{_obstacle(config)}; rope-layout takes {', '.join(kind for kind, family in FAMILIES.items() if family.relaid)}")
        if self.to and self.to not in config.family.relaid:
            raise OptionError(f"--to {self.to} is no family that is {config.kind} with RoPE of other pairs; give {' or '.join(config.family.relaid)}")
        if config.needs_effconvert:
            raise ModelError(f"this {config.kind} has parts of effconvert in it, which know the pairs that it has; begin from the original")
        misfits = {kind: _misfit(config, kind) for kind in config.family.relaid}
        if fitting := [kind for kind, why in misfits.items() if not why]:
            if self.to and misfits[self.to]:
                raise OptionError(f"--to {self.to} does not fit this {config.kind}: {misfits[self.to]}; give {' or '.join(fitting)}")
            check_head(config, self.config(config))
            return
        reasons = "; ".join(f"as a {kind}, {why}" for kind, why in misfits.items())
        raise ModelError(f"this {config.kind} has no counterpart with RoPE of other pairs: {reasons}; keep it, `effconvert inspect` lists what works with it")

    def is_exact(self, config: Config) -> bool:
        """Always."""
        return True

    def config(self, config: Config) -> Config:
        """Become the family."""
        return _become(config, self._kind(config))

    def notes(self, config: Config) -> str:
        """Say what is there besides the order."""
        after, kind = self.config(config), self._kind(config)
        added = sorted(_biases(after) - _biases(config))
        notes = [f"{kind} has biases where this {config.kind} has none ({', '.join(added)}): they are zeros"] if added else []
        if after.rotary != config.rotary and after.rotary == config.head_dim:
            notes += ["the pairs that RoPE leaves alone get the frequency 0 (rope_type proportional, which transformers reads; other programs may ignore it)"]
        return "; ".join(notes)

    def layer(self, layer: Layer) -> None:
        """Order the rows of queries and keys, and add biases of zeros where the class has them."""
        import torch

        from effconvert.surgery._rope import laid_out_anew

        before, after = layer.config, self.config(layer.config)
        if (before.rotary, before.family.rope) != (after.rotary, after.family.rope):
            for part in [part for part in ("q", "k", "q.bias", "k.bias") if part in layer]:
                heads = layer[part].unflatten(0, (-1, before.head_dim))  # [Hk, D, M], of a bias [Hk, D]
                layer[part] = laid_out_anew(heads, before.rotary, before.family.rope, after.rotary, after.family.rope, 1 - heads.ndim).flatten(0, 1)
        for part in sorted(_biases(after)):
            if f"{part}.bias" not in layer:
                layer[f"{part}.bias"] = torch.zeros(before.matrices[part][0], device="meta" if layer.shapes_only else "cpu")

    def rewrite(self, model: Model) -> None:
        """Change each layer by itself, and the parts outside, which are looked at with the first layer: they are copied, and not read otherwise."""
        super().rewrite(model)
        if "angles" in model.config.family.outer:
            model.layers[0].later(lambda layer: _check_angles(model.outer))

    def outer(self, outer: Outer) -> None:
        """Leave out the table of sines and cosines, if there is one, and rename the head."""
        if "angles" in outer:
            del outer["angles"]
        restate(outer, FAMILIES[self._kind(outer.config)])

    def _kind(self, config: Config) -> str:
        """Return the family to become."""
        return self.to or next(kind for kind in config.family.relaid if not _misfit(config, kind))


def _become(config: Config, kind: str) -> Config:
    """Return the config of family `kind`.

    Raises:
        ModelError: it has no such switch.
    """
    from effconvert.surgery.attention._angles import rope_entry

    family, biased = FAMILIES[kind], _biases(config)
    own = {*TURNS, *config.family.biased}
    usual = {key: value for key, value in config.family.defaults.items() if key not in own}
    keys: dict[str, Any] = {"rope_parameters": rope_entry(config, family), "tie_word_embeddings": config.tied}
    keys |= {key: bool(biased & {*parts}) for key, parts in family.biased.items() if key}
    if family.kv_heads_key:
        keys |= {family.kv_heads_key: config.kv_heads, "head_dim": config.head_dim}
    return restated(config.without(*own), kind, usual, RENAMED, keys)


def _biases(config: Config) -> set[str]:
    """Return the parts of a layer that have a bias, as far as the row says."""
    return {part for key, parts in config.family.biased.items() if not key or config.get(key) for part in parts}


def _misfit(config: Config, kind: str) -> str:
    """Return why a model is none of family `kind`; empty if it is one."""
    family = FAMILIES[kind]
    try:
        after = _become(config, kind)
    except ModelError as error:
        return str(error).partition(";")[0]
    reasons = {
        f"there is no place for the bias of {', '.join(sorted(_biases(config) - _biases(after)))}": not _biases(config) <= _biases(after),
        "its heads have to be as wide as the stream, all together": family.fixed_head_width and config.heads * config.head_dim != config.hidden,
        "its layers have a sliding window": any(config.windows()),
        f"embeddings have to be as wide as the layers, {config.hidden}": config.embed_width != config.hidden,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _check_angles(outer: Outer) -> None:
    """Refuse sines and cosines that are not those of RoPE with the usual base.

    Raises:
        ModelError: they are others.
    """
    import torch

    from effconvert.surgery.attention._turned import angles

    table = outer.before("angles")  # [T, D]: all sines, then all cosines
    turns = angles(len(table), outer.config.head_dim, BASE)
    if not outer.shapes_only and (table - torch.cat([turns.sin(), turns.cos()], 1)).abs().max() > ROUNDED:
        raise ModelError(
            f"the sines and cosines of this {outer.config.kind} are not those of RoPE with the base {BASE:g}; if effconvert rope --theta wrote them, let "
            "`effconvert rope --to jina_embeddings_v3` have its original"
        )


def _obstacle(config: Config) -> str:
    """Return why no family is this one with other pairs."""
    if not config.family.rope:
        return f"{config.kind} has no RoPE"
    if config.family.rope == "interleaved":
        return f"{config.kind} turns neighbours in a head, and no family of transformers with pairs half a head apart is otherwise the same"
    return f"{config.kind} turns numbers that are half a head apart, as most programs expect"
