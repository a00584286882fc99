"""Where each family of models keeps its parts: data, and the only place that spells a parameter's name.

Adding a family is adding a row; a test builds a tiny model of every row and holds that each parameter has exactly one place.

A *part* is named by what it does: q, k, v, o, gate, up, down; the norms of a layer by where they stand (`attn_norm` before
attention, `attn_post_norm` after it, likewise `mlp_...`). Several parts under one module are fused in it, in the order given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: names relative to the base model, and the config keys that give its shape."""

    base: str  # class of the bare model
    lm: str  # class with the head it was pretrained with
    prefix: str  # of the base model inside `lm`; a checkpoint may be saved with or without it
    layers: str  # path of the list of layers
    parts: Mapping[str, str]  # in a layer: part -> module
    outer: Mapping[str, str]  # outside the layers, inside the base model: part -> module
    head: Mapping[str, str]  # outside the base model: part -> module
    optional: frozenset[str] = frozenset()  # parts that some models of the family lack
    buffers: tuple[str, ...] = ()  # what old versions of transformers saved in a layer and nobody reads

    per_head: bool = False  # fused q, k, v: head 0's q, k, v, then head 1's, ... instead of all q, all k, all v
    transposed: bool = False  # projections are stored [in, out] (Conv1D)
    per_kv_head: tuple[str, ...] = ("k", "v")  # parts whose rows come KV head by KV head

    rope: str = ""  # which two dimensions of a head RoPE turns together: "halves" (j, j + n/2), "interleaved" (2j, 2j + 1), none
    rotary_key: str = "partial_rotary_factor"  # which part of a head it turns

    decoder: bool = True
    packs: bool = True  # whether a decoder's class keeps texts apart that share a row: position_ids that begin anew
    heads_key: str = "num_attention_heads"
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    positions_key: str = "max_position_embeddings"
    positions_after_padding: bool = False  # position 0 of a text is the one after the padding token's: so many positions fewer can be read
    ffn_key: str = "intermediate_size"
    kv_heads_key: str = "num_key_value_heads"  # empty: the family cannot say, and has `fixed_kv_heads` or one per query head
    fixed_kv_heads: int = 0
    shares_kv_in_our_class: bool = False  # query heads share KV heads, which no class of transformers for this family can
    ffn: str = ""  # the module of a layer that is its FFN; empty: there is none, its projections stand in the layer itself
    expert_ffn_key: str = ""  # width inside an expert, where it is not that of `ffn_key`
    experts_key: str = ""  # number of experts of a layer, of which `parts` speaks as experts.*.gate
    multi_query: str = ""  # the family that is this one with a single KV head
    window_key: str = "sliding_window"
    pattern_key: str = "sliding_window_pattern"  # n, where every n-th layer has no window
    pattern: int = 0  # where the config is silent; 0: all layers have the window
    pattern_from: int = 1  # the number of the first layer, as that counts
    windowed: str = ""  # the family that is this one with a sliding window, maybe itself
    window_keys: Mapping[str, object] = field(default_factory=dict)  # what else its config says then
    fourier: str = ""  # the family that is this one with Fourier transforms in place of attention
    tokenizer: str = ""  # the tokenizer's class where the files name none, which a related family would look for elsewhere
    float32_only: bool = False  # whether its class computes in float32 alone
    layers_alike: bool = False  # whether its window holds in all layers or in none
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers takes where the config is silent
    constants: Mapping[str, object] = field(default_factory=dict)  # config values that this row takes for granted
    absent: Mapping[str, object] = field(default_factory=dict)  # keys of its relatives that it lacks, and what it does instead

    @property
    def attention(self) -> str:
        """The module of a layer that attends: where its queries are made; empty where nothing attends."""
        return self.parts.get("q", "").rpartition(".")[0]

    @property
    def grouped(self) -> "Family":
        """This family with query heads that share KV heads, where transformers' has none: a class of ours, with a key for their number."""
        return self if self.kv_heads_key else replace(self, kv_heads_key="num_key_value_heads", per_head=False, shares_kv_in_our_class=True)


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
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
POST_NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
QWEN_DEFAULTS = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN2 = replace(LLAMA, base="Qwen2Model", lm="Qwen2ForCausalLM", defaults=QWEN_DEFAULTS, windowed="qwen2", window_keys={"use_sliding_window": True})
QWEN3 = replace(
    QWEN2,
    base="Qwen3Model",
    lm="Qwen3ForCausalLM",
    parts={**LLAMA.parts, **QK_NORMS},
    defaults={**QWEN_DEFAULTS, "head_dim": 128},
    windowed="qwen3",
)
GEMMA2 = replace(
    LLAMA,
    base="Gemma2Model",
    lm="Gemma2ForCausalLM",
    defaults={
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
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
    ffn="mlp",
)

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
    decoder=False,
    kv_heads_key="",
    fourier="fnet",
    tokenizer="BertTokenizer",
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": replace(LLAMA, windowed="mistral"),
        "mistral": replace(
            LLAMA,
            base="MistralModel",
            lm="MistralForCausalLM",
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
            absent={"attention_bias": False, "mlp_bias": False},
            windowed="mistral",
            layers_alike=True,
        ),
        "qwen2": QWEN2,
        "qwen3": QWEN3,
        "granite": replace(LLAMA, base="GraniteModel", lm="GraniteForCausalLM"),
        "gemma": replace(LLAMA, base="GemmaModel", lm="GemmaForCausalLM", defaults={"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 16}),
        "gemma2": GEMMA2,
        "gemma3_text": replace(
            GEMMA2,
            base="Gemma3TextModel",
            lm="Gemma3ForCausalLM",
            parts={**GEMMA2.parts, **QK_NORMS},
            defaults={**GEMMA2.defaults, "sliding_window_pattern": 6},
        ),
        "olmo2": replace(
            LLAMA,
            base="Olmo2Model",
            lm="Olmo2ForCausalLM",
            parts={part: at for part, at in {**LLAMA.parts, **QK_NORMS, **POST_NORMS}.items() if part not in ("attn_norm", "mlp_norm")},
            per_kv_head=("k", "v", "k_norm"),  # its QK-norms have a weight for every channel of every head
        ),
        "phi3": replace(
            LLAMA,
            base="Phi3Model",
            lm="Phi3ForCausalLM",
            parts={
                **LLAMA.parts,
                **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
                **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
            },
        ),
        "cohere": replace(
            LLAMA,
            base="CohereModel",
            lm="CohereForCausalLM",
            rope="interleaved",
            parts={part: at for part, at in LLAMA.parts.items() if part != "mlp_norm"},  # attention and MLP read the same, side by side
            defaults={"tie_word_embeddings": True},
            constants={"use_qk_norm": False},
        ),
        "glm": replace(
            LLAMA,
            base="GlmModel",
            lm="GlmForCausalLM",
            rope="interleaved",
            parts={**LLAMA.parts, **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")},
            defaults={"num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5},
        ),
        "gpt2": GPT2,
        "gpt_bigcode": replace(
            GPT2,
            base="GPTBigCodeModel",
            lm="GPTBigCodeForCausalLM",
            transposed=False,
            fixed_kv_heads=1,
            multi_query="",
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
            kv_heads_key="",
        ),
        "bert": BERT,
        "roberta": replace(
            BERT,
            base="RobertaModel",
            lm="RobertaForMaskedLM",
            prefix="roberta",
            head={"head": "lm_head"},
            positions_after_padding=True,
            defaults={**BERT.defaults, "pad_token_id": 1},
            fourier="",
            tokenizer="",
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
            decoder=False,
            heads_key="n_heads",
            layers_key="n_layers",
            hidden_key="dim",
            ffn_key="hidden_dim",
            kv_heads_key="",
            ffn="ffn",
        ),
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
            optional=frozenset({"attn_norm"}),  # layer 0 normalises nothing before attention
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
)
