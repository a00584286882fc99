"""The table of mixers, one row each, and small models that have them."""

import inspect
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from effconvert.checkpoint.config import Config
from effconvert.families import FAMILIES
from effconvert.modeling.model import config_class, model_class
from effconvert.modeling.transformers_internals import cache_among, cache_name
from effconvert.steps import load
from tests.models import ATTENDING, SETTINGS, tiny
from tests.models import DECODERS as EVERY_DECODER

DECODERS = [kind for kind in ATTENDING if kind in EVERY_DECODER]
ENCODERS = [kind for kind in ATTENDING if kind not in DECODERS]
CAPPED = ["gemma2"]  # of the decoders, those that cap their scores
NO_CAPS = {"gemma2": "caps its scores"}
NOTHING = {kind: "has attention of its own" if FAMILIES[kind].attention else "does not attend" for kind in FAMILIES if kind not in ATTENDING}
FIXED = {"hunyuan_v1_dense": "norms its queries after RoPE", "ministral3": "scales its queries by their position"}
AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")  # whose first position is the padding's
SAME = 1e-5  # of the largest logit, in float32


@dataclass(frozen=True)
class Row:
    kinds: list  # families that it can be in
    refused: dict  # the others, and a word of the reason
    small: dict  # options that change something
    neutral: dict = field(default_factory=dict)  # options with which no logit may change, empty where there are none
    encoder: dict = field(default_factory=dict)  # in place of `small` for encoders
    pipeline: tuple = ()  # families on which whole conversions are tried


def without(kinds, *others):
    return [kind for kind in kinds if kind not in others]


ONCE = dict.fromkeys(ENCODERS, "goes through a text once")
BACKWARDS = dict.fromkeys(DECODERS, "which a decoder must not see")
ROWS = MappingProxyType(
    {
        "streaming": Row(
            without(DECODERS, *FIXED),
            {**NOTHING, **dict.fromkeys(ENCODERS, "keeps the first and the last tokens"), **FIXED},
            {"window": 6, "sinks": 2},
            {"window": 64},
            pipeline=("gemma2", "gpt_neox"),
        ),
        "linear": Row(without(ATTENDING, *CAPPED), {**NO_CAPS, **NOTHING}, {"window": 6}, {"window": 64}, {"feature": "elu"}, ("phi3", "gpt_neox", "bert")),
        "performer": Row(without(ATTENDING, *CAPPED), {**NO_CAPS, **NOTHING}, {"features": 32}, encoder={"features": 32}, pipeline=("gpt2", "modernbert")),
        "retnet": Row(without(DECODERS, *CAPPED), {**NO_CAPS, **NOTHING, **dict.fromkeys(ENCODERS, "looks back only")}, {}, pipeline=("llama",)),
        "deltanet": Row(without(DECODERS, *CAPPED), {**NO_CAPS, **NOTHING, **ONCE}, {}, pipeline=("llama",)),
        "rwkv": Row(without(DECODERS, *CAPPED), {**NO_CAPS, **NOTHING, **ONCE}, {"version": "4"}, pipeline=("llama",)),
        "linformer": Row(ENCODERS, {**NOTHING, **BACKWARDS}, {"rank": 8}, {"rank": 64}, {"rank": 8}, ("bert",)),
        "linformer-causal": Row(
            DECODERS, {**NOTHING, **dict.fromkeys(ENCODERS, "keeps what was before")}, {"block": 6, "rank": 2}, {"block": 8, "rank": 8}, pipeline=("llama",)
        ),
        "sparse": Row(
            ATTENDING,
            NOTHING,
            {"pattern": "fixed", "block": 6, "summaries": 1, "sinks": 1},
            {"pattern": "strided", "block": 64},
            {"pattern": "log", "block": 2, "sinks": 1},
            ("gpt2", "bert"),
        ),
        "longnet": Row(
            ATTENDING,
            NOTHING,
            {"segments": [4, 8], "dilations": [1, 2], "sinks": 1},
            {"segments": [64], "dilations": [1]},
            {"segments": [4, 12], "dilations": [1, 2]},
            ("phi3", "distilbert"),
        ),
        "aft": Row(ATTENDING, NOTHING, {"form": "local", "window": 3}, {}, {"form": "conv", "window": 3}, ("gemma2", "bert")),
        "hyena": Row(ATTENDING, NOTHING, {"length": 12}, encoder={"length": 12}, pipeline=("gemma2", "bert")),
        "lsh": Row(
            ATTENDING,
            NOTHING,
            {"buckets": 4, "rounds": 2, "chunk": 2, "sinks": 1},
            {"buckets": 2, "chunk": 64},
            {"buckets": 4, "rounds": 1, "chunk": 2},
            ("gpt_neox", "bert"),
        ),
        "nystrom": Row(ENCODERS, {**NOTHING, **BACKWARDS}, {"landmarks": 8}, {"landmarks": 64, "iterations": 0}, {"landmarks": 8}, ("distilbert",)),
    }
)
MATRIX = [(name, kind) for name, row in ROWS.items() for kind in row.kinds]
# Families with the layers, masks, positions and caches of another one: what is told apart by these is not gone through for each of them.
AS_OTHERS = ("seed_oss", "arcee", "apertus", "starcoder2", "nemotron", "ernie4_5", "olmo", "olmo3", "olmoe", "phi", "glm4", "ministral3", "hunyuan_v1_dense")
AS_OTHERS += ("helium", "xlm-roberta", "camembert", "electra", "eurobert", "nomic_bert", "jina_embeddings_v3")
FORMS = [(name, kind) for name, kind in MATRIX if kind not in AS_OTHERS]  # of what comes of masks and positions: one family of each kind of both
# Saving, half precision and gradients are the same code in all families: these differ in how they are laid out.
UNLIKE = ("llama", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bert", "modernbert")
NEUTRAL = [(name, kind) for name, kind in MATRIX if ROWS[name].neutral and (kind in DECODERS or not set(ROWS[name].kinds) & set(DECODERS))]


def small(name, kind):
    """Options that change something in a model of this family."""
    row = ROWS[name]
    return row.small if FAMILIES[kind].decoder else row.encoder


def neutral(name, kind):
    """Options that change nothing in a tiny model of this family."""
    return {"rank": 63} if name == "linformer" and kind in AFTER_PADDING else ROWS[name].neutral


def wide(kind):
    """Changes to the config of a tiny model, so that it has a layer for every mixer: none with a short window of its own."""
    return {"sliding_window": None} if FAMILIES[kind].layers_alike and SETTINGS[kind].get("sliding_window") else {}


def names(config):
    """The technique of each layer, None where it has none."""
    return [next((record.technique for record in config.replaced_in(index)), None) for index in range(config.layers)]


def stock_config(model):
    """A config of effconvert for a model of transformers."""
    kind = model.config.model_type
    return Config({**model.config.to_dict(), "architectures": [type(model).__name__]}, FAMILIES[kind])


def converted(model, *steps):
    """`model` with mixers: steps are names with their options. Its own weights, and new parameters as they begin."""
    config = stock_config(model)
    for name, options in steps:
        step = load(name)(**options)
        step.check(config)
        config = step.config(config)
    made = model_class(type(model).__name__)(config_class(model.config.model_type).from_dict(config.content)).eval()
    lacking = made.load_state_dict(model.state_dict(), strict=False)
    assert not lacking.unexpected_keys
    assert all(".effconvert." in name for name in lacking.missing_keys)
    return made


def pair(kind, *steps, **changes):
    """A tiny model and what it is with mixers."""
    model = tiny(kind, **wide(kind), **changes)
    return model, converted(model, *steps)


def tokens(rows=2, length=20, seed=0):
    """Random token ids, none of them special."""
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, ids, **given):
    """Logits of one pass without a cache."""
    alone = {"use_cache": False} if FAMILIES[model.config.model_type.removeprefix("effconvert_")].decoder else {}
    with torch.no_grad():
        return model(ids, **alone, **given).logits


def far(one, other):
    """How far logits are apart, of the largest."""
    assert one.shape == other.shape
    assert one.isfinite().all()
    return float((one - other).abs().max() / other.abs().max())


def positions(model, mask):
    """The positions of tokens behind padding, for families that are told them."""
    told = "position_ids" in inspect.signature(type(model).forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if told else {}


def with_cache(model, cache):
    """A cache as an argument of `model` (or of its `generate`), under the name that this version of transformers has for it."""
    return {cache_name(getattr(model, "_orig_mod", model)): cache}  # what was compiled


def cache_of(out):
    """The cache in what a model returned, None where it has none."""
    return cache_among(out.values())


def keep_no_activations(model):
    """Have a model make activations anew for gradients, by the name that this version of transformers has for it."""
    name = "activation_checkpointing_enable" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing_enable"
    getattr(model, name)()


@torch.no_grad()
def in_pieces(model, ids, sizes, mask=None, cache=None, **given):
    """Logits of passes that go on from each other, and the cache."""
    made, at = [], 0
    for size in sizes:
        piece = {name: value[:, at : at + size] for name, value in given.items()}
        seen = {} if mask is None else {"attention_mask": mask[:, : at + size]}
        out = model(ids[:, at : at + size], use_cache=True, **with_cache(model, cache), **seen, **piece)
        cache = cache_of(out)
        made.append(out.logits)
        at += size
    return torch.cat(made, 1), cache


PIECES = (7, 1, 5, *[1] * 7)  # 20 tokens
