"""Load a checkpoint with transformers, strictly: no tensor missing or mismatched, and no code from the checkpoint is run."""

from pathlib import Path
from typing import Any, Protocol

import torch

from effconvert.checkpoint.sources import without_adapter
from effconvert.errors import ModelError
from effconvert.quiet import quiet_transformers

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


class Loadable(Protocol):
    """What loading asks about a model, of a known family or an unknown one."""

    @property
    def architecture(self) -> str:
        """The class that it was saved from."""

    @property
    def needs_effconvert(self) -> bool:
        """Whether that is a class of effconvert."""

    @property
    def predicts(self) -> bool:
        """Whether it has the head that predicts tokens."""

    @property
    def bare(self) -> bool:
        """Whether it was saved without any head."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether it has an encoder and a decoder."""

    @property
    def needs_eager(self) -> bool:
        """Whether its class computes what it should in eager attention alone."""


def load(folder: Path, config: Loadable, dtype: torch.dtype, device: str | None = None) -> Any:
    """Load `folder` with the class that its config names, of transformers or effconvert, onto `device` or this machine's accelerator.

    An adapter that lies beside the weights is left out, whether peft is installed or not.

    Raises:
        ModelError: a tensor is missing or of the wrong shape, or transformers refuses it.
    """
    import transformers

    stock = f"{config.architecture} of transformers {transformers.__version__}"
    eager = {"attn_implementation": "eager"} if config.needs_eager else {}  # transformers before 5.21 used sdpa, which ignores caps
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        with quiet_transformers(), without_adapter(folder) as place:
            model, info = class_of(config).from_pretrained(place, dtype=dtype, output_loading_info=True, local_files_only=True, **eager)
            model = model.to(device or accelerator or "cpu").eval()
    except Exception as error:  # classes raise anything over a strange config or a full device
        raise ModelError(f"{stock} cannot load {folder} ({type(error).__name__}: {error})") from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if wrong:
        message = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ModelError(f"{stock} does not find all tensors in {folder} ({message})")
    return model


def measurable(model: Any, config: Loadable) -> Any:
    """Return the module that is run in measurements: the model if it gives logits of tokens, else the base model below its head.

    One with an encoder and a decoder that is given a text alone reads it as its source, and predicts it.
    """
    module = model if config.predicts or config.bare else model.base_model
    if config.encoder_decoder:
        module.register_forward_pre_hook(_predict_source, with_kwargs=True)
    return module


def _predict_source(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if any(name in kwargs for name in ("decoder_input_ids", "labels", "encoder_outputs")) or len(args) != 1:
        return args, kwargs
    known = (model.config.decoder_start_token_id, model.config.eos_token_id, model.config.bos_token_id)
    start = args[0].new_full((len(args[0]), 1), next((token for token in known if isinstance(token, int)), 0))
    return args, {**kwargs, "decoder_input_ids": torch.cat([start, args[0][:, :-1]], 1)}


def class_of(config: Loadable) -> Any:
    """Return the class that loads a checkpoint with this config."""
    import transformers

    if not config.needs_effconvert:
        return getattr(transformers, config.architecture)
    from effconvert.modeling.model import model_class

    return model_class(config.architecture)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in `folder`."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder`.

    Raises:
        ModelError: it is damaged, or needs to run code from the folder.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged file, or one that needs code: json's errors, tokenizers' bare Exception, ValueError, ...
        raise ModelError(f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error}); mend it") from error
