"""Small random models of every family, the same on each call."""

from random import Random

import torch
import transformers
from safetensors.torch import load_file

from effconvert.families import CONVERTIBLE, FAMILIES

BASIC = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SHAPE, "num_key_value_heads": 4}
HEAD_DIM = {"head_dim": 16}  # not hidden_size / num_attention_heads
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}  # each class takes its own name for them
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
SCALED_BY_POSITION = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
SCALED_BY_POSITION |= {"mscale": 1.0, "mscale_all_dim": 1.0}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 2, "v_head_dim": 8, "num_nextn_predict_layers": 0}
LATENT |= {"first_k_dense_replace": 99}  # no experts
UNTURNED = dict.fromkeys(("smollm3", "cohere2", "exaone4"), (1,))  # layers that RoPE leaves alone

SETTINGS = {
    "llama": {**GROUPED, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GROUPED, **HEAD_DIM, "sliding_window": 8},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, **HEAD_DIM},
    "granite": GROUPED,
    "gemma": {**GROUPED, **HEAD_DIM},
    "gemma2": {**GROUPED, **HEAD_DIM, **ALTERNATING},
    "gemma3_text": {**GROUPED, **HEAD_DIM, **ALTERNATING},
    "olmo2": GROUPED,
    "phi3": GROUPED,
    "cohere": {**GROUPED, "logit_scale": 1.0},
    "glm": {**GROUPED, **HEAD_DIM, "attention_bias": True},
    "smollm3": {**GROUPED, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 8},
    "olmo": {**GROUPED, "attention_bias": True, "clip_qkv": 2.0},
    "olmo3": {**GROUPED, **ALTERNATING},
    "starcoder2": {**GROUPED, "sliding_window": 8},
    "stablelm": {**GROUPED, "use_qkv_bias": True},
    "phi": GROUPED,
    "cohere2": {**GROUPED, **ALTERNATING, "logit_scale": 1.0},
    "glm4": {**GROUPED, **HEAD_DIM},
    "nemotron": {**GROUPED, **HEAD_DIM, "attention_bias": True, "mlp_bias": True},
    "seed_oss": {**GROUPED, **HEAD_DIM, "attention_out_bias": True},
    "arcee": {**GROUPED, **HEAD_DIM, "attention_bias": True, "mlp_bias": True},
    "apertus": {**GROUPED, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "ministral3": {**GROUPED, **HEAD_DIM, "sliding_window": 8, "rope_parameters": SCALED_BY_POSITION},
    "ernie4_5": {**GROUPED, **HEAD_DIM, "use_bias": True},
    "helium": {**GROUPED, "head_dim": 8, "attention_bias": True, "mlp_bias": True},  # its class needs heads as wide as the stream, all together
    "hunyuan_v1_dense": {**GROUPED, **HEAD_DIM},
    "exaone4": {**GROUPED, **ALTERNATING},
    "deepseek_v3": {**SHAPE, "num_key_value_heads": 4, "attention_bias": True, **LATENT},
    "mixtral": {**GROUPED, **EXPERTS},
    "qwen2_moe": {**GROUPED, **EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "qwen3_moe": {**GROUPED, **HEAD_DIM, **EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "flex_olmo": {**GROUPED, **EXPERTS},
    "olmoe": {**GROUPED, **EXPERTS, "norm_topk_prob": True},
    "granitemoe": {**GROUPED, **EXPERTS},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": SHAPE,
    "gptj": {**GPT2, "rotary_dim": 4},
    "codegen": {**GPT2, "rotary_dim": 4},
    "gpt_neo": {
        **{key: value for key, value in SHAPE.items() if not key.startswith("num_")},
        **{"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "falcon": {**{key: value for key, value in SHAPE.items() if key != "intermediate_size"}, "ffn_hidden_size": 48},
    "opt": {**{key: value for key, value in SHAPE.items() if key != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "bert": SHAPE,
    "roberta": {**SHAPE, "type_vocab_size": 1},
    "xlm-roberta": SHAPE,
    "camembert": SHAPE,
    "mpnet": {**SHAPE, "pad_token_id": 1},
    "electra": {**SHAPE, "embedding_size": 16},
    "fnet": {**{key: value for key, value in SHAPE.items() if key != "num_attention_heads"}, "type_vocab_size": 2},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "roformer": SHAPE,
    "jina_embeddings_v3": {**SHAPE, "type_vocab_size": 2},
    "eurobert": {**GROUPED, "attention_bias": True, "mlp_bias": True},
    "nomic_bert": SHAPE,
    "modernbert": {**SHAPE, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]},
}
TWO_STACKS = {  # settings of all families with an encoder and a decoder; the stacks differ in what they can
    **{"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None, "num_beams": 1, "encoder_layerdrop": 0.0},
    **{"encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 40},
}
GROUPING = [kind for kind, family in FAMILIES.items() if family.kv_heads_key]
ATTENDING = [
    kind for kind, family in FAMILIES.items() if family.attention and not family.own_attention and "kv_a" not in family.parts
]  # by what can be changed
DECODERS = [kind for kind, family in FAMILIES.items() if family.decoder]


def tiny(kind, **changes):
    """A float32 model of family `kind` with 4 query heads, multi-head where the family has the choice; `changes` go to its config."""
    settings = {**BASIC, **(TWO_STACKS if CONVERTIBLE[kind].decoder_layers else SETTINGS[kind]), **changes}
    model_class = getattr(transformers, CONVERTIBLE[kind].lm)
    model = model_class(model_class.config_class(**settings)).eval()
    heed_caps(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted((name, parameter) for name, parameter in model.named_parameters() if not computed(kind, name)):
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model


def computed(kind, name):
    """Whether a parameter is one that the family's class computes, and does not store."""
    return name.endswith("embed_positions.weight") and "embed_positions.weight" in CONVERTIBLE[kind].buffers


def heed_caps(model):
    """Have a model cap its scores, if it should: before 5.21 transformers took sdpa, which leaves caps out."""
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def save(model, folder, **how):
    """Save `model` in `folder`, with options of save_pretrained such as max_shard_size, and return the folder. Names are those that its row has."""
    fused = getattr(FAMILIES.get(model.config.model_type), "fused", ())
    model.save_pretrained(folder, **({"save_original_format": False} if fused else {}), **how)
    return folder


def on_disk(folder):
    """What lies in a folder: name -> tensor. Families with experts call them otherwise in memory."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@torch.inference_mode()
def logits(model, length=20):
    """What `model` makes of the same random tokens on each call."""
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(0))
    return model(ids, use_cache=False).logits


def characters(folder):
    """Put a tokenizer of single characters into the folder, which every model here has room for, and return a text file of all of them, in random order."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    tokenizer = Tokenizer(BPE({piece: index for index, piece in enumerate(["<pad>", "<s>", "</s>", "Ġ", "Ċ", *letters])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    text = folder.parent / "calibration.txt"
    text.write_text("".join(Random(0).choices([" ", *letters], k=2000)))
    return text


LAYOUTS = {  # of RoPE, and its part
    **{kind: ("halves", 1 if family.rope else 0) for kind, family in FAMILIES.items()},
    "cohere": ("interleaved", 1),
    "glm": ("interleaved", 0.5),
    "gpt_neox": ("halves", 0.25),
    "stablelm": ("halves", 0.25),
    "phi": ("halves", 0.5),
    "nemotron": ("halves", 0.5),
    "cohere2": ("interleaved", 1),
    "glm4": ("interleaved", 0.5),
    "ernie4_5": ("interleaved", 1),
    "helium": ("interleaved", 1),
    "roformer": ("interleaved", 1),
}


def attention(model):
    """Yield of each layer q, k, v [heads, D, M] and o [M, heads, D] and what goes with rows of theirs (biases, gains), as views that can be written through."""
    family, config = FAMILIES[model.config.model_type], model.config
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    for layer in model.base_model.get_submodule(family.layers):
        held = {}
        for part, count in (("q", heads), ("k", shared), ("v", shared)):
            at, modules = 0 if part == "q" else heads, layer.get_submodule(family.parts[part])
            at = at + shared if part == "v" else at
            fused = family.parts["q"] == family.parts["k"]
            for name, tensor in modules.named_parameters():
                rows = (tensor.data.T if family.transposed and tensor.ndim == 2 else tensor.data).unflatten(0, (-1, width))
                chosen = slice("qkv".index(part), None, 3) if family.per_head else slice(at, at + count)
                held[part if name == "weight" else f"{part}.{name}"] = rows[chosen] if fused else rows
        for part in ("q_norm", "k_norm"):
            if part in family.parts:
                held[part] = layer.get_submodule(family.parts[part]).weight.data.unflatten(0, (-1, width))
        output = layer.get_submodule(family.parts["o"]).weight.data
        held["o"] = (output.T if family.transposed else output).unflatten(1, (heads, width))
        yield held


def alike(model, like):
    """Make each KV head a copy of the one that `like` names in its place."""
    for held in attention(model):
        for part, rows in held.items():
            if part[0] in "kv" and len(rows) > 1:
                rows.copy_(rows[list(like)])
    return model


def hide(model, gains=False):
    """Give each KV head another basis, which its query heads and the output undo: a turn for each rotary pair of keys, with gains any for values.

    Under QK-norm keys may only change signs.
    """
    generator = torch.Generator().manual_seed(1)
    kind = model.config.model_type
    layout, turned = LAYOUTS[kind]
    for index, held in enumerate(attention(model)):
        part = 0 if index in UNTURNED.get(kind, ()) else turned
        shared = len(held["q"]) // len(held["k"])
        for head in range(len(held["k"])):
            own, width = range(head * shared, (head + 1) * shared), held["k"].shape[1]
            keys = turn(width, int(part * width), layout, generator, "q_norm" in held, gains)
            values = orthogonal(width, generator)
            if gains:
                values = values * (0.5 + torch.rand(width, generator=generator))
            for name, by in (("k", keys), ("k.bias", keys), ("v", values), ("v.bias", values)):
                if name in held:
                    held[name][head] = by @ held[name][head]
            for query in own:
                held["o"][:, query] = held["o"][:, query] @ torch.linalg.inv(values)
                for name in ("q", "q.bias"):
                    if name in held:
                        held[name][query] = torch.linalg.inv(keys).T @ held[name][query]
    return model


def turn(width, rotary, layout, generator, signs=False, gains=False, dtype=torch.float32):
    """A random matrix that commutes with RoPE: it turns each pair by an angle of its own, and mixes what is in none."""
    made = torch.zeros(width, width, dtype=dtype)
    for pair in range(rotary // 2):
        one, other = (pair, pair + rotary // 2) if layout == "halves" else (2 * pair, 2 * pair + 1)
        (x, y), gain = torch.randn(2, generator=generator, dtype=dtype), 0.5 + torch.rand((), generator=generator, dtype=dtype)
        cos, sin = (x.sign(), 0 * y) if signs else (x / torch.hypot(x, y), y / torch.hypot(x, y))
        size = gain if gains and not signs else 1
        made[one, one], made[one, other], made[other, one], made[other, other] = size * cos, -size * sin, size * sin, size * cos
    rest = width - rotary
    made[rotary:, rotary:] = torch.diag(torch.randn(rest, generator=generator, dtype=dtype).sign()) if signs else orthogonal(rest, generator, dtype)
    return made


def orthogonal(width, generator, dtype=torch.float32):
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=dtype))[0] if width else torch.zeros(0, 0, dtype=dtype)
