"""Rows of families that predict the next token: see `Family`."""

from collections.abc import Mapping
from dataclasses import replace

from effconvert.families.family import Family


def sizes(hidden: int, ffn: int, layers: int, heads: int, vocabulary: int) -> dict[str, int]:
    """Return transformers' default sizes of a family: the config of a language model inside another model leaves out those that it has."""
    return {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}


LLAMA = Family(
    base="LlamaModel",
    lm="LlamaForCausalLM",
    prefix="model",
    layers="layers",
    parts={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
    outer={"embed": "embed_tokens", "final_norm": "norm"},
    head={"head": "lm_head"},
    buffers=("self_attn.rotary_emb.inv_freq",),
    rope="halves",
    ffn="mlp",
)
MULTIPLIERS = dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
POST_NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
QWEN_DEFAULTS = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN2 = replace(
    LLAMA,
    base="Qwen2Model",
    lm="Qwen2ForCausalLM",
    defaults={**QWEN_DEFAULTS, **sizes(4096, 22016, 32, 32, 151936)},
    windowed="qwen2",
    window_keys={"use_sliding_window": True},
    upcycled={"qwen2_moe": {"norm_topk_prob": True, "qkv_bias": True}},
)
QWEN3 = replace(
    QWEN2,
    base="Qwen3Model",
    lm="Qwen3ForCausalLM",
    parts={**LLAMA.parts, **QK_NORMS},
    defaults={**QWEN2.defaults, "head_dim": 128},
    windowed="qwen3",
    upcycled={"qwen3_moe": {"norm_topk_prob": True}},
)
OLMO2 = replace(
    LLAMA,
    base="Olmo2Model",
    lm="Olmo2ForCausalLM",
    parts={part: at for part, at in {**LLAMA.parts, **QK_NORMS, **POST_NORMS}.items() if part not in ("attn_norm", "mlp_norm")},
    per_kv_head=("k", "v", "k_norm"),  # its QK-norms have a weight for every channel of every head
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0, "pad_token_id": 1, "eos_token_id": 50279},
    upcycled={"flex_olmo": {"norm_topk_prob": True}},
)
BY_IMPLEMENTATION = "its class attends both ways in one implementation of attention and not in another"
ONE_WAY = {"use_bidirectional_attention": (True, BY_IMPLEMENTATION)}
GEMMA2 = replace(
    LLAMA,
    refused=ONE_WAY,
    base="Gemma2Model",
    lm="Gemma2ForCausalLM",
    defaults={
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        **sizes(2304, 9216, 26, 8, 256000),
    },
    parts={**LLAMA.parts, **POST_NORMS, "mlp_norm": "pre_feedforward_layernorm"},
)

GPT2 = Family(
    base="GPT2Model",
    lm="GPT2LMHeadModel",
    defaults={"tie_word_embeddings": True},
    prefix="transformer",
    layers="h",
    parts={
        "q": "attn.c_attn",
        "k": "attn.c_attn",
        "v": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
    },
    outer={"embed": "wte", "positions": "wpe", "final_norm": "ln_f"},
    head={"head": "lm_head"},
    buffers=("attn.bias", "attn.masked_bias"),
    transposed=True,
    heads_key="n_head",
    layers_key="n_layer",
    hidden_key="n_embd",
    ffn_key="n_inner",
    positions_key="n_positions",
    kv_heads_key="",
    multi_query="gpt_bigcode",
    with_rope={
        "gpt_neox": {
            **{"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "hidden_dropout": 0.1, "attention_dropout": 0.1, "tie_word_embeddings": True},
            **{"bos_token_id": 50256, "eos_token_id": 50256, "use_parallel_residual": False, "attention_bias": True, "rotary_pct": 1.0},
        }
    },
    tokenizer="GPT2Tokenizer",
    ffn="mlp",
)

DECODERS: Mapping[str, Family] = {
    "llama": replace(
        LLAMA,
        defaults={
            **{"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
            **sizes(4096, 11008, 32, 32, 32000),
        },
        windowed="mistral",
        latent="deepseek_v3",
        relaid=("ernie4_5", "helium", "phi3", "glm"),
        biased={"attention_bias": ("q", "k", "v", "o"), "mlp_bias": ("gate", "up", "down")},
        upcycled={"mixtral": {}, "granitemoe": {}, "qwen2_moe": {"norm_topk_prob": True, "qkv_bias": False}},
    ),
    "mistral": replace(
        LLAMA,
        base="MistralModel",
        lm="MistralForCausalLM",
        defaults={
            **{"num_key_value_heads": 8, "sliding_window": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
            **sizes(4096, 14336, 32, 32, 32000),
        },
        absent={"attention_bias": False, "mlp_bias": False},
        windowed="mistral",
        latent="deepseek_v3",
        layers_alike=True,
        upcycled={"mixtral": {}},
    ),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "granite": replace(
        LLAMA, base="GraniteModel", lm="GraniteForCausalLM", scale_key="attention_multiplier", defaults=MULTIPLIERS, upcycled={"granitemoe": {}}
    ),
    "gemma": replace(
        LLAMA,
        refused=ONE_WAY,
        base="GemmaModel",
        lm="GemmaForCausalLM",
        defaults={"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 16, **sizes(3072, 24576, 28, 16, 256000)},
    ),
    "gemma2": GEMMA2,
    "gemma3_text": replace(
        GEMMA2,
        base="Gemma3TextModel",
        lm="Gemma3ForCausalLM",
        parts={**GEMMA2.parts, **QK_NORMS},
        defaults={**GEMMA2.defaults, "sliding_window_pattern": 6, "vocab_size": 262208},
        both_ways_key="use_bidirectional_attention",
        refused={},
    ),
    "olmo2": OLMO2,
    "phi3": replace(
        LLAMA,
        base="Phi3Model",
        lm="Phi3ForCausalLM",
        parts={
            **LLAMA.parts,
            **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
        },
        rope_types=("default", "longrope"),
        defaults={
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            **{"pad_token_id": 32000, "bos_token_id": 1, "eos_token_id": 32000},
            **sizes(3072, 8192, 32, 32, 32064),
        },
        relaid=("llama", "glm"),
        upcycled={"mixtral": {}},
    ),
    "cohere": replace(
        LLAMA,
        base="CohereModel",
        lm="CohereForCausalLM",
        rope="interleaved",
        parts={part: at for part, at in LLAMA.parts.items() if part != "mlp_norm"},  # parallel attention and MLP share a norm
        defaults={"tie_word_embeddings": True},
        constants={"use_qk_norm": False},
    ),
    "glm": replace(
        LLAMA,
        base="GlmModel",
        lm="GlmForCausalLM",
        rope="interleaved",
        parts={**LLAMA.parts, **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")},
        defaults={
            **{"num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": True, "max_position_embeddings": 131072},
            **{"rms_norm_eps": 1.5625e-7, "rope_theta": 10000.0, "pad_token_id": 151329, "bos_token_id": None, "eos_token_id": [151329, 151336, 151338]},
            **sizes(4096, 13696, 40, 32, 151552),
        },
        relaid=("phi3", "llama"),
        biased={"attention_bias": ("q", "k", "v")},
    ),
    "gpt2": GPT2,
    "gpt_bigcode": replace(
        GPT2,
        base="GPTBigCodeModel",
        lm="GPTBigCodeForCausalLM",
        transposed=False,
        fixed_kv_heads=1,
        multi_query="",
        with_rope={},
        constants={"multi_query": True},
        absent={"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False, "add_cross_attention": False},
    ),
    "gpt_neox": Family(
        base="GPTNeoXModel",
        lm="GPTNeoXForCausalLM",
        prefix="gpt_neox",
        layers="layers",
        parts={
            **dict.fromkeys(("q", "k", "v"), "attention.query_key_value"),
            "o": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
            "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
        },
        outer={"embed": "embed_in", "final_norm": "final_layer_norm"},
        head={"head": "lm_head", "old_head": "embed_out"},
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        per_head=True,
        rope="halves",
        rotary_key="rotary_pct",
        defaults={"rotary_pct": 0.25},
        absent={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        kv_heads_key="",
        ffn="mlp",
    ),
    "opt": Family(
        base="OPTModel",
        lm="OPTForCausalLM",
        defaults={"tie_word_embeddings": True},
        prefix="model",
        layers="decoder.layers",
        parts={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
            "attn_norm": "self_attn_layer_norm",
            "mlp_norm": "final_layer_norm",
        },
        outer={
            "embed": "decoder.embed_tokens",
            "positions": "decoder.embed_positions",
            "project_in": "decoder.project_in",
            "project_out": "decoder.project_out",
            "final_norm": "decoder.final_layer_norm",
        },
        head={"head": "lm_head"},
        optional=frozenset({"attn_norm", "mlp_norm", "final_norm"}),
        packs=False,
        ffn_key="ffn_dim",
        embed_key="word_embed_proj_dim",
        kv_heads_key="",
    ),
}
