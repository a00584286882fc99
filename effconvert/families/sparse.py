"""Rows of families whose layers have experts: see `Family`."""

from collections.abc import Mapping
from dataclasses import replace

from effconvert.families.decoders import LLAMA, MULTIPLIERS, OLMO2, QK_NORMS, QWEN2, QWEN3, QWEN_DEFAULTS
from effconvert.families.family import Family

WITHOUT_FFN = {part: at for part, at in LLAMA.parts.items() if part not in ("gate", "up", "down")}
EXPERTS = {"router": "mlp.gate", **{f"experts.*.{part}": f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")}}
TWO_OF_EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 2}

SPARSE: Mapping[str, Family] = {
    "mixtral": replace(
        LLAMA,
        base="MixtralModel",
        lm="MixtralForCausalLM",
        parts={
            **WITHOUT_FFN,
            "router": "block_sparse_moe.gate",
            "experts.*.gate": "block_sparse_moe.experts.*.w1",
            "experts.*.up": "block_sparse_moe.experts.*.w3",
            "experts.*.down": "block_sparse_moe.experts.*.w2",
        },
        ffn="",  # in memory it has another name than on disk
        experts_key="num_local_experts",
        defaults={**TWO_OF_EIGHT, "num_key_value_heads": 8},
        absent={"attention_bias": False, "mlp_bias": False},
        windowed="mixtral",
        layers_alike=True,
    ),
    "qwen2_moe": replace(
        QWEN2,
        base="Qwen2MoeModel",
        lm="Qwen2MoeForCausalLM",
        parts={
            **LLAMA.parts,
            **EXPERTS,
            **{f"shared_{part}": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
            "shared_router": "mlp.shared_expert_gate",
        },
        experts_key="num_experts",
        expert_ffn_key="moe_intermediate_size",
        shared_ffn_key="shared_expert_intermediate_size",
        dense_layers_key="mlp_only_layers",
        defaults={
            **QWEN_DEFAULTS,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        absent={"attention_bias": False, "mlp_bias": False},
        windowed="qwen2_moe",
        pattern=2,
        first_windowed=True,
        upcycled={},
    ),
    "qwen3_moe": replace(
        QWEN3,
        base="Qwen3MoeModel",
        lm="Qwen3MoeForCausalLM",
        parts={**QWEN3.parts, **EXPERTS},
        experts_key="num_experts",
        expert_ffn_key="moe_intermediate_size",
        dense_layers_key="mlp_only_layers",
        defaults={
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        windowed="qwen3_moe",
        layers_alike=True,
        upcycled={},
    ),
    "flex_olmo": replace(
        OLMO2,
        base="FlexOlmoModel",
        lm="FlexOlmoForCausalLM",
        parts={**{part: at for part, at in OLMO2.parts.items() if part not in ("gate", "up", "down")}, **EXPERTS},
        experts_key="num_experts",
        defaults={"num_experts": 7, "num_experts_per_tok": 5, "pad_token_id": 100277, "eos_token_id": 100257},
        upcycled={},
    ),
    "olmoe": replace(
        LLAMA,
        base="OlmoeModel",
        lm="OlmoeForCausalLM",
        parts={**WITHOUT_FFN, **QK_NORMS, **EXPERTS},
        per_kv_head=OLMO2.per_kv_head,
        experts_key="num_experts",
        defaults={"num_experts": 64, "num_experts_per_tok": 8},
    ),
    "granitemoe": replace(
        LLAMA,
        base="GraniteMoeModel",
        lm="GraniteMoeForCausalLM",
        parts={
            **WITHOUT_FFN,
            "router": "block_sparse_moe.router.layer",
            "experts.*.gate": "block_sparse_moe.input_linear",
            "experts.*.up": "block_sparse_moe.input_linear",
            "experts.*.down": "block_sparse_moe.output_linear",
        },
        ffn="block_sparse_moe",
        experts_key="num_local_experts",
        experts_stacked=True,
        scale_key="attention_multiplier",
        defaults={**TWO_OF_EIGHT, **MULTIPLIERS},
        absent={"mlp_bias": False},
    ),
}
