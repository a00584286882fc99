"""Models with a language model inside, such as vision-language models. Only the language model is converted; all other tensors are copied as bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "text_config"  # the key of config.json that holds the config of the language model
WRAPPERS = ("gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm")  # model_type
# The language model inside -> the family with the same layout, which reads texts in the same way.
ALIKE = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
PREFIXES = ("language_model.model.", "model.language_model.", "model.text_model.", "model.")  # of the language model in names on disk
OWN_HEAD = "language_model.model."  # with this prefix the head is beside the language model, in `language_model`


@dataclass(frozen=True)
class Wrapper:
    """The config of a wrapper, which contains that of the language model."""

    raw: Mapping[str, Any]
    kind: str  # the `model_type` of the language model inside

    def content(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json of the wrapper with another config of the language model."""
        language = {key: value for key, value in text.items() if key not in ("architectures", "tie_word_embeddings") or key in self.raw[TEXT]}
        return {**self.raw, TEXT: {**language, "model_type": self.kind}}


def unwrap(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Wrapper] | None:
    """Return the language model's config in a config.json, and the wrapper; None if it contains none."""
    text = raw.get(TEXT)
    if raw.get("model_type") not in WRAPPERS or not isinstance(text, dict):
        return None
    kind = str(text.get("model_type"))
    tied = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}  # transformers reads the wrapper's
    return {**text, **tied, "model_type": ALIKE.get(kind, kind)}, Wrapper(raw, kind)


def head_prefix(prefix: str) -> str:
    """Return the prefix of the head's name, where the bare language model has `prefix`."""
    return OWN_HEAD.removesuffix("model.") if prefix == OWN_HEAD else ""
