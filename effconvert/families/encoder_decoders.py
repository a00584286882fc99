"""Rows of families with an encoder and a decoder: see `Family`. Their layers are the encoder's; the decoder is outside the layers."""

from collections.abc import Mapping
from dataclasses import replace

from effconvert.families.family import Family

BART = Family(
    base="BartModel",
    lm="BartForConditionalGeneration",
    prefix="model",
    layers="encoder.layers",
    decoder_layers="decoder.layers",
    parts={
        **{part: f"self_attn.{part}_proj" for part in ("q", "k", "v")},
        "o": "self_attn.out_proj",
        "attn_post_norm": "self_attn_layer_norm",
        "up": "fc1",
        "down": "fc2",
        "mlp_post_norm": "final_layer_norm",
    },
    outer={
        "embed": "shared",
        "encoder_embed": "encoder.embed_tokens",  # the same table, unless tie_word_embeddings = false
        "positions": "encoder.embed_positions",
        "embed_norm": "encoder.layernorm_embedding",
        "decoder": "decoder",
    },
    head={"head": "lm_head"},
    buffers=("final_logits_bias",),
    norms_stream=True,
    decoder=False,
    heads_key="encoder_attention_heads",
    layers_key="encoder_layers",
    hidden_key="d_model",
    ffn_key="encoder_ffn_dim",
    kv_heads_key="",
    defaults={
        "tie_word_embeddings": True,
        "vocab_size": 50265,
        "d_model": 1024,
        "encoder_layers": 12,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "max_position_embeddings": 1024,
    },
)
# The norms stand before attention and FFN, and one more behind the last layer.
MBART = replace(
    BART,
    base="MBartModel",
    lm="MBartForConditionalGeneration",
    parts={part.replace("_post_norm", "_norm"): module for part, module in BART.parts.items()},
    outer={**BART.outer, "final_norm": "encoder.layer_norm"},
    norms_stream=False,
)
PEGASUS = replace(
    MBART,
    base="PegasusModel",
    lm="PegasusForConditionalGeneration",
    outer={part: module for part, module in MBART.outer.items() if part != "embed_norm"},
)

ENCODER_DECODERS: Mapping[str, Family] = {
    "bart": BART,
    "mbart": MBART,
    "pegasus": PEGASUS,
    "blenderbot": replace(
        PEGASUS,
        base="BlenderbotModel",
        lm="BlenderbotForConditionalGeneration",
        defaults={
            **BART.defaults,
            "vocab_size": 8008,
            "d_model": 2560,
            "encoder_layers": 2,
            "encoder_attention_heads": 32,
            "encoder_ffn_dim": 10240,
            "max_position_embeddings": 128,
        },
    ),
    "blenderbot-small": replace(
        BART,
        base="BlenderbotSmallModel",
        lm="BlenderbotSmallForConditionalGeneration",
        defaults={**BART.defaults, "d_model": 512, "encoder_layers": 8, "encoder_ffn_dim": 2048, "max_position_embeddings": 512},
    ),
    "marian": replace(
        BART,
        base="MarianModel",
        lm="MarianMTModel",
        outer={part: module for part, module in BART.outer.items() if part != "embed_norm"},
        buffers=("final_logits_bias", "embed_positions.weight"),  # sines, which its class computes
        constants={"share_encoder_decoder_embeddings": True},
        defaults={**BART.defaults, "vocab_size": 58101},
    ),
    "m2m_100": replace(
        PEGASUS,
        base="M2M100Model",
        lm="M2M100ForConditionalGeneration",
        outer={part: module for part, module in PEGASUS.outer.items() if part != "positions"},
        buffers=(),
        defaults={**BART.defaults, "vocab_size": 128112},
    ),
    "plbart": replace(
        BART,
        base="PLBartModel",
        lm="PLBartForConditionalGeneration",
        defaults={**BART.defaults, "vocab_size": 50005, "d_model": 768, "encoder_layers": 6, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072},
    ),
}
