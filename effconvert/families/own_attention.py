"""Rows of families whose classes do not call transformers' AttentionInterface: see `Family`."""

from collections.abc import Mapping
from dataclasses import replace

from effconvert.families.decoders import GPT2
from effconvert.families.family import Family

GPTJ = replace(
    GPT2,
    base="GPTJModel",
    lm="GPTJForCausalLM",
    parts={
        "q": "attn.q_proj",
        "k": "attn.k_proj",
        "v": "attn.v_proj",
        "o": "attn.out_proj",
        "up": "mlp.fc_in",
        "down": "mlp.fc_out",
        "attn_norm": "ln_1",  # parallel attention and MLP share a norm
    },
    outer={"embed": "wte", "final_norm": "ln_f"},
    own_attention=True,
    packs=False,
    transposed=False,
    rope="interleaved",
    rotary_key="rotary_dim",
    rotary_counts=True,
    multi_query="",
    with_rope={},
    relaid=("phi",),
    biased={"": ("up", "down")},
    defaults={
        **{"rotary_dim": 64, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400},
        **{"bos_token_id": 50256, "eos_token_id": 50256},
    },
)
BLOOM = Family(
    base="BloomModel",
    lm="BloomForCausalLM",
    prefix="transformer",
    layers="h",
    parts={
        **dict.fromkeys(("q", "k", "v"), "self_attention.query_key_value"),
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
    outer={"embed": "word_embeddings", "embed_norm": "word_embeddings_layernorm", "final_norm": "ln_f"},
    head={"head": "lm_head"},
    own_attention=True,
    adds_inside=frozenset({"attention", "ffn"}),
    packs=False,
    per_head=True,
    heads_key="n_head",
    layers_key="n_layer",
    positions_key="",
    ffn_key="",
    kv_heads_key="",
    ffn="mlp",
    defaults={"tie_word_embeddings": True},
)
FALCON_PARTS = {
    **{part: at for part, at in BLOOM.parts.items() if part != "mlp_norm"},  # parallel attention and MLP share a norm
    "attn_norm": "input_layernorm",
}
FALCON = replace(
    BLOOM,
    base="FalconModel",
    lm="FalconForCausalLM",
    parts=FALCON_PARTS,
    outer={"embed": "word_embeddings", "final_norm": "ln_f"},
    adds_inside=frozenset(),
    rope="halves",
    heads_key="num_attention_heads",
    layers_key="num_hidden_layers",
    positions_key="max_position_embeddings",
    ffn_key="ffn_hidden_size",
    fixed_kv_heads=1,
    defaults={"tie_word_embeddings": True, "max_position_embeddings": 2048, "multi_query": True, "parallel_attn": True},
    variants=(  # the row itself is that of 7B
        ({"parallel_attn": False}, {"parts": {**FALCON_PARTS, "mlp_norm": "post_attention_layernorm"}}),
        ({"multi_query": False}, {"fixed_kv_heads": 0}),
        (
            {"new_decoder_architecture": True},  # 40B, 180B
            {
                "parts": {**FALCON_PARTS, "attn_norm": "ln_attn", "mlp_norm": "ln_mlp"},
                "fixed_kv_heads": 0,
                "kv_heads_key": "num_kv_heads",
                "caches_query_heads": True,
            },
        ),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, {"parts": FALCON_PARTS}),  # 11B
        ({"alibi": True}, {"rope": "", "positions_key": ""}),  # rw-1b
    ),
)

OWN_ATTENTION: Mapping[str, Family] = {
    "falcon": FALCON,
    "gptj": GPTJ,
    "codegen": replace(
        GPTJ,
        base="CodeGenModel",
        lm="CodeGenForCausalLM",
        parts={**dict.fromkeys(("q", "v", "k"), "attn.qkv_proj"), **{part: at for part, at in GPTJ.parts.items() if part not in ("q", "k", "v")}},
        buffers=(*GPTJ.buffers, "attn.causal_mask"),
        blocks=4,
    ),
    "gpt_neo": replace(
        GPT2,
        base="GPTNeoModel",
        lm="GPTNeoForCausalLM",
        parts={
            "q": "attn.attention.q_proj",
            "k": "attn.attention.k_proj",
            "v": "attn.attention.v_proj",
            "o": "attn.attention.out_proj",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
            "attn_norm": "ln_1",
            "mlp_norm": "ln_2",
        },
        buffers=("attn.attention.bias", "attn.attention.masked_bias"),
        own_attention=True,
        with_rope={},
        packs=False,
        transposed=False,
        heads_key="num_heads",
        layers_key="num_layers",
        hidden_key="hidden_size",
        ffn_key="intermediate_size",
        positions_key="max_position_embeddings",
        kinds_key="attention_types",
        always_causal=True,
        multi_query="",
    ),
    "bloom": replace(BLOOM, spellings={"n_embed": "hidden_size"}),
    "mpt": replace(
        BLOOM,
        base="MptModel",
        lm="MptForCausalLM",
        layers="blocks",
        parts={
            **dict.fromkeys(("q", "k", "v"), "attn.Wqkv"),
            "o": "attn.out_proj",
            "up": "ffn.up_proj",
            "down": "ffn.down_proj",
            "attn_norm": "norm_1",
            "mlp_norm": "norm_2",
        },
        outer={"embed": "wte", "final_norm": "norm_f"},
        adds_inside=frozenset({"ffn"}),
        per_head=False,
        heads_key="n_heads",
        layers_key="n_layers",
        hidden_key="d_model",
        positions_key="max_seq_len",
        ffn="ffn",
        refused={"is_causal": (False, "its class cannot run with it")},
    ),
}
