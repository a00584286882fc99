"""Why a model cannot be converted, and what to take instead: reasons for refusals, by config.json and by the names of files."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from effconvert.families import CONVERTIBLE
from effconvert.options import shown

RECURRENT = ("state_size", "ssm_state_size", "mamba_d_state", "linear_conv_kernel_dim", "conv_L_cache", "lru_width", "attention_hidden_size")

# A key of config.json that is not false -> what a model with this key is, and what to take instead. The first key that fits gives the reason.
SIGNS: Mapping[str, tuple[str, str]] = {
    "is_encoder_decoder": ("it is an encoder-decoder", "take a model that is only a decoder or only an encoder, or a bart or marian"),
    **dict.fromkeys(RECURRENT, ("it has recurrent layers, which keep a state instead of keys and values", "take a model that attends in all of its layers")),
    "kv_lora_rank": (
        "it has latent attention (MLA), which keeps one compressed vector a token instead of keys and values",
        "take a model with keys and values, such as one of the smaller models that were distilled from this one",
    ),
    "relative_attention": ("it adds terms for the distance of tokens to its attention scores", "take an encoder such as roberta or modernbert"),
}
OWN_CODE = "effconvert runs no code from a checkpoint; take a copy that transformers opens by itself, whose name often ends in -hf"

ANOTHER = "take a model of one of these, or only measure this one (effconvert eval)"

# A file, or an ending of files, of a place without config.json -> what lies there, and what to do.
LAYOUTS: Mapping[str, str] = {
    "modules.json": "a sentence-transformers model in parts; give the folder of its part that has a config.json, such as 0_Transformer",
    "model_index.json": "a diffusers pipeline, which is no text model; give a folder written by save_pretrained of transformers",
    "params.json": "a model in its author's own format; take the copy for transformers, whose name often ends in -hf",
    ".gguf": "GGUF files; give the path of one of them (from the Hub: hf download ID FILE)",
}


def unknown_family(path: object, raw: Mapping[str, Any]) -> str:
    """Return the message for a model of a family without a row: what it is, by the keys of its config.json, and what to do."""
    kind, text = raw.get("model_type"), raw.get("text_config")
    if kind is None:
        name = next(iter(raw.get("architectures") or []), None)
        owner = next((family for family, row in CONVERTIBLE.items() if name in (row.base, row.lm)), None)
        advice = f"its class is {name}, so write model_type = {owner!r} into it" if owner else "write the one that it is of into it"
        return f"{path} names no family (model_type); {advice}"
    statement = f"{path} names the family {kind!r}, which effconvert does not know"
    everything = {**raw, **text} if isinstance(text, Mapping) else raw
    if sign := next((key for key in SIGNS if everything.get(key)), None):
        what, advice = SIGNS[sign]
        return f"{statement}: {what} ({sign} = {shown(everything[sign])}); {advice}"
    if code := own_code(raw):
        return f"{statement}: it is code of its own ({code}); {OWN_CODE}"
    if isinstance(text, Mapping):
        inside = text.get("model_type")
        advice = "save the language model alone" if inside in CONVERTIBLE else "effconvert does not know that family either, so take another model"
        return f"{statement}: it is a model around a language model ({inside}); {advice}"
    quantised = raw.get("quantization_config")
    method = f"its weights are quantised too ({shown(quantised.get('quant_method'))}); " if isinstance(quantised, Mapping) else ""
    near = get_close_matches(str(kind), CONVERTIBLE, n=1, cutoff=0.88)  # for misspellings, not for other families with similar names
    return f"{statement}; {method}{f'the nearest is {near[0]!r}; ' if near else ''}it knows {', '.join(CONVERTIBLE)}; {ANOTHER}"


def own_code(raw: Mapping[str, Any]) -> str:
    """Return the class that `auto_map` names, which is code of the model's author; empty without one."""
    classes = raw.get("auto_map")
    names = [name for auto, name in classes.items() if auto != "AutoConfig" and isinstance(name, str)] if isinstance(classes, Mapping) else []
    return f"auto_map: {names[0]}" if names else ""


def instead(names: Iterable[str]) -> str:
    """Return what lies at a place without config.json, by the names of its files, and what to do; empty if that is unknown."""
    files = set(names)
    return next((what for mark, what in LAYOUTS.items() if mark in files or (mark.startswith(".") and any(name.endswith(mark) for name in files))), "")
