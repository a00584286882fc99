"""The tensors of a folder, by its index and files, under the names that transformers has today."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from effconvert.checkpoint.shards import StoredTensor, read_header
from effconvert.errors import ModelError
from effconvert.families import Family
from effconvert.quantities import some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# A mark in tensor names of anything but plain weights -> what that is, and what to do.
FOREIGN: Mapping[str, str] = {
    "lora_": "a LoRA adapter that was not merged; merge it (PeftModel.merge_and_unload, then save_pretrained)",
    "base_layer.": "a PEFT model that was not merged; merge it (PeftModel.merge_and_unload, then save_pretrained)",
    "base_model.model.": "a PEFT model; merge it (PeftModel.merge_and_unload, then save_pretrained)",
    "_orig_mod.": "a model that torch.compile has wrapped; save the original one (model._orig_mod.save_pretrained)",
    "_fsdp_wrapped_module.": "a model that FSDP has wrapped; save the full state through accelerate (accelerator.get_state_dict)",
    "_checkpoint_wrapped_module.": "a model with wrapped layers; save the original one",
    "absmax": "bitsandbytes quantisation; load it with transformers, model.dequantize(), save_pretrained, or take the original",
    "quant_map": "bitsandbytes quantisation; load it with transformers, model.dequantize(), save_pretrained, or take the original",
    ".SCB": "bitsandbytes quantisation to 8 bits; load it with transformers, model.dequantize(), save_pretrained, or take the original",
    "qweight": "GPTQ or AWQ quantisation; take the checkpoint that it was made from",
    "qzeros": "GPTQ or AWQ quantisation; take the checkpoint that it was made from",
    "g_idx": "GPTQ quantisation; take the checkpoint that it was made from",
    "weight_packed": "compressed-tensors quantisation; take the checkpoint that it was made from",
    "weight_scale_inv": "fp8 quantisation in blocks; take a checkpoint in bfloat16, or load this one with FineGrainedFP8Config(dequantize=True) and save it",
    "weight_scale": "fp8 or int8 quantisation; take the checkpoint that it was made from",
    "input_scale": "fp8 quantisation; take the checkpoint that it was made from",
    "_blocks": "MX quantisation; load it with transformers (Mxfp4Config(dequantize=True)) and save it",
    ".scales": "MLX, GPTQ or AWQ quantisation; take the checkpoint that it was made from",
    ".biases": "MLX quantisation; take the checkpoint that it was made from",
}


def check_plain(folder: Path, name: str) -> None:
    """Refuse a tensor whose name shows that this is no checkpoint of plain weights.

    Raises:
        ModelError: with the kind of checkpoint, and how to get plain weights.
    """
    if name.startswith("module."):
        raise ModelError(f"{folder} holds {name}: a model that DataParallel has wrapped; save the original one (model.module.save_pretrained)")
    for mark, what in FOREIGN.items():
        if mark in name:
            raise ModelError(f"{folder} holds {name}, which is of {what}")


def read_tensors(folder: Path, family: Family | None = None) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return all tensors of `folder`, each shard's in the order of its bytes, and remarks on harmless oddities.

    As in transformers, a single file comes before an index, all tensors of shards are read, and old names become today's (`Family.aliases`).

    Raises:
        ModelError: there are no weights, a file is missing or damaged, or it is not clear which bytes a tensor has.
    """
    files, where = _files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_header(file).items():
            for today, tensor in _today(name, stored, family):
                if first := tensors.get(today):
                    names = f"as {first.name} in {first.file.name} and as {name} in {file.name}" if first.file != file else f"as {first.name} and as {name}"
                    raise ModelError(f"{folder} holds {today} twice, {names}, and loaders differ in which one they take; remove one of the two")
                tensors[today] = tensor
    if where is None:
        return tensors, ()
    on_disk = {tensor.name: tensor for tensor in tensors.values()}
    for name, shard in where.items():
        if name not in on_disk:
            raise ModelError(f"{INDEX} of {folder} says that {name} is in {shard!r}, which does not hold it; fetch both again")
        if on_disk[name].file != folder / shard:
            raise ModelError(f"{INDEX} of {folder} says that {name} is in {shard!r}, and it is in {on_disk[name].file.name!r}; fetch both again")
    unnamed = sorted(on_disk.keys() - where.keys())
    remarks = (f"{some(unnamed)} in its shards, which {INDEX} does not name; transformers reads them all the same, and so does this",) if unnamed else ()
    return tensors, remarks


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files of the weights, and the index as tensor -> file; None for a single file."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    if not index.is_file():
        raise ModelError(_no_weights(folder))
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        where: dict[str, str] = content["weight_map"]
        shards = sorted(set(where.values()))
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise ValueError("no names of shards")
        if not isinstance(content["metadata"], dict):
            raise ValueError("its metadata is no mapping, and transformers needs one")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of shards ({error}); fetch the file again") from None
    for shard in shards:
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard:
            raise ModelError(f"{index} names the shard {shard!r}, which is outside the folder; that is no sound checkpoint")
        if not (folder / path).is_file():
            raise ModelError(f"{index} names the shard {shard!r}, which is missing; fetch it")
    return [folder / shard for shard in shards], where


def _no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    shards = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if shards:
        return f"{folder} has {some(shards)} and no {INDEX} that says which tensors are where; fetch it, or rename a single file to {SINGLE}"
    if pickles:
        return (
            f"{folder} has its weights only as pickle ({pickles[0]}), which can run code when opened; "
            "save it as safetensors first (from_pretrained, then save_pretrained), or take a revision that has them"
        )
    return f"{folder} has a config.json and no weights: neither {SINGLE} nor {INDEX} is there; fetch them"


def _today(name: str, tensor: StoredTensor, family: Family | None) -> Iterator[tuple[str, StoredTensor]]:
    """Yield today's name of a tensor, as in the row of its family, and the tensor; names and parts where it is fused of several."""
    for old, new in {**OLD_NAMES, **(family.aliases if family else {})}.items():
        name = name.replace(old, new)
    for old, modules in family.fused.items() if family else ():
        if old in name and tensor.shape and tensor.shape[0] % len(modules) == 0:
            yield from ((name.replace(old, module), tensor.rows(index, len(modules))) for index, module in enumerate(modules))
            return
    yield name, tensor


OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of models from TensorFlow
