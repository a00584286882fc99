"""Rows of families that see all of a text at once: see `Family`."""

from collections.abc import Mapping
from dataclasses import replace

from effconvert.families.decoders import LLAMA
from effconvert.families.family import Family

BERT = Family(
    base="BertModel",
    lm="BertForMaskedLM",
    defaults={"tie_word_embeddings": True},
    prefix="bert",
    layers="encoder.layer",
    parts={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attn_post_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_post_norm": "output.LayerNorm",
    },
    outer={
        "embed": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "pooler": "pooler",
    },
    head={"head": "cls"},
    norms_stream=True,
    decoder=False,
    kv_heads_key="",
    fourier="fnet",
    tokenizer="BertTokenizer",
)
ROBERTA = replace(
    BERT,
    base="RobertaModel",
    lm="RobertaForMaskedLM",
    prefix="roberta",
    head={"head": "lm_head"},
    positions_after_padding=True,
    defaults={**BERT.defaults, "pad_token_id": 1},
    fourier="",
    tokenizer="",
)

ENCODERS: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": replace(ROBERTA, base="XLMRobertaModel", lm="XLMRobertaForMaskedLM"),
    "camembert": replace(ROBERTA, base="CamembertModel", lm="CamembertForMaskedLM"),
    "electra": replace(
        BERT,
        base="ElectraModel",
        lm="ElectraForMaskedLM",
        prefix="electra",
        outer={**{part: at for part, at in BERT.outer.items() if part != "pooler"}, "project_in": "embeddings_project"},
        head={"head_dense": "generator_predictions", "head": "generator_lm_head"},
        embed_key="embedding_size",
        defaults={**BERT.defaults, "embedding_size": 128},
        fourier="",
        tokenizer="",
    ),
    "mpnet": replace(
        ROBERTA,
        base="MPNetModel",
        lm="MPNetForMaskedLM",
        prefix="mpnet",
        parts={
            **{part: f"attention.attn.{part}" for part in ("q", "k", "v", "o")},
            **{part: at for part, at in BERT.parts.items() if part in ("up", "down", "mlp_post_norm")},
            "attn_post_norm": "attention.LayerNorm",
        },
        outer={**{part: at for part, at in BERT.outer.items() if part != "types"}, "distances": "encoder.relative_attention_bias"},  # added to the scores
        own_attention=True,
        constants={"pad_token_id": 1},
    ),
    "fnet": replace(
        BERT,
        base="FNetModel",
        lm="FNetForMaskedLM",
        prefix="fnet",
        parts={
            "attn_post_norm": "fourier.output.LayerNorm",  # after the transform, which has no parameters
            **{part: module for part, module in BERT.parts.items() if part in ("up", "down", "mlp_post_norm")},
        },
        outer={**BERT.outer, "embed_projection": "embeddings.projection"},
        heads_key="",
        constants={"use_tpu_fourier_optimizations": False},
        absent={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
        fourier="",
        tokenizer="FNetTokenizer",
        float32_only=True,  # torch.fft has no bfloat16, and on CPUs no float16
    ),
    "distilbert": Family(
        base="DistilBertModel",
        lm="DistilBertForMaskedLM",
        defaults={"tie_word_embeddings": True},
        prefix="distilbert",
        layers="transformer.layer",
        parts={
            "q": "attention.q_lin",
            "k": "attention.k_lin",
            "v": "attention.v_lin",
            "o": "attention.out_lin",
            "attn_post_norm": "sa_layer_norm",
            "up": "ffn.lin1",
            "down": "ffn.lin2",
            "mlp_post_norm": "output_layer_norm",
        },
        outer={
            "embed": "embeddings.word_embeddings",
            "positions": "embeddings.position_embeddings",
            "embed_norm": "embeddings.LayerNorm",
        },
        head={"head_dense": "vocab_transform", "head_norm": "vocab_layer_norm", "head": "vocab_projector"},
        norms_stream=True,
        decoder=False,
        heads_key="n_heads",
        layers_key="n_layers",
        hidden_key="dim",
        ffn_key="hidden_dim",
        kv_heads_key="",
        ffn="ffn",
    ),
    "eurobert": replace(LLAMA, base="EuroBertModel", lm="EuroBertForMaskedLM", decoder=False, buffers=()),
    "modernbert": Family(
        base="ModernBertModel",
        lm="ModernBertForMaskedLM",
        defaults={"tie_word_embeddings": True, "local_attention": 128},
        prefix="model",
        layers="layers",
        parts={
            **dict.fromkeys(("q", "k", "v"), "attn.Wqkv"),
            "o": "attn.Wo",
            **dict.fromkeys(("gate", "up"), "mlp.Wi"),
            "down": "mlp.Wo",
            "attn_norm": "attn_norm",
            "mlp_norm": "mlp_norm",
        },
        outer={"embed": "embeddings.tok_embeddings", "embed_norm": "embeddings.norm", "final_norm": "final_norm"},
        head={"head_dense": "head", "head": "decoder"},
        first_lacks=frozenset({"attn_norm"}),  # the embeddings' norm is just before it
        rope="halves",
        decoder=False,
        kv_heads_key="",
        ffn="mlp",
        window_key="local_attention",
        pattern_key="global_attn_every_n_layers",
        pattern=3,
        pattern_from=0,
    ),
}
