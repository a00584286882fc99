"""How config.json says that layers have mixers: under a `model_type` of its own, so that nobody opens such a model as what it is not.

The family's own keys stay as they are but for `layer_types`, which names what stock classes refuse: they would else leave the mixers out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effconvert import steps
from effconvert.convert.families import FAMILIES, Family
from effconvert.errors import ModelError
from effconvert.options import shown

if TYPE_CHECKING:
    from effconvert.surgery._mixing import Mixing

KIND, CLASS = "effconvert_", "Effconvert"  # begin the model_type, and the names of classes
DEEPEST = 10_000  # layers
STUB_FILE = "modeling_effconvert.py"
STUB = '''"""This {kind} has attention of effconvert: `pip install effconvert`, then `import effconvert`, or trust_remote_code=True."""

import effconvert.mixers


def __getattr__(name):
    return getattr(effconvert.mixers, name)
'''
AUTO = {"AutoModelForCausalLM": "lm", "AutoModelForMaskedLM": "lm", "AutoModel": "base"}  # transformers' class -> the family's


def encode(raw: Mapping[str, Any], mixers: tuple[Mixing | None, ...], family: Family) -> dict[str, Any]:
    """Return config.json of the model `raw` with `mixers` in its layers (one each, None where it is softmax), and KV heads shared as in `family`."""
    kinds: list[Mixing] = []
    for mixer in mixers:
        if mixer is not None and mixer not in kinds:
            kinds.append(mixer)
    grouped = family != FAMILIES[raw["model_type"]]
    if not kinds and not grouped:
        return dict(raw)
    mixers = mixers or (None,) * raw[family.layers_key]
    placed = [{"mixer": kind.name, "options": kind.settings, "layers": [index for index, mixer in enumerate(mixers) if mixer == kind]} for kind in kinds]
    usual = raw.get("layer_types")
    softmax = [f"{KIND}gqa"] * len(mixers) if grouped else usual or ["full_attention"] * len(mixers)
    names = [f"{KIND}{mixer.name}" if mixer else kind for mixer, kind in zip(mixers, softmax, strict=True)]
    module = STUB_FILE.removesuffix(".py")
    heads = ("AutoModelForCausalLM", "AutoModel") if family.decoder else ("AutoModelForMaskedLM", "AutoModel")
    classes = {auto: f"{module}.{CLASS}{getattr(family, AUTO[auto])}" for auto in heads}
    return {
        **raw,
        "model_type": KIND + str(raw["model_type"]),
        "architectures": [CLASS + name for name in raw.get("architectures") or [family.lm]],
        "auto_map": {"AutoConfig": f"{module}.{CLASS}{family.base.removesuffix('Model')}Config", **classes},
        "layer_types": names,
        "effconvert": {"mixers": placed, "layer_types": usual, **({"grouped": True} if grouped else {})},
    }


def read(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Mixing | None, ...], Family]:
    """Read a config.json whose `model_type` says that effconvert wrote it.

    Raises:
        ModelError: what it says of mixers makes no sense, or nothing is said.
    """
    raw, mixers, family = decode(given)
    if not mixers and family == FAMILIES[raw["model_type"]]:
        raise ModelError(f"config.json is of a {given['model_type']} and says nothing of mixers; take the file that effconvert wrote")
    return raw, mixers, family


def decode(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Mixing | None, ...], Family]:
    """Undo `encode`: the config of the model without mixers, the mixers of its layers, none for a model that has none, and its family.

    Raises:
        ModelError: what it says of mixers makes no sense.
    """
    block = given.get("effconvert")
    kind = str(given["model_type"]).removeprefix(KIND)
    family = FAMILIES[kind]
    check_depth(given, family)
    if block is None:
        return {**given, "model_type": kind}, (), family
    try:
        if block.get("grouped"):
            family = family.grouped
            if given[family.heads_key] % given[family.kv_heads_key]:
                raise ValueError(f"{given[family.kv_heads_key]} KV heads cannot be shared by {given[family.heads_key]}")
        mixers: list[Mixing | None] = [None] * given[family.layers_key]
        for entry in block["mixers"]:
            if entry["mixer"] not in steps.techniques():
                raise ValueError(f"there is no mixer {entry['mixer']!r}")
            if not hasattr(steps.load(entry["mixer"]), "mix"):
                raise ValueError(f"{entry['mixer']} is no mixer")
            made: Any = steps.load(entry["mixer"])(**entry["options"])
            for index in entry["layers"]:
                if not 0 <= index < len(mixers) or mixers[index] is not None:
                    raise ValueError(f"layer {index} is not there, or has two mixers")
                mixers[index] = made
    except Exception as error:  # whatever Python says to a file that somebody edited
        raise ModelError(f"config.json says of its mixers {shown(block)}, which makes no sense ({error}); take the file that effconvert wrote") from None
    kept = {key: value for key, value in given.items() if key not in ("effconvert", "auto_map", "layer_types")}
    if block.get("layer_types") is not None:
        kept["layer_types"] = block["layer_types"]
    kept["model_type"] = kind
    if kept.get("architectures"):
        kept["architectures"] = [name.removeprefix(CLASS) for name in kept["architectures"]]
    return kept, tuple(mixers) if block["mixers"] else (), family


def check_depth(raw: Mapping[str, Any], family: Family) -> None:
    """Refuse more layers than any model has: lists of as many are made before a tensor is looked at, and the file is somebody else's.

    Raises:
        ModelError: there are.
    """
    depth = raw.get(family.layers_key)
    if isinstance(depth, int | float) and depth > DEEPEST:
        raise ModelError(f"config.json says {family.layers_key} = {shown(depth)}, and no model has more than {DEEPEST}; mend the file")
