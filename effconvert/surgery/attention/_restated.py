"""A model that becomes one of another family with RoPE: its config in that family's words, and what is outside its layers."""
# M = hidden width.

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effconvert.errors import ModelError
from effconvert.families import FAMILIES, Family
from effconvert.families.encoders import BERT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from effconvert.checkpoint.config import Config
    from effconvert.checkpoint.outer import Outer

PRETRAINING = "head.seq_relationship"  # of BERT's head; a masked language model does not read it
HEAD = {"predictions.transform.LayerNorm": "layer_norm", "predictions.transform.": "", "predictions.": ""}  # BERT's names of the rest -> RoBERTa's


def restated(config: Config, kind: str, usual: Mapping[str, Any], renamed: Mapping[str, str], keys: Mapping[str, Any]) -> Config:
    """Return the config of family `kind` that says what `config` says.

    Args:
        config: of the model.
        kind: the family to become.
        usual: what the model's family takes for keys that config.json leaves out, where `kind` takes something else.
        renamed: keys -> what `kind` calls them. Those of a shape are known from the rows of both.
        keys: what `kind` has beside.
    """
    before, family = config.family, FAMILIES[kind]
    sizes = {"heads_key": config.heads, "layers_key": config.layers, "hidden_key": config.hidden, "ffn_key": config.ffn, "positions_key": config.longest}
    own = {getattr(before, name) for name in (*sizes, "embed_key")}
    kept = {renamed.get(key, key): value for key, value in (*usual.items(), *config.raw.items()) if key not in own}
    shape: dict[str, Any] = {getattr(family, name): size for name, size in sizes.items()}
    if family.embed_key:
        shape[family.embed_key] = config.hidden
    target = config.become(kind)
    named = {"model_type": kind, "architectures": target.raw["architectures"]}
    return replace(target, raw={key: value for key, value in {**kept, **family.constants, **shape, **keys, **named}.items() if key not in family.absent})


def check_head(config: Config, target: Config) -> None:
    """Refuse a masked language model whose head computes something else in the target.

    Raises:
        ModelError: its activation differs.
    """
    if config.predicts and _renames_head(config, target.family) and target.get("hidden_act") != "gelu":
        raise ModelError(f"the head of a {target.kind} has gelu where this {config.kind} has {target.get('hidden_act')}; save the encoder alone")


def restate(outer: Outer, family: Family) -> None:
    """Give what is outside the layers the names that `family` has: its class always has a pooler (zeros, where there was none), or none."""
    import torch

    config, pooled = outer.config, "pooler" in family.outer
    if config.bare and pooled and "pooler.dense.weight" not in outer:
        device = "meta" if outer.shapes_only else "cpu"
        for name, shape in {"weight": (config.hidden, config.hidden), "bias": (config.hidden,)}.items():
            outer[f"pooler.dense.{name}"] = torch.zeros(shape, device=device)
    for part in [part for part in outer if part.startswith((PRETRAINING, *(() if pooled else ("pooler",))))]:
        del outer[part]
    if _renames_head(config, family):
        for part in [part for part in outer if part.startswith("head.")]:
            outer.copy(part, _renamed(part))
            del outer[part]


def _renames_head(config: Config, family: Family) -> bool:
    """Whether the parts of the head have other names in `family`."""
    return config.family.head != family.head and config.family.head["head"] == BERT.head["head"]


def _renamed(part: str) -> str:
    """Return the name of a part of BERT's head in RoBERTa's."""
    for bert, roberta in HEAD.items():
        part = part.replace(bert, roberta)
    return part
