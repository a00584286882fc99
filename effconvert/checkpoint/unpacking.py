"""Unpack a GGUF file into a folder of safetensors, or say what transformers would lose of it."""

import hashlib
import math
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from glob import escape
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import Tensor

from effconvert.checkpoint.config import CONFIG
from effconvert.errors import EffconvertError, ModelError
from effconvert.quiet import quiet_transformers

VERSION = 2  # of what is unpacked: folders of other versions in the cache are not taken
HEAD = "output.weight"
FACTORS = "rope_freqs.weight"  # what each frequency of RoPE is divided by
LLAMA_3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of all Llama 3.1 and later
BLOCK = re.compile(r"blk\.(\d+)\.")


def unpack_gguf(path: Path, place: Path) -> Path:
    """Return a folder in `place` with the model of a GGUF file in bfloat16, kept there for the next time.

    The numbers are the dequantised ones; the loss of quantisation remains. Needs the whole model in memory, in float32.

    Raises:
        ModelError: the file is damaged or one of several, or has what transformers would leave out.
    """
    status = path.stat()
    key = hashlib.sha256(f"{VERSION} {path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = place / f"{path.stem}-{key}"
    if (folder / CONFIG).is_file():
        return folder
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if (folder / CONFIG).is_file():  # another process unpacked it meanwhile
            return folder
        for left in place.glob(f"{escape(folder.name)}.*"):  # by an unpacking that was killed
            shutil.rmtree(left, ignore_errors=True)
        with quiet_transformers(), TemporaryDirectory(dir=place, prefix=f"{folder.name}.") as scratch:
            draft = Path(scratch) / "model"
            model, tokenizer = _read(path, Path(scratch))
            model.to(torch.bfloat16).save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            try:
                draft.rename(folder)
            except OSError as error:
                if not (folder / CONFIG).is_file():  # else another process unpacked it meanwhile, and that stays
                    raise EffconvertError(f"{path} was unpacked, and {folder} is in the way ({error.strerror}); remove that, and repeat the command") from None
    return folder


def _read(path: Path, scratch: Path) -> tuple[Any, Any]:
    """Return the model in float32, and its tokenizer."""
    from gguf import GGUFReader

    alone = scratch / "alone"  # transformers would take an adapter, a tokenizer and more from the files beside it
    alone.mkdir()
    (alone / path.name).symlink_to(path.resolve())
    hidden = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())  # a progress bar only on a terminal
    try:
        file = GGUFReader(path)
        if (parts := _field(file, "split.count")) and parts > 1:
            raise ModelError(f"{path} is one of {parts} parts of a model; join them into one file first (llama-gguf-split --merge)")
        with hidden:
            model, read = transformers.AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=path.name, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True), output_loading_info=True
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
        repair_digits(tokenizer, file)
        check_complete(path, file, model, sorted(read["missing_keys"]))
        restore_rope(path, file, model.config)
        restore_scale(model.config)
    except ModelError:
        raise
    except Exception as error:  # a damaged file raises anything: struct.error, a bare Exception, ...
        raise ModelError(f"{path} cannot be unpacked by transformers {transformers.__version__}: {error}") from error
    return model, tokenizer


def _field(file: Any, name: str) -> Any:
    field = file.fields.get(name)
    return None if field is None else field.contents()


def check_complete(path: Path, file: Any, model: Any, missing: Sequence[str]) -> None:
    """Refuse a file that has fewer numbers than the model, which transformers would fill with random ones, or more, which it would drop."""
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise ModelError(
            f"{path} has no tensors for {missing[0]}{more}; it is damaged, a part of a model, or of a kind that transformers {transformers.__version__} "
            "does not read; take a whole file, or the model's safetensors"
        )
    layers = model.config.get_text_config().num_hidden_layers
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    own = [tensor for tensor in file.tensors if not tensor.name.startswith("rope_") and not (tied and tensor.name == HEAD)]
    own = [tensor for tensor in own if not ((block := BLOCK.match(tensor.name)) and int(block[1]) >= layers)]  # those predict several tokens at once
    stored = sum(math.prod(map(int, tensor.shape)) for tensor in own)
    taken = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if stored > taken:
        raise ModelError(
            f"{path} has {stored - taken:,} numbers that transformers {transformers.__version__} does not read into a {type(model).__name__} "
            "(often biases or norms); take the model's safetensors"
        )


def restore_rope(path: Path, file: Any, config: Any) -> None:
    """Write into the config what transformers does not read of RoPE from most GGUF files: its base, and how it is scaled.

    Raises:
        ModelError: the scaling is of a kind that is not restored here.
    """
    text, architecture = config.get_text_config(), _field(file, "general.architecture")
    every = getattr(text, "rope_parameters", None)
    if not isinstance(every, dict):
        return
    rope = every.get("full_attention", every)  # layers with a window have RoPE of their own, which is never scaled
    if base := _field(file, f"{architecture}.rope.freq_base"):
        rope["rope_theta"] = float(base)
    if rope.get("rope_type", "default") != "default":
        return
    kind, factor = _field(file, f"{architecture}.rope.scaling.type"), _field(file, f"{architecture}.rope.scaling.factor")
    if old := _field(file, f"{architecture}.rope.scale_linear"):  # as files of 2023 have it
        kind, factor = "linear", old
    factors = next((torch.from_numpy(tensor.data.copy()).float() for tensor in file.tensors if tensor.name == FACTORS), None)
    if factors is not None and not bool((factors == 1).all()):
        scaling = {"factor": float(factors.max()), **LLAMA_3}
        kind = FACTORS
        if torch.allclose(factors, _llama3_factors(2 * len(factors), rope["rope_theta"], **scaling), rtol=1e-3):
            kind = "llama3"
            rope.update({"rope_type": kind, **scaling})
    elif any(tensor.name.startswith("rope_factors_") for tensor in file.tensors):
        kind = "longrope"
    elif kind == "linear" and factor:
        rope.update({"rope_type": kind, "factor": float(factor)})
    if kind not in (None, "none", rope.get("rope_type")):
        raise ModelError(f"{path} scales RoPE ({kind}), which transformers {transformers.__version__} does not read from it; take the model's safetensors")


def restore_scale(config: Any) -> None:
    """Write into the config of a large Gemma by what its scores are divided, which no GGUF file says: llama.cpp knows it by the size of the model."""
    text = config.get_text_config()
    if (scale := getattr(text, "query_pre_attn_scalar", None)) and text.head_dim != scale:
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads


def _llama3_factors(dims: int, theta: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_position_embeddings: int) -> Tensor:
    """Return what Llama 3.1 divides each frequency by, [dims / 2]: 1 for short waves, `factor` for long ones, and between them what lies between."""
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, dims, 2) / dims)
    kept = ((original_max_position_embeddings / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return 1 / ((1 - kept) / factor + kept)


def repair_digits(tokenizer: Any, file: Any) -> None:
    """Restore the digit-by-digit split of SmolLM's tokenizer: transformers' GGUF converter drops it, llama.cpp keeps it."""
    from tokenizers import pre_tokenizers

    if _field(file, "tokenizer.ggml.pre") == "smollm":
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
