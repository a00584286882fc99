"""Small random models of every family, the same on each call."""

import torch
import transformers

from effconvert.convert.families import FAMILIES

BASIC = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SHAPE, "num_key_value_heads": 4}
HEAD_DIM = {"head_dim": 16}  # not hidden_size / num_attention_heads
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

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
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": SHAPE,
    "opt": {**{key: value for key, value in SHAPE.items() if key != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "bert": SHAPE,
    "roberta": {**SHAPE, "type_vocab_size": 1},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "modernbert": {**SHAPE, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]},
}
GROUPING = [kind for kind, family in FAMILIES.items() if family.kv_heads_key]
DECODERS = [kind for kind, family in FAMILIES.items() if family.decoder]


def tiny(kind, **changes):
    """A float32 model of family `kind` with 4 query heads, multi-head where the family has the choice; `changes` go to its config."""
    settings = {**BASIC, **SETTINGS[kind], **changes}
    model_class = getattr(transformers, FAMILIES[kind].lm)
    model = model_class(model_class.config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model


def save(model, folder, **how):
    """Save `model` in `folder`, with options of save_pretrained such as max_shard_size, and return the folder."""
    model.save_pretrained(folder, **how)
    return folder


@torch.inference_mode()
def logits(model, length=20):
    """What `model` makes of the same random tokens on each call."""
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(0))
    return model(ids, use_cache=False).logits
