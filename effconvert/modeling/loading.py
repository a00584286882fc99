"""Load a checkpoint as stock transformers does, and hold it to what its config says: nothing missing, nothing left over, no code of its own run."""

from pathlib import Path
from typing import Any

import torch

from effconvert.checkpoint.config import Config
from effconvert.errors import ModelError
from effconvert.quiet import quiet_transformers

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def load(folder: Path, config: Config, dtype: torch.dtype, device: str | None = None) -> Any:
    """Load `folder` with the class of transformers that its config names, onto `device` or this machine's accelerator; with ours if it has mixers.

    Raises:
        ModelError: a tensor is missing or of the wrong shape, or transformers refuses it.
    """
    import transformers

    stock = f"{config.architecture} of transformers {transformers.__version__}"
    capped = {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}  # before 5.21 transformers took sdpa, which leaves caps out
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        with quiet_transformers():
            model, info = class_of(config).from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True, **capped)
            model = model.to(device or accelerator or "cpu").eval()
    except Exception as error:  # whatever a class of somebody else's raises over a strange config or a full device
        raise ModelError(f"{stock} cannot load {folder} ({type(error).__name__}: {error})") from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if wrong:
        told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ModelError(f"{stock} does not find in {folder} what it needs ({told})")
    return model


def measured(model: Any, config: Config) -> Any:
    """Return what of a model is run where it is measured: all of it where it gives logits of tokens, else what is below its head."""
    return model if config.predicts or config.architecture == config.family.base else model.base_model


def class_of(config: Config) -> Any:
    """Return the class that a checkpoint with this config is loaded with."""
    import transformers

    if not config.needs_effconvert:
        return getattr(transformers, config.architecture)
    from effconvert.modeling.model import model_class

    return model_class(config.architecture)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in `folder`."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder`.

    Raises:
        ModelError: it is damaged, or would have to run code of its own.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of a damaged file, or of code that would have to run: json's, tokenizers' bare Exception, ValueError, ...
        raise ModelError(f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error}); mend it") from error
