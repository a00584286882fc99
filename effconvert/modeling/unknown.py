"""Models without a row in `families`: what their files and transformers say of them. They can be measured, and not converted."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from effconvert.checkpoint.reading import read_content
from effconvert.checkpoint.shards import FLOATS, StoredTensor
from effconvert.checkpoint.tensors import read_tensors
from effconvert.errors import ModelError
from effconvert.modeling.stock import check_complete, read_by
from effconvert.quiet import quiet_transformers

CAUSAL, MASKED, ENCODER = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTextEncoding"
WITH_IMAGES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")  # they read text alone too


@dataclass(frozen=True)
class Unknown:
    """A folder whose layout effconvert does not know: its config.json and its headers."""

    folder: Path
    raw: Mapping[str, Any]  # config.json
    tensors: Mapping[str, StoredTensor]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Every tensor on disk."""
        return tuple(self.tensors.values())

    @property
    def kind(self) -> str:
        """The `model_type`."""
        return str(self.raw.get("model_type"))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.stop - tensor.start for tensor in self.stored)

    @property
    def types(self) -> dict[str, int]:
        """Numbers on disk by their type (safetensors' code), the most frequent first."""
        counts: Counter[str] = Counter()
        for tensor in self.stored:
            counts[tensor.dtype] += math.prod(tensor.shape)
        return dict(counts.most_common())

    @property
    def computing(self) -> torch.dtype:
        """The type to compute in: that of most floating-point numbers."""
        return next((FLOATS[code] for code in self.types if code in FLOATS), torch.float32)


@dataclass(frozen=True)
class Described:
    """What transformers says of a model that it opens."""

    architecture: str
    config: Any  # of transformers
    classes: Mapping[str, tuple[str, ...]]  # Auto class -> the classes that it loads this family with
    parameters: int  # shared ones count once
    needs_effconvert: bool = False

    @cached_property
    def text(self) -> Any:
        """The config of what reads text."""
        return self.config.get_text_config()

    def get(self, key: str) -> Any:
        """Return a value of the text's config; None where it has none."""
        return getattr(self.text, key, None)

    def number(self, key: str) -> int | None:
        """Return a whole number of the text's config; None where it has none."""
        value = self.get(key)
        return value if type(value) is int and value > 0 else None

    @property
    def decoder(self) -> bool:
        """Whether a token sees only earlier ones."""
        causal = self._is_one_of(CAUSAL, *WITH_IMAGES) or not (self.classes.get(MASKED) or self._is_one_of(ENCODER))
        both_ways = self.get("is_causal") is False or self.get("use_bidirectional_attention") is True
        return causal and not self._is_one_of(MASKED) and not both_ways

    @property
    def predicts(self) -> bool:
        """Whether it has the head that predicts tokens."""
        return self._is_one_of(*([CAUSAL, *WITH_IMAGES] if self.decoder else [MASKED]))

    @property
    def bare(self) -> bool:
        """Whether it was saved without any head."""
        return self._is_one_of("AutoModel", ENCODER)

    @property
    def encoder_decoder(self) -> bool:
        """Never of what can be measured: see `check_measurable`."""
        return bool(self.config.is_encoder_decoder)

    @property
    def needs_eager(self) -> bool:
        """Whether its class computes what it should in eager attention alone: capped scores."""
        return bool(self.get("attn_logit_softcapping"))

    def check_measurable(self) -> None:
        """Refuse a model that neither predicts the next token nor reads texts as an encoder.

        Raises:
            ModelError: the reason.
        """
        if self.config.is_encoder_decoder:
            raise ModelError(
                f"{self.architecture} has an encoder and a decoder, which reads one text and writes another, and nothing here measures that; "
                "give a model that predicts the next token, or masked ones"
            )
        if not self._is_one_of(ENCODER) and not any(self.classes.get(name) for name in (CAUSAL, MASKED, *WITH_IMAGES)):
            raise ModelError(
                f"transformers opens {self.architecture} neither by {CAUSAL} nor by {MASKED}, so it reads no text that could be measured; give a language model"
            )
        if self._is_one_of(CAUSAL) and self.classes.get(MASKED) and not self._is_one_of(MASKED) and not self.get("is_decoder"):
            raise ModelError(
                f"{self.architecture} predicts the next token, and each token sees that, since config.json does not say is_decoder = true; mend the file"
            )
        if self.number("vocab_size") is None:
            raise ModelError(f"config.json of {self.architecture} has no vocab_size, so it reads no tokens; give a language model")

    def _is_one_of(self, *names: str) -> bool:
        return any(self.architecture in self.classes.get(name, ()) for name in names)


def look(folder: Path) -> Unknown:
    """Read the config and the headers of a model of any family.

    Raises:
        OptionError: the folder holds no model.
        ModelError: its files are damaged, or are pickles.
    """
    raw = read_content(folder)
    tensors, _ = read_tensors(folder)
    return Unknown(folder, raw, tensors)


def describe(model: Unknown) -> Described:
    """Ask transformers about a model, by its config and headers alone; no code from its folder is run.

    Raises:
        ModelError: transformers does not open it, or it lacks a tensor.
    """
    import transformers

    from effconvert.modeling.transformers_internals import classes_of

    names = model.raw.get("architectures")
    named = next((name for name in names if hasattr(transformers, str(name))), None) if isinstance(names, list) else None
    by_kind = classes_of(model.kind)
    architecture = named or next((by_kind[auto][0] for auto in (CAUSAL, MASKED, "AutoModel") if auto in by_kind), None)
    if architecture is None:
        own = "; the folder has code of its own for it (auto_map), which is never run here" if model.raw.get("auto_map") else ""
        wanted = f" and no class {names[0]}" if isinstance(names, list) and names else ""
        raise ModelError(f"transformers {transformers.__version__} has no family {model.kind!r}{wanted}{own}; try another version of transformers")

    def build() -> tuple[Any, Any]:
        kind = getattr(transformers, architecture)
        return kind, kind.config_class.from_pretrained(model.folder, local_files_only=True)

    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in model.tensors.items()}
    reading = read_by(f"{architecture} of transformers {transformers.__version__}", build, shapes)
    check_complete(model.folder, None, reading)
    with quiet_transformers():
        config = build()[1]
    return Described(architecture, config, classes_of(type(config).model_type), reading.parameters)
