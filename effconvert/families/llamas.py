"""Rows of decoders that differ from llama in norms, in layers with RoPE, or by parallel attention and MLP: see `Family`."""

from collections.abc import Mapping
from dataclasses import replace

from effconvert.families.decoders import BY_IMPLEMENTATION, LLAMA, OLMO2, POST_NORMS, QK_NORMS, sizes
from effconvert.families.family import Family

WITHOUT_GATE = {part: at for part, at in LLAMA.parts.items() if part != "gate"}
ONE_NORM = {part: at for part, at in LLAMA.parts.items() if part != "mlp_norm"}  # parallel attention and MLP share a norm
CAUSAL = {"is_causal": (False, BY_IMPLEMENTATION)}
LATENT = {"kv_a": "self_attn.kv_a_proj_with_mqa", "kv_a_norm": "self_attn.kv_a_layernorm", "kv_b": "self_attn.kv_b_proj"}  # in place of k and v
WITHOUT_NORMS = {part: at for part, at in LLAMA.parts.items() if not part.endswith("_norm")}

LLAMAS: Mapping[str, Family] = {
    "smollm3": replace(
        LLAMA,
        base="SmolLM3Model",
        lm="SmolLM3ForCausalLM",
        turned_key="no_rope_layers",
        unturned_key="no_rope_layer_interval",
        defaults={"tie_word_embeddings": True, "num_key_value_heads": 4, "use_sliding_window": False, "no_rope_layer_interval": 4},
    ),
    "olmo": replace(LLAMA, base="OlmoModel", lm="OlmoForCausalLM", parts=WITHOUT_NORMS, outer={"embed": "embed_tokens"}),  # its norms have no parameters
    "olmo3": replace(OLMO2, base="Olmo3Model", lm="Olmo3ForCausalLM", pattern_key="", pattern=4, defaults={"sliding_window": 4096}, upcycled={}),
    "starcoder2": replace(
        LLAMA,
        base="Starcoder2Model",
        lm="Starcoder2ForCausalLM",
        parts={**WITHOUT_GATE, "up": "mlp.c_fc", "down": "mlp.c_proj"},
        defaults={"tie_word_embeddings": True, "num_key_value_heads": 2},
        windowed="starcoder2",
        layers_alike=True,
    ),
    "stablelm": replace(
        LLAMA,
        base="StableLmModel",
        lm="StableLmForCausalLM",
        fixed_head_width=True,
        lacking={"mlp_norm": ("use_parallel_residual", True)},
        defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25, "use_parallel_residual": False},
        constants={"qk_layernorm": False},
        refused=CAUSAL,
    ),
    "phi": replace(
        LLAMA,
        base="PhiModel",
        lm="PhiForCausalLM",
        parts={**{part: at for part, at in ONE_NORM.items() if part != "gate"}, "o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
        outer={"embed": "embed_tokens", "final_norm": "final_layernorm"},
        biased={"": ("q", "k", "v", "o", "up", "down")},
        defaults={"partial_rotary_factor": 0.5},
        constants={"qk_layernorm": False},
    ),
    "cohere2": replace(
        LLAMA,
        base="Cohere2Model",
        lm="Cohere2ForCausalLM",
        rope="interleaved",
        turns_windows=True,
        parts=ONE_NORM,
        pattern=4,
        defaults={"tie_word_embeddings": True, "sliding_window": 4096, **sizes(8192, 22528, 40, 64, 256000)},
    ),
    "glm4": replace(
        LLAMA,
        base="Glm4Model",
        lm="Glm4ForCausalLM",
        rope="interleaved",
        parts={
            **LLAMA.parts,
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
            "attn_post_norm": "post_self_attn_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
        defaults={"num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    "nemotron": replace(LLAMA, base="NemotronModel", lm="NemotronForCausalLM", parts=WITHOUT_GATE, refused=CAUSAL, defaults={"partial_rotary_factor": 0.5}),
    "seed_oss": replace(LLAMA, base="SeedOssModel", lm="SeedOssForCausalLM", defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "arcee": replace(LLAMA, base="ArceeModel", lm="ArceeForCausalLM", parts=WITHOUT_GATE),
    "apertus": replace(
        LLAMA,
        base="ApertusModel",
        lm="ApertusForCausalLM",
        parts={
            **WITHOUT_GATE,
            **QK_NORMS,
            "attn_norm": "attention_layernorm",
            "mlp_norm": "feedforward_layernorm",
            "act_positive": "mlp.act_fn.alpha_p",  # two trained numbers of its activation, xIELU
            "act_negative": "mlp.act_fn.alpha_n",
        },
        loose=frozenset({"act_positive", "act_negative"}),
        optional=frozenset({"act_positive", "act_negative"}),  # another activation has none
        buffers=("mlp.act_fn.beta", "mlp.act_fn.eps"),
    ),
    "ministral3": replace(
        LLAMA,
        base="Ministral3Model",
        lm="Ministral3ForCausalLM",
        defaults={"num_key_value_heads": 8, "head_dim": 128},
        layers_alike=True,
        scales_queries=True,
    ),
    "ernie4_5": replace(
        LLAMA,
        base="Ernie4_5Model",
        lm="Ernie4_5ForCausalLM",
        rope="interleaved",
        relaid=("llama",),
        biased={"use_bias": ("q", "k", "v", "o", "gate", "up", "down")},
        defaults={
            **{"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
            **{"rope_theta": 500000.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            **sizes(1024, 3072, 18, 16, 103424),
        },
    ),
    "helium": replace(
        LLAMA,
        base="HeliumModel",
        lm="HeliumForCausalLM",
        fixed_head_width=True,  # its output projection is square
        rope="interleaved",
        relaid=("llama",),
        biased={"attention_bias": ("q", "k", "v"), "mlp_bias": ("gate", "up", "down")},
        defaults={
            **{"num_key_value_heads": 20, "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-8},
            **{"rope_theta": 100000.0, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2},
            **sizes(2560, 7040, 24, 20, 48000),
        },
    ),
    "hunyuan_v1_dense": replace(
        LLAMA,
        base="HunYuanDenseV1Model",
        lm="HunYuanDenseV1ForCausalLM",
        parts={**LLAMA.parts, "q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"},
        norms_turned=True,
    ),
    "exaone4": replace(
        LLAMA,
        base="Exaone4Model",
        lm="Exaone4ForCausalLM",
        parts={**WITHOUT_NORMS, **QK_NORMS, **POST_NORMS},
        turns_windows=True,
        turns_without=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "deepseek_v3": replace(  # without experts and without a factored q
        LLAMA,
        base="DeepseekV3Model",
        lm="DeepseekV3ForCausalLM",
        rope="interleaved",
        parts={**{part: at for part, at in LLAMA.parts.items() if part not in ("k", "v")}, **LATENT},
        per_kv_head=(),
        kv_heads_key="",
        dense_first_key="first_k_dense_replace",
        defaults={
            **{"first_k_dense_replace": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "head_dim": 64},
            **sizes(7168, 18432, 61, 128, 129280),
        },
        constants={"q_lora_rank": None},
        absent={"mlp_bias": False, "sliding_window": None},
    ),
}
