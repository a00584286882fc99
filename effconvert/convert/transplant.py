"""Plan a transplant: which tensors of a converted model are its base's, and what an instruct model has in their place.

Tensors are compared by their bytes, whatever their names: layers are renumbered where others were dropped, and experts are copies of an FFN.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from effconvert.checkpoint import sources
from effconvert.checkpoint.belonging import TEMPLATES, TOKENIZER, belongs
from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.digest import digest
from effconvert.checkpoint.manifest import read_manifest
from effconvert.checkpoint.shards import CHUNK, StoredTensor
from effconvert.convert.files import other_files
from effconvert.convert.plan import Plan
from effconvert.errors import ModelError, OptionError
from effconvert.heal.transplant import Transplant
from effconvert.paths import expand
from effconvert.progress import Advance, Progress
from effconvert.quantities import count, some
from effconvert.quiet import quiet_transformers
from effconvert.surgery._placed import open_checked

TAKEN = (*TOKENIZER, *TEMPLATES, "generation_config.json")  # files that are the instruct model's
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")  # entries of config.json that are the instruct model's
HARMLESS = {*SPECIAL, "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}  # entries that may differ
# Entries that may not, beside heads and windows, which families write in several entries, some of which say nothing where another is off.
COMPUTES = re.compile(r"rope|rotary|theta|act|eps|cap|scal|tie|norm|bias|mult|expert|causal|group|top_?k|parallel|alibi|clip|attn_config|original_max")
UNUSED = re.compile(r"dropout|^pooler_|^summary_|^classifier_|^initializer")  # entries of training, and of heads for other tasks
Found = Mapping[str, str]  # name of a tensor of the converted model -> name of the base's with the same bytes


def transplanted(plan: Plan, progress: Progress) -> tuple[Plan, dict[str, Any]]:
    """Return the plan with the instruct model's tensors and files in it, and what the manifest says of that.

    Raises:
        OptionError: another step beside it, or a base that the model was not made from.
        ModelError: the models do not belong together, or nothing was kept of the base.
    """
    (options,) = plan.surgeries
    assert isinstance(options, Transplant)
    converted = plan.checkpoint
    base, instruct = (open_checked(sources.locate(model, None, progress.step, to_convert=True)) for model in (options.base, options.instruct))
    remarks = _differences(base, instruct)
    with progress.bar("comparing with the base", _bytes(converted) + _bytes(base), "bytes") as advance:
        counterparts = _counterparts(converted, base, advance)
    remarks += _source(plan, options, base, len(counterparts))
    theirs = {tensor.name: tensor for tensor in instruct.stored}
    shards = {
        name: [replace(target, origin=theirs[counterparts[target.origin.name]]) if target.origin.name in counterparts else target for target in targets]
        for name, targets in plan.shards.items()
    }
    own = {tensor.name: tensor for tensor in converted.stored}
    moved, whole = (sum(math.prod(own[name].shape) for name in names) for names in (counterparts, own))
    left = [name for name in own if name not in counterparts]
    remarks.append(
        f"{len(counterparts)} of {len(own)} tensors, {moved / whole:.1%} of {count(whole)} parameters, are the base's and become those of {options.instruct}"
        + (f"; as they are stay {_summary(left)}" if left else "")
    )
    config = plan.config.with_keys({key: instruct.config.raw[key] for key in SPECIAL if key in instruct.config.raw})
    files = other_files(instruct, instruct.config)
    taken = [name for name in files.files if belongs(name, TAKEN)]
    rest = [name for name in plan.files if not belongs(name, TAKEN)]
    record = {"tensors": len(counterparts), "of": len(own), "parameters": moved, "left": left, "base_sha256": digest(base), "instruct_sha256": digest(instruct)}
    return (
        replace(
            plan,
            config=config,
            shards=shards,
            files=tuple(sorted([*taken, *rest])),
            folders=dict.fromkeys(taken, instruct.folder),
            others=(base.folder, instruct.folder),
            edits={name: text for name, text in {**plan.edits, **files.edits}.items() if name in (taken if name in files.edits else rest)},
            remarks=(*plan.remarks, *remarks),
            trained_on=f"{record['base_sha256']} {record['instruct_sha256']}",
        ),
        {"transplant": record},
    )


def _differences(base: Checkpoint, instruct: Checkpoint) -> list[str]:
    """Refuse models that are not of one architecture, and return remarks on their configs.

    Raises:
        ModelError: families, tensors or what config.json says of the computation differ.
    """
    if base.config.kind != instruct.config.kind:
        raise ModelError(f"--base is a {base.config.kind} and --instruct a {instruct.config.kind}; give a model that was trained on from the base")
    ours, theirs = ({tensor.name: (tensor.dtype, tensor.shape) for tensor in model.stored} for model in (base, instruct))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            descriptions = [f"{where} has {_described(tensors.get(name))}" for where, tensors in (("the base", ours), ("the instruct model", theirs))]
            raise ModelError(f"{name}: {' and '.join(descriptions)}; tensors can only be exchanged where both have the same")
    first, second = (_entries(model.folder) for model in (base, instruct))
    different = sorted(key for key in {**first, **second} if key not in HARMLESS and (first.get(key) or None) != (second.get(key) or None))
    for what, one, other in (
        ("heads", *((config.heads, config.kv_heads, config.head_dim) for config in (base.config, instruct.config))),
        ("windows of their layers", base.config.windows(), instruct.config.windows()),
    ):
        if one != other:
            raise ModelError(
                f"--base and --instruct differ in the {what} ({one} and {other}), so the tensors that stay would not fit; give a model that was trained on "
                "from the base"
            )
    if wrong := [key for key in different if COMPUTES.search(key) and not UNUSED.search(key)]:
        values = f"{wrong[0]} = {first.get(wrong[0])} and {second.get(wrong[0])}"
        raise ModelError(f"config.json of --base and --instruct differ in what is computed ({values}), so the tensors that stay would not fit")
    return [f"config.json of base and instruct model differ in {some(different)}, and the output keeps what the converted model has"] if different else []


def _entries(folder: Path) -> dict[str, Any]:
    """Return a config as transformers reads it, with one spelling of each entry."""
    from transformers import AutoConfig

    with quiet_transformers():
        entries: dict[str, Any] = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).to_dict()
    return entries


def _described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "none of that name" if tensor is None else f"{tensor[0]} of {' x '.join(map(str, tensor[1]))}"


def _source(plan: Plan, options: Transplant, base: Checkpoint, kept: int) -> list[str]:
    """Refuse a base of which nothing was kept, or that effconvert.json does not name, unless most tensors are its own; return remarks.

    Raises:
        OptionError: another model was converted.
        ModelError: nothing was kept.
    """
    manifest, names = read_manifest(plan.checkpoint.folder), list[str]()
    source = manifest.get("source")
    while isinstance(source, dict):
        names.append(str(source.get("model")))
        source = (source.get("made_by") or {}).get("source")
    named = {Path(name).name.removesuffix(".gguf") for name in names} & {expand(options.base).resolve().name.removesuffix(".gguf"), Path(options.base).name}
    tensors = len([*plan.checkpoint.stored])
    if names and not named and kept < tensors / 2:
        raise OptionError(
            f"{plan.checkpoint.folder} was converted from {' from '.join(names)} by its effconvert.json, and only {kept} of its {tensors} tensors are those of "
            f"--base {options.base}; give the model that it was converted from"
        )
    if not kept:
        raise ModelError(
            f"no tensor of {plan.checkpoint.folder} is that of --base {options.base}: its weights were trained since, or it is of another model; "
            "convert the instruct model itself"
        )
    if not names:
        return [f"{plan.checkpoint.folder} has no effconvert.json, so nothing but its tensors says that it was made from --base"]
    if not named:
        return [f"effconvert.json names {' from '.join(names)} as what it was converted from, by name alone; --base {options.base} has its tensors"]
    return []


def _counterparts(converted: Checkpoint, base: Checkpoint, advance: Advance) -> Found:
    """Find the tensors of the converted model that the base has, by their bytes."""
    shapes = [Counter((tensor.dtype, tensor.shape) for tensor in model.stored) for model in (converted, base)]
    contents: dict[bytes, list[str]] = {}
    for tensor in base.stored:
        if (tensor.dtype, tensor.shape) in shapes[0]:
            contents.setdefault(_content(tensor), []).append(tensor.name)
        advance(tensor.stop - tensor.start)
    same: dict[str, list[str]] = {}
    for tensor in converted.stored:
        if (tensor.dtype, tensor.shape) in shapes[1] and (names := contents.get(_content(tensor))):
            same[tensor.name] = names
        advance(tensor.stop - tensor.start)
    return _chosen(same, _places(converted), _places(base))


def _chosen(same: Mapping[str, list[str]], places: Mapping[str, tuple[int, str]], base: Mapping[str, tuple[int, str]]) -> Found:
    """Choose where the base has several tensors with the same bytes, such as biases of 0: in the layer that the tensors beside it are of."""
    votes: dict[int, Counter[int]] = {}
    for name, names in same.items():
        if name in places and len(names) == 1 and names[0] in base:
            votes.setdefault(places[name][0], Counter())[base[names[0]][0]] += 1
    chosen = {}
    for name, names in same.items():
        layer, inside = places.get(name, (-1, name))
        of_layer = votes[layer].most_common(1)[0][0] if layer in votes else layer
        likely = [other for other in names if base.get(other, (-1, other)) == (of_layer, inside)]
        if likely or len(names) == 1:
            chosen[name] = (likely or names)[0]
    return chosen


def _places(checkpoint: Checkpoint) -> dict[str, tuple[int, str]]:
    """Return the layer of each tensor in one, and its name there."""
    return {tensor.name: (index, inside) for index, layer in reversed([*enumerate(checkpoint.layers)]) for inside, tensor in layer.items()}


def _content(tensor: StoredTensor) -> bytes:
    """Return a hash of a tensor's type, shape and bytes."""
    content = hashlib.blake2b(f"{tensor.dtype} {tensor.shape}".encode())
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        for start in range(tensor.start, tensor.stop, CHUNK):
            content.update(file.read(min(CHUNK, tensor.stop - start)))
    return content.digest()


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.stop - tensor.start for tensor in checkpoint.stored)


def _summary(names: Iterable[str]) -> str:
    """Write names with a number of layers in place of each layer's."""
    kinds = Counter(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in names)
    return some([f"{kind} ({number})" if number > 1 else kind for kind, number in kinds.items()], 8)
