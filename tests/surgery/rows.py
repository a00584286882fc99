"""What the tests of mixers' formulas are made of: configs without a model, random queries, keys and values."""

import dataclasses

import torch

from effconvert.checkpoint.config import Config
from effconvert.families import FAMILIES

HEADS, GROUPS, WIDTH = 4, 2, 8


def config(kind="bert", **keys):
    """A config of four layers; an encoder's as if it could have fewer KV heads: then the mixer is ready for the first that has."""
    raw = {"model_type": kind, "num_attention_heads": HEADS, "hidden_size": HEADS * WIDTH, "num_hidden_layers": 4, **keys}
    return Config(raw, dataclasses.replace(FAMILIES[kind], kv_heads_key="num_key_value_heads") if "num_key_value_heads" in keys else FAMILIES[kind])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(tokens, texts=2):
    """Queries, keys and values of some texts."""
    return [random(texts, heads, tokens, WIDTH, seed=seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS))]
