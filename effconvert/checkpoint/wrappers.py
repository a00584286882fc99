"""Models with a language model inside, such as vision-language models. Only the language model is converted; all other tensors are copied as bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "text_config"  # the key of config.json that holds the config of the language model
WRAPPERS = ("gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm")  # model_type
# The language model inside -> the family with the same layout, which reads texts in the same way.
ALIKE = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# Transformers' default shape of a language model inside. Old versions of it wrote only what differed from that into `text_config`.
SHAPES: Mapping[str, Mapping[str, int]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "qwen2": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 151936},
    "gemma": {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16, "vocab_size": 256000},
    "gemma3_text": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "vocab_size": 262208},
}
FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}  # wrappers whose published files have no `text_config` -> the language model inside
OF_WRAPPER = ("model_type", "architectures", "auto_map", "vision_config")  # keys of such a file that are not the language model's
PREFIXES = ("language_model.model.", "model.language_model.", "model.text_model.", "model.")  # of the language model in names on disk
OWN_HEAD = "language_model.model."  # with this prefix the head is beside the language model, in `language_model`


@dataclass(frozen=True)
class Wrapper:
    """The config of a wrapper, which contains that of the language model."""

    raw: Mapping[str, Any]
    kind: str  # the `model_type` of the language model inside

    def content(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json of the wrapper with another config of the language model."""
        if TEXT not in self.raw:
            return {**{key: value for key, value in self.raw.items() if key in OF_WRAPPER}, **{key: text[key] for key in text if key not in OF_WRAPPER}}
        language = {key: value for key, value in text.items() if key not in ("architectures", "tie_word_embeddings") or key in self.raw[TEXT]}
        return {**self.raw, TEXT: {**language, "model_type": self.kind}}


def unwrap(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Wrapper] | None:
    """Return the language model's config in a config.json, and the wrapper; None if it contains none."""
    outer = str(raw.get("model_type"))
    if outer in FLAT and TEXT not in raw:
        language = {key: value for key, value in raw.items() if key not in OF_WRAPPER}
        return {**language, "model_type": ALIKE[FLAT[outer]]}, Wrapper(raw, FLAT[outer])
    text = raw.get(TEXT)
    if outer not in WRAPPERS or not isinstance(text, dict):
        return None
    kind = str(text.get("model_type"))
    tied = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}  # transformers reads the wrapper's
    return {**SHAPES.get(kind, {}), **text, **tied, "model_type": ALIKE.get(kind, kind)}, Wrapper(raw, kind)


def head_prefix(prefix: str) -> str:
    """Return the prefix of the head's name, where the bare language model has `prefix`."""
    return OWN_HEAD.removesuffix("model.") if prefix == OWN_HEAD else ""
