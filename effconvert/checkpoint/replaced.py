"""How config.json says that a technique runs in place of something: under a `model_type` of its own, so that nobody opens such a model as what it is not.

Records only: a technique's code runs where somebody asks for it (`effconvert.surgery._replacement`). The family's own keys stay as they are but for
`layer_types`, which names what stock classes refuse: they would else leave the replacements out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from effconvert.checkpoint.families import EXPERTS_KEYS, FAMILIES, Family
from effconvert.checkpoint.shared import Shared, read_shared
from effconvert.errors import ModelError
from effconvert.options import shown

KIND, CLASS = "effconvert_", "Effconvert"  # begin the model_type, and the names of classes
OWN = "effconvert."  # begins the names of a technique's own tensors, in the module of its place
STUB_FILE = "modeling_effconvert.py"
STUB = '''"""This {kind} has parts of effconvert in it: `pip install effconvert`, then `import effconvert`, or trust_remote_code=True."""

import effconvert.modeling


def __getattr__(name):
    return getattr(effconvert.modeling, name)
'''
AUTO = {"AutoModelForCausalLM": "lm", "AutoModelForMaskedLM": "lm", "AutoModel": "base"}  # transformers' class -> the family's


@dataclass(frozen=True)
class Replaced:
    """What a technique put into some layers: config.json holds a list of these."""

    technique: str  # its command
    options: Mapping[str, Any]
    place: str  # where it runs: scores, attention, ffn, layer, or a part such as q
    layers: tuple[int, ...]
    drops: tuple[str, ...] = ()  # parts of these layers that are no longer there


# Each place, and the places inside it: what is replaced whole has nothing inside it that could be replaced as well.
INSIDE: Mapping[str, tuple[str, ...]] = {
    "layer": ("attention", "ffn", "scores", "q", "k", "v", "o", "gate", "up", "down"),
    "attention": ("scores", "q", "k", "v", "o"),
    "ffn": ("gate", "up", "down"),
}
DEEPEST = 10_000  # layers, or experts
SKIPS = {"attention": "attention", "mlp": "ffn"}  # what transformers' `per_layer_config` calls a place that a layer skips
PLACES = (*INSIDE, "scores", "q", "k", "v", "o", "gate", "up", "down")


def overlap(place: str, other: str) -> bool:
    """Whether two places share something, so that one technique alone can run there."""
    return place == other or other in INSIDE.get(place, ()) or place in INSIDE.get(other, ())


def encode(raw: Mapping[str, Any], family: Family, replaced: tuple[Replaced, ...] = (), shared: tuple[Shared, ...] = ()) -> dict[str, Any]:
    """Return config.json of the model `raw` with what was `replaced` in its layers, what they have in common, and KV heads shared as in `family`."""
    grouped, skips = family.shares_kv_in_our_class, skipped(raw, family)
    if not (replaced or shared or grouped or skips):
        return dict(raw)
    count = raw[family.layers_key]
    usual = raw.get("layer_types")
    names = [f"{KIND}gqa"] * count if grouped else list(usual or ["full_attention"] * count)
    for index in skips:
        names[index] = f"{KIND}skip"
    for common in shared:
        for index in common.layers:
            names[index] = f"{KIND}shared"
    for record in replaced:
        for index in record.layers:
            names[index] = f"{KIND}{record.technique}"
    module = STUB_FILE.removesuffix(".py")
    heads = ("AutoModelForCausalLM", "AutoModel") if family.decoder else ("AutoModelForMaskedLM", "AutoModel")
    classes = {auto: f"{module}.{CLASS}{getattr(family, AUTO[auto])}" for auto in heads}
    block: dict[str, Any] = {"replaced": _plain(replaced), "layer_types": usual}
    block |= {"shared": _plain(shared)} if shared else {}
    block |= {"grouped": True} if grouped else {}
    return {
        **raw,
        "model_type": KIND + str(raw["model_type"]),
        "architectures": [CLASS + name for name in raw.get("architectures") or [family.lm]],
        "auto_map": {"AutoConfig": f"{module}.{CLASS}{family.base.removesuffix('Model')}Config", **classes},
        "layer_types": names,
        "effconvert": block,
    }


def _plain(records: Iterable[Replaced | Shared]) -> list[dict[str, Any]]:
    return [{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(record).items()} for record in records]


def read(given: Mapping[str, Any]) -> tuple[dict[str, Any], Family, tuple[Replaced, ...], tuple[Shared, ...]]:
    """Read a config.json whose `model_type` says that effconvert wrote it.

    Raises:
        ModelError: its records make no sense, or there are none.
    """
    raw, family, replaced, shared = decode(given)
    if not (replaced or shared or family.shares_kv_in_our_class or skipped(raw, family)):
        raise ModelError(f"config.json is of a {given['model_type']} and says nothing of what was replaced or is skipped; take the file that effconvert wrote")
    return raw, family, replaced, shared


def decode(given: Mapping[str, Any]) -> tuple[dict[str, Any], Family, tuple[Replaced, ...], tuple[Shared, ...]]:
    """Undo `encode`: the config of the model without replacements, its family, and the records.

    Raises:
        ModelError: the records make no sense.
    """
    block = given.get("effconvert")
    kind = str(given["model_type"]).removeprefix(KIND)
    family = FAMILIES[kind]
    check_depth(given, family)
    if block is None:
        return {**given, "model_type": kind}, family, (), ()
    if isinstance(block, Mapping) and "mixers" in block:
        raise ModelError(
            "effconvert 0.1.0 wrote this model, and names have changed since; make it anew from the recipe in its folder: effconvert run effconvert.yaml -o DIR"
        )
    try:
        if block.get("grouped"):
            family = family.grouped
            if given[family.heads_key] % given[family.kv_heads_key]:
                raise ValueError(f"{given[family.kv_heads_key]} KV heads cannot be shared by {given[family.heads_key]}")
        replaced = tuple(_record(entry) for entry in block["replaced"])
        _check(replaced, given[family.layers_key], skipped(given, family))
        if not all(isinstance(name, str) for name in given.get("architectures") or ()):
            raise ValueError(f"architectures are {given['architectures']}, and no names")
        shared = read_shared(block.get("shared", ()), given[family.layers_key])
    except Exception as error:  # whatever Python says to a file that somebody edited
        told = f"config.json says of what was replaced or is shared {shown(block)}, which makes no sense ({error})"
        raise ModelError(f"{told}; take the file that effconvert wrote") from None
    kept = {key: value for key, value in given.items() if key not in ("effconvert", "auto_map", "layer_types")}
    if block.get("layer_types") is not None:
        kept["layer_types"] = block["layer_types"]
    kept["model_type"] = kind
    if kept.get("architectures"):
        kept["architectures"] = [name.removeprefix(CLASS) for name in kept["architectures"]]
    return kept, family, replaced, shared


def check_depth(raw: Mapping[str, Any], family: Family) -> None:
    """Refuse more layers or experts than any model has: lists of as many are made before a tensor is looked at, and the file is somebody else's.

    Raises:
        ModelError: there are.
    """
    for key in (family.layers_key, *(EXPERTS_KEYS if family.experts_key else ())):
        if isinstance(count := raw.get(key), int | float) and count > DEEPEST:
            raise ModelError(f"config.json says {key} = {shown(count)}, and no model has more than {DEEPEST}; mend the file")


def skipped(raw: Mapping[str, Any], family: Family) -> dict[int, set[str]]:
    """Return which places (attention, ffn) the layers of a model skip, of those that skip any.

    Raises:
        ModelError: `per_layer_config` makes no sense.
    """
    found: dict[int, set[str]] = {}
    try:
        for layer, said in by_layer(raw).items():
            words = said.get("skip") or []
            if not isinstance(words, list) or not 0 <= layer < raw[family.layers_key]:
                raise ValueError(f"of layer {layer}")
            if words:
                found[layer] = {SKIPS[word] for word in words}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = f"config.json says per_layer_config = {shown(raw.get('per_layer_config'))}, which makes no sense ({error})"
        raise ModelError(f"{told}; layers of this model can skip {' and '.join(SKIPS)}: mend the file") from None
    return found


def by_layer(raw: Mapping[str, Any]) -> dict[int, Any]:
    """Return what config.json says of single layers: transformers writes their numbers with zeros before them."""
    return {int(layer): said for layer, said in (raw.get("per_layer_config") or {}).items()}


def _record(entry: Mapping[str, Any]) -> Replaced:
    record = Replaced(**{**entry, "layers": tuple(entry["layers"]), "drops": tuple(entry.get("drops", ()))})
    if not isinstance(record.technique, str):
        raise ValueError(f"{record.technique} is no name of a technique")
    if not isinstance(record.options, Mapping) or not all(isinstance(option, str) for option in record.options):
        raise ValueError(f"the options of {record.technique} are no options")
    if record.place not in PLACES:
        raise ValueError(f"there is no place {record.place!r}; there are {', '.join(PLACES)}")
    return record


def _check(replaced: tuple[Replaced, ...], layers: int, skips: Mapping[int, set[str]]) -> None:
    """Refuse layers that are not there, techniques in places that a layer skips, and two where there is room for one."""
    taken: dict[int, list[str]] = {}
    for record in replaced:
        for index in record.layers:
            if type(index) is not int or not 0 <= index < layers:
                raise ValueError(f"there is no layer {index}")
            if gone := [place for place in skips.get(index, ()) if overlap(place, record.place)]:
                raise ValueError(f"layer {index} skips {gone[0]}, where {record.technique} would be")
            if both := [place for place in taken.get(index, ()) if overlap(place, record.place)]:
                raise ValueError(f"layer {index} has two techniques for {record.place} and {both[0]}")
            taken.setdefault(index, []).append(record.place)
