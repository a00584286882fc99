"""Read config.json and check it: its author is somebody else."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from effconvert.checkpoint.config import CONFIG, Config
from effconvert.checkpoint.replaced import KIND, Replaced, check_depth, read
from effconvert.checkpoint.shape import DECODER_SKIPS
from effconvert.checkpoint.shared import Shared, whole_layers
from effconvert.checkpoint.unsupported import OWN_CODE, instead, own_code, unknown_family
from effconvert.checkpoint.wrappers import unwrap
from effconvert.errors import ModelError, OptionError, UnknownLayoutError
from effconvert.families import CONVERTIBLE, KNOWN


def read_content(folder: Path) -> dict[str, Any]:
    """Read `folder`/config.json of any model, in the words of its author.

    Raises:
        OptionError: the folder holds no model.
        ModelError: it holds an adapter, the file is damaged, or asks for foreign code.
    """
    path = folder / CONFIG
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is a PEFT adapter, not a model; merge it into its base first (PeftModel.merge_and_unload, then save_pretrained)")
        if what := instead(file.name for file in folder.iterdir()):
            raise OptionError(f"{folder} has no config.json, and holds {what}")
        raise OptionError(f"{folder} holds no model: there is no config.json in it; give a folder written by save_pretrained, a Hub id or a .gguf file")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds no names and values; fetch the file again")
    _check_kernels(path, raw)
    return raw


def read_config(folder: Path) -> Config:
    """Read and recognise `folder`/config.json.

    Raises:
        OptionError: the folder holds no model.
        ModelError: it holds an adapter, or the file is damaged.
        UnknownLayoutError: it holds a model of an unknown family, or one laid out differently from its family.
    """
    path, raw = folder / CONFIG, read_content(folder)
    wrapper = None
    if language := unwrap(raw):
        raw, wrapper = language
    kind = raw.get("model_type")
    replaced: tuple[Replaced, ...] = ()
    shared: tuple[Shared, ...] = ()
    family = KNOWN.get(str(kind))
    if isinstance(kind, str) and kind.removeprefix(KIND) in CONVERTIBLE and kind.startswith(KIND):
        raw, family, replaced, shared = read(raw)
        kind = raw["model_type"]
    if not isinstance(kind, str) or family is None:
        raise UnknownLayoutError(unknown_family(path, raw))
    raw = family.renamed(raw)
    if raw.get("rope_scaling") and isinstance(ropes := raw.get("rope_parameters"), dict) and not any(isinstance(rope, dict) for rope in ropes.values()):
        raw = {key: value for key, value in raw.items() if key != "rope_parameters"}  # transformers reads the former key; of RoPE by layer it joins both
    family = family.of(raw)
    check_depth(raw, family)
    config = Config(raw, family, replaced, shared, wrapper)
    if family.groups_key:
        config = replace(config, shared=whole_layers([config.group_of(index) for index in range(config.layers)]))
    config.skips(0)  # raises where `per_layer_config` makes no sense
    for key, (value, why) in family.refused.items():
        if key in raw and bool(raw[key]) is value:
            raise ModelError(f"{path} says {key} = {raw[key]!r}, and {why}; set it to {'false' if value else 'true'}, or take another model")
    for key, needed in family.constants.items():
        if raw.get(key, needed) != needed:
            different = f"{kind} with {key} = {raw[key]!r} is laid out differently from the {kind} that effconvert knows"
            raise UnknownLayoutError(f"{different}, which needs {needed!r}; take a model that has that")
    if family.dense_first_key and int(config.get(family.dense_first_key)) < config.layers:
        raise UnknownLayoutError(
            f"{kind} with {family.dense_first_key} = {config.get(family.dense_first_key)} has experts in its other layers, and effconvert knows only those "
            "that have none; take a smaller model that was distilled from this one"
        )
    for key, (fits, needed) in CHECKS.items():
        unused = key == family.window_key and config.get("use_sliding_window") is False  # then qwen2_moe's class writes 0
        unused |= key == family.pattern_key and (config.get(family.window_key) is None or config.get("layer_types") is not None)  # exaone4's class too
        if config.get(key) is not None and not unused and not fits(config.get(key)):
            raise ModelError(f"{path} says {key} = {config.get(key)!r}, where {needed} is needed; mend the file")
    stem = family.base.removesuffix("Model")
    if not wrapper and config.architecture not in (family.base, family.lm) and not re.fullmatch(rf"{stem}For[A-Za-z]+", config.architecture):
        known = f"{kind}'s ({family.base}, {family.lm}, {stem}For…)"
        if code := own_code(raw):
            advice = f"if one of {known} reads these weights, write its name into architectures"
            raise UnknownLayoutError(f"{path} names the class {config.architecture!r}, which is code of its own ({code}); {OWN_CODE}, or {advice}")
        error = ModelError if config.needs_effconvert else UnknownLayoutError
        raise error(f"{path} names the class {config.architecture!r}, which is none of {known}; mend the file")
    if config.get("layer_types") is not None and len(config.get("layer_types")) != config.layers:
        raise ModelError(f"{path} has {len(config.get('layer_types'))} layer_types for {config.layers} layers; mend the file")
    if config.get(family.turned_key) is not None and len(config.get(family.turned_key)) < config.layers:
        raise ModelError(f"{path} has {len(config.get(family.turned_key))} {family.turned_key} for {config.layers} layers; mend the file")
    return config


def _integer(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and value >= least, f"a whole number of at least {least}, or null,"


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value)


def _check_kernels(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse attention kernels from the Hub, in the config of a model inside another one too.

    Raises:
        ModelError: config.json names one.
    """
    for key, value in content.items():
        if key in ("attn_implementation", "_attn_implementation") and "/" in str(value):
            raise ModelError(f"{path} asks for the attention kernel {value!r} from the Hub, which is foreign code; remove {key} from it")
        if isinstance(value, dict):
            _check_kernels(path, value)


def _fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _ropes(value: Any) -> bool:
    return isinstance(value, dict) and all(_fraction(value[key]) for key in ("partial_rotary_factor",) if value.get(key) is not None)


# Values that a key may have beside null -> check, and its description.
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (_names, "a list of names"),
    "layer_types": (_names, "a list of names"),
    "sliding_window": _integer(2),
    "sliding_window_pattern": _integer(1),
    "local_attention": _integer(2),
    "global_attn_every_n_layers": _integer(1),
    "max_window_layers": _integer(0),
    "max_position_embeddings": _integer(1),
    "n_positions": _integer(1),
    "vocab_size": _integer(1),
    "num_experts_per_tok": _integer(1),
    "decoder_sparse_step": _integer(1),
    "mlp_only_layers": (_numbers, "a list of the numbers of layers"),
    "rope_parameters": (_ropes, "a mapping"),
    "rope_scaling": (_ropes, "a mapping"),
    "partial_rotary_factor": (_fraction, "a number from 0 to 1"),
    "rotary_pct": (_fraction, "a number from 0 to 1"),
    "no_rope_layers": (_numbers, "a list with 1 for each layer that RoPE turns, and 0 for each other,"),
    "no_rope_layer_interval": _integer(1),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    DECODER_SKIPS: (lambda value: value == ["mlp"], 'the list ["mlp"]'),
    "use_sliding_window": (lambda value: isinstance(value, bool), "true or false"),
    "return_dict": (lambda value: value is True, "true"),
}
