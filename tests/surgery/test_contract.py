"""What every technique owes, whatever it does: one row a technique in `CASES`, and every family is tried."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import effconvert.modeling
from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.checkpoint.outer import outer_part
from effconvert.checkpoint.reading import read_config
from effconvert.checkpoint.replaced import KIND, OUTSIDE
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.modeling.converted_config import own_config
from effconvert.modeling.loading import class_of
from effconvert.options import RunOptions
from effconvert.steps import load
from effconvert.steps import techniques as catalogue
from effconvert.surgery._placed import techniques_of
from tests.mixers import mixing
from tests.models import ATTENDING, DECODERS, GROUPING, SETTINGS, characters, heed_caps, logits, save, tiny


@dataclass(frozen=True)
class Case:
    """A row. Most techniques need `small`, `neutral` if they have such options, and what they change; the defaults are those of one that changes nothing."""

    small: dict  # options that change something: {"groups": 2}
    neutral: dict | None = None  # options that may change no logit, None where there are none: {"groups": 4} for 4 heads
    kinds: list | None = None  # every family that it can be done to; all others must refuse it: ["llama", "mistral"]; None: all that effconvert knows
    refusal: str = ""  # the reason that refusals of the others give, beside the family's name; a pattern: "has no gate|has experts already"
    parts: tuple = ()  # parts of a layer that change, each of them and no other: ("v", "v.bias", "o"); "kv": all that comes KV head by KV head
    replaces: tuple = ()  # parts of a layer that are gone, with others in their place: ("gate", "up", "down")
    layers: str = "same"  # what becomes of the list of layers: "same", "dropped" (fewer, in their order), "reordered" (any order, any may be repeated)
    keys: tuple = ()  # keys of config.json that change, beside those that say it is effconvert's or has fewer layers; "ffn_key" for the family's own
    some: bool = False  # whether these parts change in some of the layers only
    chosen: bool = False  # whether it depends on the model which of these parts change: those of a layer may be the best
    cache: bool = False  # whether a token takes more or less KV cache afterwards
    encoder: dict | None = None  # in place of `small` for encoders: {"features": 32}
    same_bytes: bool = False  # whether `neutral` options change not even a bit, nor config.json
    small_from: dict = field(default_factory=dict)  # changes to the config of the models that `small` is tried on: {"mlp_bias": False}
    neutral_from: dict = field(default_factory=dict)  # likewise for `neutral`: {"num_key_value_heads": 2}
    added: tuple = ()  # tensors outside the layers that appear where it becomes another family of transformers: ("pooler.dense.weight",)
    pipeline: tuple = ()  # the families on which conversions are tried, where a few stand for all: ("llama", "bert")
    whole: tuple = ()  # those whose conversions are looked at from all sides, where the others are tried with `neutral` options alone
    outside: tuple = ()  # parts outside the layers that change there, or go: ("positions",)
    native_keys: tuple = ()  # keys of config.json that change there, beside those that name the family: ("use_cache",)


MULTI_HEAD = [kind for kind in ATTENDING if not FAMILIES[kind].fixed_kv_heads]
DENSE = [kind for kind, family in FAMILIES.items() if family.upcycled]
SUBLAYERS = [kind for kind, family in FAMILIES.items() if not family.norms_stream and "attention" not in family.adds_inside]
NARROWING = [kind for kind, family in FAMILIES.items() if family.ffn_key and not family.experts_key]
UNLIKE = [kind for kind, keys in SETTINGS.items() if FAMILIES[kind].decoder and {"layer_types", "no_rope_layers"} & keys.keys()]  # each layer with its window
FUSED = ("phi3", "gpt_bigcode", "falcon")
SHARING = [kind for kind in GROUPING if FAMILIES[kind].decoder and kind not in (*UNLIKE, *FUSED)]
FFN = [[family.parts.get(part) for part in ("gate", "up", "down") if part in family.parts] for family in FAMILIES.values()]
UNFUSED = [kind for kind, modules in zip(FAMILIES, FFN, strict=True) if modules and len(modules) == len(set(modules))]  # an FFN of single projections
PLAIN = [  # four projections and RoPE, or none
    kind
    for kind in [*GROUPING, "gpt2", "gpt_bigcode", "gpt_neox", "opt"]
    if FAMILIES[kind].decoder and "q_norm" not in FAMILIES[kind].parts and not FAMILIES[kind].scales_queries and kind not in ("falcon", "olmo")
]
REPEATED = [kind for kind, family in FAMILIES.items() if family.attention and not family.experts_key and kind not in (*UNLIKE, "gpt_neo", "modernbert")]
APART = [kind for kind in REPEATED if kind in UNFUSED and len({FAMILIES[kind].parts.get(part) for part in "qkv"} - {None}) == 3]  # likewise attention
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
BIASES = tuple(f"{part}.bias" for part in MATRICES)
SQUARES = ("nemotron", "arcee", "apertus")  # whose FFNs have no GELU
UNGATED = [
    kind
    for kind, family in FAMILIES.items()
    if family.ffn and not {"gate", "ffn"} & {*family.parts, *family.adds_inside} and not family.experts_key and kind not in SQUARES
]
UNBIASED = {"attention_bias": False, "mlp_bias": False, "sliding_window": None}
OUT_OF_REACH = "has attention of its own|does not attend"
EXPERTS = {
    "replaces": ("gate", "up", "down"),
    "keys": (
        *("num_local_experts", "num_experts", "num_experts_per_tok", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef", "intermediate_size"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_only_layers", "qkv_bias", "attention_multiplier"),
        *("head_dim", "layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
    ),
    "small_from": {"mlp_bias": False},
    "neutral_from": {"mlp_bias": False},
}
NO_EXPERTS = "has no gate in its FFN|has experts already|computes what no family"
HEADS = {count: {"num_key_value_heads": count} for count in (1, 2, 4)}
CASES = {
    "gqa": Case(
        {"groups": 2}, {"groups": 4}, MULTI_HEAD, OUT_OF_REACH, parts=("kv", "q", "q.bias", "o"), keys=("num_key_value_heads",), cache=True, same_bytes=True
    ),
    "mqa": Case(
        *({}, {}, MULTI_HEAD, OUT_OF_REACH),
        parts=("kv", "q", "q.bias", "o"),
        keys=("num_key_value_heads",),
        cache=True,
        same_bytes=True,
        neutral_from=HEADS[1],
        whole=("llama", "qwen3", "phi3", "gpt2", "gpt_neox", "mixtral", "bert"),  # it is gqa to one group
    ),
    "moe": Case({"experts": 4, "noise": 0.5}, {"experts": 4}, DENSE, NO_EXPERTS, **EXPERTS),
    "moe-split": Case({"experts": 4, "active": 2}, {"experts": 4, "active": 4}, DENSE, NO_EXPERTS, **EXPERTS),
    "narrow": Case(
        {"ffn": 24},
        {"ffn": 48},
        NARROWING,
        "has experts in place of an FFN|neurons in an FFN by definition",
        parts=("gate", "gate.bias", "up", "up.bias", "down"),
        keys=("ffn_key",),
        same_bytes=True,
        pipeline=("llama", "phi3", "gemma2", "gpt2", "opt", "falcon", "bert", "distilbert"),
    ),
    "low-rank": Case({"rank": 6}, {"rank": 32}, UNFUSED, "in one module|has no module of its own", pipeline=("llama", "qwen2_moe", "gpt2", "bert")),
    "monarch": Case({"blocks": 8}, None, UNFUSED, "in one module|has no module of its own", pipeline=("llama", "qwen2_moe", "gpt2", "bert")),
    "monarch-mixer": Case(
        {"blocks": 8, "length": 12},
        kinds=[kind for kind in UNFUSED if kind in ATTENDING],
        refusal=f"in one module|has no module of its own|{OUT_OF_REACH}",
        cache=True,
        pipeline=("llama", "opt", "bert"),
    ),
    "share-ffn": Case(
        {"width": 40},
        kinds=NARROWING,
        refusal="has experts in place of an FFN|neurons in an FFN by definition",
        parts=("gate", "gate.bias", "up", "up.bias", "down", "down.bias"),
        keys=("ffn_key",),
        pipeline=("llama", "phi3", "gemma2", "gpt2", "opt", "falcon", "bert", "distilbert"),
    ),
    "glu": Case(
        {"activation": "swiglu"},
        {"activation": "geglu"},
        UNGATED,
        "has a gate in its FFN|has experts in place of an FFN|has no module of its own|adds to the stream|no gated FFN is like",
        replaces=("up", "up.bias", "down", "down.bias"),
        pipeline=("gpt2", "phi", "starcoder2", "falcon", "gpt_neo", "distilbert"),
    ),
    "chunk-ffn": Case(
        {"size": 3},
        {"size": 7},
        [kind for kind, family in FAMILIES.items() if family.ffn and "ffn" not in family.adds_inside and not family.experts_key],
        "has no module of its own|adds to the stream|has experts in place of an FFN",
        pipeline=("llama", "phi3", "gemma2", "gpt2", "gpt_neo", "distilbert"),
    ),
    "expand-kv": Case(
        {"groups": 2},
        {"groups": 4},
        GROUPING,
        "has a KV head for each|cannot be written with another number|does not attend|has attention of its own",
        parts=("kv",),
        keys=("num_key_value_heads",),
        cache=True,
        small_from=HEADS[1],
        neutral_from=HEADS[2],
        whole=("llama", "qwen3", "phi3", "gemma2", "stablelm", "mixtral"),
    ),
    "fnet": Case(
        {},
        kinds=[*mixing.ENCODERS, "mpnet", "roformer"],
        refusal="is a decoder, and fnet mixes|does not attend|adds to the stream",
        added=("embed_projection", "embed_projection.bias", "pooler.dense.weight", "pooler.dense.bias"),
        native_keys=("num_attention_heads", "attention_probs_dropout_prob", "use_cache"),
    ),
    "share-kv": Case(
        {"layers": "1"},
        kinds=SHARING,
        refusal="has no keys and values of their own|holds q, k, v in one module",
        parts=("q", "q.bias", "k", "k.bias", "v", "v.bias", "o"),
        some=True,
        cache=True,
        pipeline=("llama", "qwen2", "qwen3", "olmo2", "stablelm", "mixtral"),
    ),
    "narrow-kv": Case(
        {"keep": 0.25},
        {"keep": 1},
        PLAIN,
        "go through a norm|changes queries or keys|caches latents|has attention of its own|adds to the stream|is an encoder|does not attend",
        cache=True,
        pipeline=("llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "cohere2", "opt"),
    ),
    "factor-embed": Case(
        {"rank": 6},
        {"ratio": 1, "blocks": 1},
        whole=(
            *("llama", "gemma2", "granite", "cohere", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "deepseek_v3", "qwen2_moe"),
            *("bert", "mpnet", "fnet", "distilbert", "modernbert"),
        ),
    ),
    "share-layers": Case(
        {"groups": 1},
        {"groups": 2},
        REPEATED,
        "has experts|does not attend",
        parts=(*MATRICES, *BIASES),
        some=True,
        chosen=True,
        same_bytes=True,
        pipeline=("llama", "qwen3", "phi3", "gpt2", "opt", "falcon", "olmo2", "bert", "distilbert"),
    ),
    "albert": Case(
        {"groups": 1},
        {"groups": 2},
        ["bert"],
        "computes what transformers' albert does not",
        parts=(*MATRICES, *BIASES, *(f"{place}_post_norm{suffix}" for place in ("attn", "mlp") for suffix in ("", ".bias"))),
        some=True,
        chosen=True,
        keys=("embedding_size", "num_hidden_groups"),
        added=("project_in", "project_in.bias"),
    ),
    "recursive": Case(
        {"groups": 1, "lora_rank": 4},
        {"groups": 1, "lora_rank": 32},
        APART,
        "has experts|does not attend|in one module|no module of its own for k",
        parts=(*MATRICES, "gate.bias", "up.bias"),
        some=True,
        pipeline=("llama", "qwen3", "opt", "gptj", "bert"),
    ),
    "mla": Case(
        {"rank": 12, "rope_dims": 12},
        {"rank": 32},
        ["llama", "mistral"],
        "cannot become a deepseek_v3|has latent attention already",
        parts=("q",),
        replaces=("k", "v"),
        keys=(
            *("num_key_value_heads", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "head_dim", "rope_interleave"),
            *("first_k_dense_replace", "num_nextn_predict_layers", "rope_parameters", "rope_theta", "attention_bias"),
        ),
        cache=True,
        small_from=UNBIASED,
        neutral_from=UNBIASED,
    ),
    "rope": Case(
        {},
        None,
        ["bert", "roberta", "xlm-roberta", "camembert", "gpt2"],
        "has RoPE already|no family of transformers is the same with RoPE|adds distances to its scores|does not attend",
        parts=("q", "q.bias", "k", "k.bias"),
        some=True,
        chosen=True,
        added=("angles",),
        outside=("positions", "types", "embed", "embed_norm", "embed_norm.bias"),
        pipeline=("bert", "roberta", "gpt2"),
        native_keys=(
            *("embedding_size", "rope_parameters", "max_position_embeddings", "activation_function", "hidden_act", "layer_norm_epsilon", "layer_norm_eps"),
            *("attn_pdrop", "attention_dropout", "resid_pdrop", "hidden_dropout", "rotary_pct", "use_parallel_residual", "attention_bias"),
            *("n_embd", "hidden_size", "n_head", "num_attention_heads", "n_inner", "intermediate_size", "n_layer", "num_hidden_layers", "n_positions"),
        ),
    ),
    "rope-layout": Case(
        {},
        {},
        [kind for kind, family in FAMILIES.items() if family.relaid],
        "has no RoPE|turns neighbours|half a head apart",
        parts=("q", "q.bias", "k", "k.bias"),
        keys=("use_bias", "attention_bias", "mlp_bias", "rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
        pipeline=("llama", "ernie4_5"),  # others add biases of zeros, or split tensors
    ),
    "prune-layers": Case(
        {"layers": "1", "only": "attention"},
        kinds=SUBLAYERS,
        refusal="normalises what its layers add to|adds to the stream",
        keys=("per_layer_config",),
        cache=True,
        whole=("llama", "gemma2", "olmo2", "cohere", "phi3", "gpt2", "opt", "falcon", "gpt_neo", "mpt", "qwen2_moe", "deepseek_v3", "modernbert"),
    ),
}
for name, row in mixing.ROWS.items():  # what they compute is tried on all families in tests/mixers; here a few are written, and read again
    CASES[name] = Case(row.small, row.neutral, row.pipeline, next(iter(row.refused.values())), cache=True, encoder=row.encoder)
KINDS = {name: list(FAMILIES) if case.kinds is None else case.kinds for name, case in CASES.items()}
# Every family once, by gqa; families that are laid out and compute as others do are not gone through by every technique.
MATRIX = [(name, kind) for name, kinds in KINDS.items() for kind in CASES[name].pipeline or kinds if kind not in mixing.AS_OTHERS or name == "gqa"]
TABLED = [name for name in CASES if name in mixing.ROWS]  # mixers between projections: all their families are there
NEUTRAL = [
    (name, kind)
    for name, kind in MATRIX
    if CASES[name].neutral is not None and name not in TABLED and (kind in GROUPING or not CASES[name].neutral_from)  # which only these can have
]
NEUTRAL += [("mqa", "gpt_bigcode"), *(case for case in mixing.NEUTRAL if case in MATRIX)]
WHOLE = [(name, kind) for name, kind in MATRIX if kind in (CASES[name].whole or KINDS[name])]
OTHERWISE = [
    ("mqa", "gpt_bigcode"),
    ("gqa", "gpt_bigcode"),
    *((name, kind) for name in ("share-kv", "share-layers", "recursive") for kind in UNLIKE),
    *((name, kind) for name in ("share-layers", "recursive") for kind in ("gpt_neo", "modernbert") if (name, kind) != ("recursive", "modernbert")),
    *(("glu", kind) for kind in SQUARES[:2]),
]  # nothing to refuse, or the options are wrong and not the model
REFUSED = [(name, kind) for name in CASES for kind in FAMILIES if kind not in KINDS[name] and (name, kind) not in OTHERWISE and name not in TABLED]
REFUSED += [(name, next(iter(row.refused))) for name, row in mixing.ROWS.items()]
PER_LAYER = {"layer_types", "no_rope_layers", "attention_types", "attention_layers", "mlp_only_layers", "max_window_layers"}  # go with their layers


def kinds_of(name):
    """The families that a technique can be done to, all of them."""
    return mixing.ROWS[name].kinds if name in TABLED else KINDS[name]


def first_of(name, *likely):
    """The first of these families that a technique can be done to, or else the first of all."""
    return next(kind for kind in (*likely, *kinds_of(name)) if kind in kinds_of(name))


LIKELY = {name: first_of(name, "llama", "bert") for name in CASES}


# What no family changes is tried on a decoder and an encoder for each technique, and on every layout of a layer.
ONCE = [(name, kind) for name, kind in WHOLE if kind in (LIKELY[name], "bert") or (name == "gqa" and kind in ("gpt2", "phi3", "gpt_neox", "olmo2", "mixtral"))]
once = pytest.mark.parametrize(  # the first of each technique by default
    ("name", "kind"), [pytest.param(*case, id="-".join(case), marks=pytest.mark.slow if case[1] != LIKELY[case[0]] else ()) for case in ONCE]
)


def technique(name, options):
    return load(name)(**options)


def build(kind, changes):
    return tiny(kind, **changes_of(kind, changes))


def changes_of(kind, changes):
    return changes if kind in GROUPING else {}


def small(name, kind):
    case = CASES[name]
    return case.small if FAMILIES[kind].decoder else case.encoder or case.small


def run(source, output, name, options, **how):
    text = source.parent / "text.txt"
    text.write_text("Where we go, nobody knows; there and back again, many times. " * 2)
    little = {"text": text, "tokens": 32, "context": 16, "calibrate": str(text.with_name("calibration.txt")), "calibration_tokens": 512}
    return convert(str(source), (technique(name, options),), RunOptions(output=output, **little, **how))


def read_back(folder):
    model, info = class_of(read_config(folder)).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return heed_caps(model.eval())


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digests(folder):
    told = ("effconvert.json", "README.md")  # which say what was measured
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in told]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weighed(model):
    return sum(parameter.numel() for parameter in model.parameters()), kv_bytes(model)


def kv_bytes(model):
    """Bytes of the cache that a token adds (on average where mixers add those of many tokens at a time), and that mixers hold however few came."""
    if not own_config(model.config).family.decoder:
        return 0, 0
    first, second, early, late = (held(model, length) for length in (1, 2, 24, 48))
    return second[0] - first[0] + math.ceil((late[1] - early[1]) / 24), 2 * early[1] - late[1]


def held(model, length):
    """Bytes of the cache in layers of softmax and in those of mixers."""
    cache = effconvert.modeling.cache_for(model.config)
    with torch.inference_mode():
        model(torch.tensor([[3] * length]), use_cache=True, **mixing.with_cache(model, cache))
    softmax = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if not hasattr(layer, "nbytes")]
    return sum(softmax), sum(layer.nbytes for layer in cache.layers if hasattr(layer, "nbytes"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A model in several shards of each family, written and read once: its folder, its parameters and the bytes of its cache."""
    made = {}

    def find(kind, changes):
        key = kind, repr(changes_of(kind, changes))
        if key not in made:
            source = save(build(kind, changes), tmp_path_factory.mktemp(kind) / "source", max_shard_size="40KB")
            characters(source)
            (source / "NOTICE").write_text("words of the author")
            (source / "README.md").write_text("---\nlicense: mit\n---\nThe original.\n")
            made[key] = source, *weighed(read_back(source))
        return made[key]

    return find


@pytest.fixture(scope="module", params=WHOLE, ids="-".join)
def done(request, sources, tmp_path_factory):
    """A conversion that changes something: its name, its source and what came of it."""
    name, kind = request.param
    source, *_ = sources(kind, CASES[name].small_from)
    return name, source, run(source, tmp_path_factory.mktemp(f"{name}-{kind}") / "out", name, small(name, kind), verify=False)


@pytest.fixture(scope="module")
def opened(done):
    """The converted model. Nobody may change it."""
    return read_back(done[2].output)


def test_the_table_names_every_technique():
    assert set(CASES) == set(catalogue())


@pytest.mark.parametrize("name", CASES)
def test_the_class_of_a_technique_carries_its_name_and_summary(name):
    surgery = technique(name, small(name, LIKELY[name]))
    assert surgery.name == name
    assert type(surgery).__doc__.startswith(catalogue()[name])


@pytest.mark.parametrize(("name", "kind"), NEUTRAL)
def test_neutral_options_change_no_logit(name, kind, tmp_path):
    case = CASES[name]
    model = build(kind, case.neutral_from)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::3] = -0.0  # a sum or a mean would make it 0.0
    source = save(model, tmp_path / "source", max_shard_size="40KB")
    outcome = run(source, tmp_path / "out", name, mixing.neutral(name, kind) if name in TABLED else case.neutral)
    assert outcome.plan.is_exact
    expected, found = logits(model), logits(read_back(tmp_path / "out"))
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert outcome.report.difference <= 1e-5 * expected.abs().max()
    assert outcome.report.unmeasured == ("the model has no tokenizer" if kind in DECODERS else f"{kind} is an encoder and predicts no next token")
    assert outcome.report.before.quality is None
    if case.same_bytes:
        before, after = tensors(source), tensors(tmp_path / "out")
        assert {tensor: bits(value) for tensor, value in after.items()} == {tensor: bits(value) for tensor, value in before.items()}
        assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_conversion_that_changes_something_changes_what_it_should_and_no_other_part(done):
    name, source, outcome = done
    case, plan = CASES[name], outcome.plan
    before, after = tensors(source), tensors(outcome.output)
    if case.layers != "same":
        hold_whole_layers(plan.checkpoint, open_checkpoint(outcome.output), case)
        return
    if case.replaces:
        hold_what_stays(plan.checkpoint, open_checkpoint(outcome.output), case.replaces, case.parts)
        return
    config, checkpoint, names, new = plan.checkpoint.config, plan.checkpoint, renamed(plan), own_tensors(plan)
    native = plan.config.family.base != config.family.base
    outer = plan.models("meta")[-1].outer
    added = {outer.place(part) for part in case.added if part in outer} if native else set()
    assert after.keys() == {*names.values()} | new.keys() | added
    assert {tensor: tuple(after[tensor].shape) for tensor in new} == new
    changing, unchanged = all_parts(case.parts, config), {}
    for tensor, there in names.items():
        inside = tensor.removeprefix(checkpoint.prefix).removeprefix(f"{config.family.layers}.").partition(".")[2]
        suffix = ".bias" if tensor.endswith(".bias") else ""
        parts = {part + suffix for part in config.parts_in(inside)} if tensor not in checkpoint.outer else set()
        if tensor in checkpoint.outer and outer_part(tensor, checkpoint.prefix, config) in case.outside:
            continue
        if parts & changing:
            unchanged[min(parts)] = unchanged.get(min(parts), case.some) & (bits(after[there]) == bits(before[tensor]))
            assert case.some or bits(after[there]) != bits(before[tensor]), tensor
        elif config.family.transposed and parts and tensor.endswith(".weight") and before[tensor].ndim == 2 and not plan.config.family.transposed:
            assert bits(after[there].T) == bits(before[tensor]), tensor
        else:
            assert bits(after[there]) == bits(before[tensor]), tensor
    assert not (all if case.chosen else any)(unchanged.values())


def all_parts(parts, config):
    """The parts that a row names; "kv" stands for all that come KV head by KV head, with their biases."""
    kv = {part + suffix for part in config.family.per_kv_head for suffix in ("", ".bias")}
    return {*parts} - {"kv"} | (kv if "kv" in parts else set())


def own_tensors(plan):
    """Map the name of each tensor of a technique's own in the converted model to its shape."""
    outer = plan.models("meta")[-1].outer
    return {
        plan.layer_prefix(index) + ".".join(filter(None, [plan.config.place(record.place), "effconvert", parameter])): tuple(shape)
        for record, technique in techniques_of(plan.config)
        for index in record.layers
        for parameter, shape in technique.parameters(plan.config, record.place).items()
    } | {
        outer.place(outer.table(record.place)).removesuffix("weight") + f"effconvert.{parameter}": tuple(shape)
        for record, technique in techniques_of(plan.config)
        if record.place in OUTSIDE
        for parameter, shape in technique.parameters(plan.config, record.place).items()
    }


def renamed(plan):
    """Map the name of each tensor of the source that is still there to what it is called in the converted model."""
    checkpoint, config, names = plan.checkpoint, plan.config, {}
    for index, stored in enumerate(checkpoint.layers):
        for name in stored:
            part, suffix = (*checkpoint.config.parts_in(name), "")[0], ".bias" if name.endswith(".bias") else ""
            biased = suffix and any(record.place == part for record in config.replaced_in(index))  # that of a replaced projection stays
            if config.stored_for(index, part + suffix) != index:
                continue  # an earlier layer stores it
            if part in config.parts.keys() - config.lacks(index) or biased:
                names[checkpoint.layer_prefix(index) + name] = plan.layer_prefix(index) + config.tensor_name(part + suffix)
            elif name in checkpoint.config.family.buffers:
                names[checkpoint.layer_prefix(index) + name] = plan.layer_prefix(index) + name
    outer = plan.models("meta")[-1].outer
    parts = {name: outer_part(name, checkpoint.prefix, checkpoint.config) for name in checkpoint.outer}
    gone = {outer.table(place) for place in OUTSIDE if config.replaced_outside(place)} | {*parts.values()} - {*outer}
    return names | {name: outer.place(part) for name, part in parts.items() if part not in gone}


def hold_whole_layers(before, after, case):
    """Every layer is one of those before, but for the parts that change; if some were dropped, the others are in their order."""
    hold_outer(before, after)
    changing = all_parts(case.parts, before.config)
    olds, news = ([rest(checkpoint.layer(index, "cpu"), changing) for index in range(checkpoint.config.layers)] for checkpoint in (before, after))
    origins = [next(index for index, old in enumerate(olds) if old == new) for new in news]
    assert origins != list(range(len(olds)))
    assert case.layers == "reordered" or (origins == sorted(set(origins)) and len(origins) < len(olds))


def rest(layer, changing):
    return {part: bits(tensor) for part, tensor in layer.items() if part not in changing}


def hold_outer(before, after):
    """What is outside the layers is what it was."""
    one, other = ({name: bits(tensor.read("cpu")) for name, tensor in checkpoint.outer.items()} for checkpoint in (before, after))
    assert one == other


def hold_what_stays(before, after, gone, changing):
    """Every part that is not replaced is what it was, whatever its name is in the other family; those that are `changing` are not."""
    hold_outer(before, after)
    for index in range(before.config.layers):
        one, other = before.layer(index, "cpu"), after.layer(index, "cpu")
        stays = {part for part in one if part not in gone}
        assert stays == {part for part in other if part in one}
        assert all((part in changing) != (bits(other[part]) == bits(one[part])) for part in stays)
        assert set(other) > stays


def test_a_conversion_leaves_the_other_files_and_config_keys_alone(done):
    name, source, outcome = done
    assert (outcome.output / "NOTICE").read_text() == "words of the author"
    card = (outcome.output / "README.md").read_text()
    assert "license: mit" in card
    assert "The original." not in card  # which is about another model
    others = {path.name for path in source.glob("*.json") if path.name not in ("config.json", "model.safetensors.index.json")}
    assert {"tokenizer.json", *(["generation_config.json"] if outcome.plan.config.family.decoder else [])} <= others
    assert all((outcome.output / other).read_bytes() == (source / other).read_bytes() for other in others)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, outcome.output))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    ours = {"model_type", "architectures", "auto_map", "effconvert", "layer_types"}
    if CASES[name].layers != "same":
        changed -= PER_LAYER
    keys = {outcome.plan.config.family.ffn_key if key == "ffn_key" else key for key in CASES[name].keys}
    fewer = {outcome.plan.config.family.layers_key} if outcome.plan.config.layers != outcome.plan.checkpoint.config.layers else set()
    if after["model_type"] == before["model_type"]:
        assert changed == fewer | keys
    elif after["model_type"].startswith(KIND):
        assert changed == ours | fewer | keys
    else:
        assert after["model_type"] == outcome.plan.config.kind
        family = outcome.plan.config.family
        assert changed <= {"model_type", "architectures", *family.constants, *family.absent, *keys, *CASES[name].native_keys}


def test_what_was_planned_is_what_transformers_loads(done, opened, sources):
    name, source, outcome = done
    before, after = outcome.plan.before, outcome.plan.after
    found = sources(outcome.plan.checkpoint.config.kind, CASES[name].small_from)
    assert found == (source, before.parameters, (before.kv_bytes, before.state_bytes))
    assert weighed(opened) == (after.parameters, (after.kv_bytes, after.state_bytes))
    assert read_config(outcome.output).kind == opened.config.model_type.removeprefix(KIND)
    for folder, size in ((source, before), (outcome.output, after)):
        assert sum(tensor.nbytes for tensor in tensors(folder).values()) == size.bytes
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert (index["metadata"]["total_size"], index["metadata"]["total_parameters"]) == (size.bytes, size.parameters)
        assert index["weight_map"].keys() == tensors(folder).keys()
    assert (before.kv_bytes != after.kv_bytes) == (CASES[name].cache and outcome.plan.config.family.decoder)
    assert outcome.plan.disk >= sum(tensor.nbytes for tensor in tensors(outcome.output).values())


@pytest.mark.few(3)
@once
def test_the_report_holds_what_was_measured(name, kind, tmp_path):
    source = save(build(kind, CASES[name].small_from), tmp_path / "source")
    characters(source)
    outcome = run(source, tmp_path / "out", name, small(name, kind))
    report = outcome.report
    assert [side.parameters for side in (report.before, report.after)] == [read_back(folder).num_parameters() for folder in (source, outcome.output)]
    sides = [(side.kv_bytes, side.state_bytes) for side in (report.before, report.after)]
    assert sides == [kv_bytes(read_back(folder)) for folder in (source, outcome.output)]
    if outcome.plan.config.family.decoder:
        assert not report.unmeasured
        assert report.before.quality.perplexity > 1
        assert (report.after.quality.kl > 1e-5) == (not outcome.plan.is_exact)
    manifest = json.loads((outcome.output / "effconvert.json").read_text())
    assert manifest["recipe"] == outcome.plan.recipe
    assert manifest["verified"]


def test_a_converted_model_survives_being_saved_and_loaded_by_transformers(opened, tmp_path):
    expected = logits(opened)
    assert torch.equal(logits(read_back(save(opened, tmp_path / "again"))), expected)


@pytest.mark.few(3)
@once
def test_the_same_input_gives_the_same_bytes_in_shards_or_in_one(name, kind, tmp_path):
    source = save(build(kind, CASES[name].small_from), tmp_path / "source", max_shard_size="40KB")
    characters(source)
    first, again = (run(source, tmp_path / folder, name, small(name, kind), verify=False) for folder in ("first", "again"))
    assert digests(again.output) == digests(first.output)
    assert again.report is None
    assert len(list(source.glob("*.safetensors"))) > 1
    whole = save(read_back(source), tmp_path / "whole")
    characters(whole)
    together = run(whole, tmp_path / "together", name, small(name, kind), verify=False)
    assert [path.name for path in together.output.glob("*.safetensors")] == ["model.safetensors"]
    assert {tensor: bits(value) for tensor, value in tensors(together.output).items()} == {
        tensor: bits(value) for tensor, value in tensors(first.output).items()
    }


@pytest.mark.parametrize(("name", "kind"), REFUSED, ids=map("-".join, REFUSED))
def test_a_family_that_cannot_say_it_is_refused_with_the_reason(name, kind, sources, tmp_path):
    source, *_ = sources(kind, {})
    with pytest.raises(ModelError, match=CASES[name].refusal) as refused:
        run(source, tmp_path / "out", name, CASES[name].small)
    assert CASES[name].refusal
    assert re.search(rf"\b({re.escape(kind)}|{FAMILIES[kind].lm})\b", str(refused.value))  # the family is named, anywhere in the sentence
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_on_a_dry_run(name, tmp_path):
    source = save(build(LIKELY[name], CASES[name].small_from), tmp_path / "source")
    characters(source)
    outcome = run(source, tmp_path / "out", name, small(name, LIKELY[name]), dry_run=True)
    assert outcome.plan.shards
    assert not any("out" in path.name for path in tmp_path.iterdir())


@pytest.mark.few(3)
@pytest.mark.parametrize("name", CASES)
def test_a_base_model_without_its_head_is_converted_too(name, tmp_path):
    kind = first_of(name, "qwen2", "distilbert")
    whole = build(kind, CASES[name].small_from)
    bare = AutoModel.from_config(whole.config)  # bert's has a pooler, which is not in the model with the head
    bare.load_state_dict(whole.base_model.state_dict(), strict=False)
    source = save(bare, tmp_path / "source")
    characters(source)
    outcome = run(source, tmp_path / "out", name, small(name, kind))
    assert outcome.report.unmeasured == (
        f"{FAMILIES[kind].base} has no language-model head" if kind in DECODERS else f"{kind} is an encoder and predicts no next token"
    )
    assert read_back(outcome.output).num_parameters() == outcome.plan.after.parameters


@pytest.mark.parametrize("name", CASES)
def test_list_says_what_is_true_of_it(name):
    facts = load(name).facts
    assert facts.applies
    assert facts.saves
    assert bool(facts.exact) == (bool(CASES[name].neutral) if name in TABLED else CASES[name].neutral is not None)
    if name in TABLED and name != "streaming":  # which can be a sliding window of its own family
        assert facts.native == ""
