"""Models with a language model inside, such as vision-language models. Only the language model is converted; all other tensors are copied as bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "text_config"  # the key of config.json that holds the config of the language model
WRAPPERS = (  # model_type
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "gemma3",
    "got_ocr2",
    "idefics2",
    "idefics3",
    "internvl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "ovis2",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
    "video_llama_3",
    "video_llava",
    "vipllava",
)
# Wrappers that mask for the language model, both ways over an image and its prompt and one way behind them -> the key of its own masks, which they override.
MASKING = {"paligemma": "use_bidirectional_attention"}
# The language model inside -> the family with the same layout, which reads texts in the same way.
ALIKE = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}  # wrappers whose published files have no `text_config` -> the language model inside
OF_WRAPPER = ("model_type", "architectures", "auto_map", "vision_config")  # keys of such a file that are not the language model's
PREFIXES = ("language_model.model.", "model.language_model.", "model.text_model.", "model.")  # of the language model in names on disk
OWN_HEAD = "language_model.model."  # with this prefix the head is beside the language model, in `language_model`


@dataclass(frozen=True)
class Wrapper:
    """The config of a wrapper, which contains that of the language model."""

    raw: Mapping[str, Any]
    kind: str  # the `model_type` of the language model inside

    @property
    def masks(self) -> bool:
        """Whether it masks for the language model. Without an image such a class attends one way in eager attention, and both ways in sdpa."""
        return self.raw["model_type"] in MASKING

    def content(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json of the wrapper with another config of the language model."""
        if TEXT not in self.raw:
            return {**{key: value for key, value in self.raw.items() if key in OF_WRAPPER}, **{key: text[key] for key in text if key not in OF_WRAPPER}}
        inside, key = self.raw[TEXT], MASKING.get(self.raw["model_type"], "")
        own = {**text, **({key: inside[key]} if key in inside else {}), "model_type": self.kind}
        language = {key: own[key] for key in (*inside, *own) if key in own and (key in inside or key not in ("architectures", "tie_word_embeddings"))}
        return {**self.raw, TEXT: language}


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
    own = {key: value for key, value in text.items() if key != MASKING.get(outer)}
    return {**own, **tied, "model_type": ALIKE.get(kind, kind)}, Wrapper(raw, kind)


def head_prefix(prefix: str) -> str:
    """Return the prefix of the head's name, where the bare language model has `prefix`."""
    return OWN_HEAD.removesuffix("model.") if prefix == OWN_HEAD else ""
