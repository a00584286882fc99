"""Records of techniques in config.json. The `model_type` is effconvert's own, so that no other class opens such a model.

This module handles records only; the code of techniques is in `effconvert.surgery._replacement`. The family's own keys stay, except `layer_types`: its
entries make stock classes refuse the model. They would ignore the replacements.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from effconvert.checkpoint.shape import DECODER_SKIPS
from effconvert.checkpoint.shared import Shared, read_shared
from effconvert.errors import ModelError
from effconvert.families import EXPERTS_KEYS, KNOWN, Family
from effconvert.options import shown

KIND, CLASS = "effconvert_", "Effconvert"  # prefixes of the model_type and of class names
OWN = "effconvert."  # prefix of a technique's own tensors, in the module of its place
STUB_FILE = "modeling_effconvert.py"
STUB = '''"""This {kind} has parts of effconvert in it: `pip install effconvert`, then `import effconvert`, or trust_remote_code=True."""

import effconvert.modeling


def __getattr__(name):
    return getattr(effconvert.modeling, name)
'''
AUTO = {"AutoModelForCausalLM": "lm", "AutoModelForMaskedLM": "lm", "AutoModelForSeq2SeqLM": "lm", "AutoModel": "base"}  # transformers' class -> the family's


@dataclass(frozen=True)
class Replaced:
    """A technique in some layers, or outside them; config.json has a list of these."""

    technique: str  # its command
    options: Mapping[str, Any]
    place: str  # where it runs: scores, attention, ffn, layer, or a part such as q; outside the layers embed or head
    layers: tuple[int, ...]  # none outside the layers
    drops: tuple[str, ...] = ()  # parts that are no longer there


# Each place, and the places inside it. Where the whole is replaced, nothing inside can be.
INSIDE: Mapping[str, tuple[str, ...]] = {
    "layer": ("attention", "ffn", "scores", "q", "k", "v", "o", "gate", "up", "down"),
    "attention": ("scores", "q", "k", "v", "o"),
    "ffn": ("gate", "up", "down"),
}
DEEPEST = 10_000  # layers, or experts
SKIPS = {"attention": "attention", "mlp": "ffn"}  # words of transformers' `per_layer_config` -> places that a layer skips
PLACES = (*INSIDE, "scores", "q", "k", "v", "o", "gate", "up", "down")
OUTSIDE = ("embed", "head")  # places outside the layers


def overlap(place: str, other: str) -> bool:
    """Whether two places overlap, so that only one technique can run there."""
    return place == other or other in INSIDE.get(place, ()) or place in INSIDE.get(other, ())


def encode(raw: Mapping[str, Any], family: Family, replaced: tuple[Replaced, ...] = (), shared: tuple[Shared, ...] = ()) -> dict[str, Any]:
    """Return config.json of the model `raw` with the records `replaced` and `shared`, and with KV heads shared as in `family`."""
    grouped, skips = family.shares_kv_in_our_class, skipped(raw, family)
    shared = () if family.groups_key else shared  # its own class stores layers once
    halved = bool(family.decoder_layers and raw.get(DECODER_SKIPS))
    if not (replaced or shared or grouped or skips or halved):
        return dict(raw)
    count = raw.get(family.layers_key, family.defaults.get(family.layers_key))
    original = raw.get("layer_types")
    names = [f"{KIND}gqa"] * count if grouped else [f"{KIND}skip"] * count if halved else list(original or ["full_attention"] * count)
    for record in replaced:
        names = [f"{KIND}{record.technique}"] * count if record.place in OUTSIDE else names  # so that stock classes refuse the model
    for index in skips:
        names[index] = f"{KIND}skip"
    for common in shared:
        for index in common.layers:
            names[index] = f"{KIND}shared"
    for record in replaced:
        for index in record.layers:
            names[index] = f"{KIND}{record.technique}"
    module = STUB_FILE.removesuffix(".py")
    with_head = "AutoModelForCausalLM" if family.decoder else "AutoModelForSeq2SeqLM" if family.decoder_layers else "AutoModelForMaskedLM"
    classes = {auto: f"{module}.{CLASS}{getattr(family, AUTO[auto])}" for auto in (with_head, "AutoModel")}
    block: dict[str, Any] = {"replaced": _plain(replaced), "layer_types": original}
    block |= {"shared": _plain(shared)} if shared else {}
    block |= {"grouped": True} if grouped else {}
    return {
        **raw,
        family.layers_key: count,
        "model_type": KIND + str(raw["model_type"]),
        "architectures": [CLASS + name for name in raw.get("architectures") or [family.lm]],
        "auto_map": {"AutoConfig": f"{module}.{CLASS}{family.base.removesuffix('Model')}Config", **classes},
        "layer_types": names,
        "effconvert": block,
    }


def _plain(records: Iterable[Replaced | Shared]) -> list[dict[str, Any]]:
    return [{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(record).items()} for record in records]


def read(content: Mapping[str, Any]) -> tuple[dict[str, Any], Family, tuple[Replaced, ...], tuple[Shared, ...]]:
    """Read a config.json with a `model_type` of effconvert.

    Raises:
        ModelError: its records are missing or make no sense.
    """
    raw, family, replaced, shared = decode(content)
    if not (replaced or shared or family.shares_kv_in_our_class or skipped(raw, family) or (family.decoder_layers and raw.get(DECODER_SKIPS))):
        raise ModelError(f"config.json is of a {content['model_type']} and has no record of what differs; take the file that effconvert wrote")
    return raw, family, replaced, shared


def decode(content: Mapping[str, Any]) -> tuple[dict[str, Any], Family, tuple[Replaced, ...], tuple[Shared, ...]]:
    """Undo `encode`: the config of the model without replacements, its family, and the records.

    Raises:
        ModelError: the records make no sense.
    """
    block = content.get("effconvert")
    kind = str(content["model_type"]).removeprefix(KIND)
    family = KNOWN[kind].of(content)
    check_depth(content, family)
    if block is None:
        return {**content, "model_type": kind}, family, (), ()
    if isinstance(block, Mapping) and "mixers" in block:
        raise ModelError(
            "effconvert 0.1.0 wrote this model, and names have changed since; make it anew from the recipe in its folder: effconvert run effconvert.yaml -o DIR"
        )
    try:
        if block.get("grouped"):
            family = family.grouped
            if content[family.heads_key] % content[family.kv_heads_key]:
                raise ValueError(f"{content[family.kv_heads_key]} KV heads cannot be shared by {content[family.heads_key]}")
        replaced = tuple(_record(entry) for entry in block["replaced"])
        _check(replaced, content[family.layers_key], skipped(content, family))
        if not all(isinstance(name, str) for name in content.get("architectures") or ()):
            raise ValueError(f"architectures are {content['architectures']}, and no names")
        shared = read_shared(block.get("shared", ()), content[family.layers_key])
    except Exception as error:  # any error, since somebody may have edited the file
        message = f"config.json says effconvert = {shown(block)}, which makes no sense ({error})"
        raise ModelError(f"{message}; take the file that effconvert wrote") from None
    raw = {key: value for key, value in content.items() if key not in ("effconvert", "auto_map", "layer_types")}
    if block.get("layer_types") is not None:
        raw["layer_types"] = block["layer_types"]
    raw["model_type"] = kind
    if raw.get("architectures"):
        raw["architectures"] = [name.removeprefix(CLASS) for name in raw["architectures"]]
    return raw, family, replaced, shared


def check_depth(raw: Mapping[str, Any], family: Family) -> None:
    """Refuse more layers or experts than any model has. Their number sets the length of lists, and the file comes from somebody else.

    Raises:
        ModelError: there are more.
    """
    for key in (family.layers_key, *(EXPERTS_KEYS if family.experts_key else ())):
        if isinstance(count := raw.get(key), int | float) and count > DEEPEST:
            raise ModelError(f"config.json says {key} = {shown(count)}, and no model has more than {DEEPEST}; mend the file")


def skipped(raw: Mapping[str, Any], family: Family) -> dict[int, set[str]]:
    """Return the places (attention, ffn) that layers skip, for layers that skip any.

    Raises:
        ModelError: `per_layer_config` makes no sense.
    """
    skips: dict[int, set[str]] = {}
    try:
        for layer, entry in by_layer(raw).items():
            words = entry.get("skip") or []
            if not isinstance(words, list) or not 0 <= layer < raw[family.layers_key]:
                raise ValueError(f"of layer {layer}")
            if words:
                skips[layer] = {SKIPS[word] for word in words}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"config.json says per_layer_config = {shown(raw.get('per_layer_config'))}, which makes no sense ({error})"
        raise ModelError(f"{message}; layers of this model can skip {' and '.join(SKIPS)}: mend the file") from None
    return skips


def by_layer(raw: Mapping[str, Any]) -> dict[int, Any]:
    """Return what config.json says of single layers: transformers writes their numbers with zeros before them."""
    return {int(layer): entry for layer, entry in (raw.get("per_layer_config") or {}).items()}


def _record(entry: Mapping[str, Any]) -> Replaced:
    record = Replaced(**{**entry, "layers": tuple(entry["layers"]), "drops": tuple(entry.get("drops", ()))})
    if not isinstance(record.technique, str):
        raise ValueError(f"{record.technique} is no name of a technique")
    if not isinstance(record.options, Mapping) or not all(isinstance(option, str) for option in record.options):
        raise ValueError(f"the options of {record.technique} are no options")
    if record.place not in (*PLACES, *OUTSIDE):
        raise ValueError(f"there is no place {record.place!r}; there are {', '.join((*PLACES, *OUTSIDE))}")
    if record.place in OUTSIDE and record.layers:
        raise ValueError(f"{record.place} is outside the layers, and {record.technique} is in layers")
    return record


def _check(replaced: tuple[Replaced, ...], layers: int, skips: Mapping[int, set[str]]) -> None:
    """Refuse layers that do not exist, techniques at places that a layer skips, and two at one place."""
    taken: dict[int, list[str]] = {}
    outside = [record.place for record in replaced if record.place in OUTSIDE]
    if both := [place for place in OUTSIDE if outside.count(place) > 1]:
        raise ValueError(f"there are two techniques for {both[0]}")
    for record in replaced:
        for index in record.layers:
            if type(index) is not int or not 0 <= index < layers:
                raise ValueError(f"there is no layer {index}")
            if gone := [place for place in skips.get(index, ()) if overlap(place, record.place)]:
                raise ValueError(f"layer {index} skips {gone[0]}, where {record.technique} should run")
            if both := [place for place in taken.get(index, ()) if overlap(place, record.place)]:
                raise ValueError(f"layer {index} has two techniques for {record.place} and {both[0]}")
            taken.setdefault(index, []).append(record.place)
