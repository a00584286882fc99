"""Find, identify and load a model to measure."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from effconvert.checkpoint import sources
from effconvert.checkpoint.belonging import ADAPTER
from effconvert.checkpoint.checkpoint import Checkpoint
from effconvert.checkpoint.config import Config
from effconvert.checkpoint.digest import digest
from effconvert.checkpoint.shards import ITEMSIZE
from effconvert.errors import EffconvertError, OptionError, UnknownLayoutError
from effconvert.eval.results import ShapedSubject, Subject
from effconvert.kernels.choice import runs_triton
from effconvert.modeling.caches import caches, mixer_of, state_bytes
from effconvert.modeling.loading import load, measurable
from effconvert.modeling.size import size_of
from effconvert.modeling.stock import open_as_stock
from effconvert.modeling.unknown import Described, Unknown, describe, look
from effconvert.paths import expand


@dataclass(frozen=True)
class Opened:
    """A checked model on disk."""

    subject: Subject
    checkpoint: Checkpoint | Unknown
    config: Config | Described

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.checkpoint.folder

    @property
    def known(self) -> Config | None:
        """The config with the family's row; None where effconvert does not know the layout."""
        return self.config if isinstance(self.config, Config) else None

    @property
    def notes(self) -> list[str]:
        """What of the folder is not measured."""
        beside = f"{self.subject.name}: {ADAPTER} lies beside its weights, and they are measured without that adapter"
        return [beside] if (self.folder / ADAPTER).is_file() else []

    @property
    def decoder(self) -> bool:
        """Whether it predicts the next token."""
        return self.config.decoder

    @property
    def role(self) -> str:
        """What it is: a decoder, an encoder, or an encoder-decoder."""
        return self.known.role if self.known else "decoder" if self.decoder else "encoder"

    @property
    def head(self) -> bool:
        """Whether it has a language-model head."""
        return self.config.predicts

    @property
    def width(self) -> int | None:
        """Width of its hidden states, as far as that is known."""
        return self.config.hidden if isinstance(self.config, Config) else self.config.number("hidden_size")


def open_model(model: str, step: Callable[[str], None] = lambda _: None) -> Opened:
    """Find and identify `model`: a folder, a .gguf file or a Hub id, with or without a branch, tag or commit: `org/name@revision`.

    Raises:
        OptionError: there is no such model.
        ModelError: it is damaged, or neither effconvert nor transformers knows its family.
    """
    is_local = expand(model).exists()
    name, _, revision = (model, "", "") if is_local else model.partition("@")
    folder = sources.locate(name, revision or None, step)
    shown = Path(os.path.abspath(expand(model))).name if is_local else model  # a link under its own name
    try:
        checkpoint = open_as_stock(folder)
    except UnknownLayoutError:
        return _of_unknown_layout(look(folder), shown)
    config, size = checkpoint.config, size_of(checkpoint)
    mixers = tuple(_mixer(config, index) for index in range(config.layers))
    subject = ShapedSubject(
        name=shown,
        digest=digest(checkpoint),
        commit=sources.commit(folder),
        kind=config.kind,
        architecture=config.opened_by,
        dtype=str(checkpoint.computing).removeprefix("torch."),
        parameters=size.parameters,
        bytes=size.bytes,
        vocabulary=config.vocabulary,
        longest=config.longest,
        kv_bytes=size.kv_bytes,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        hidden=config.hidden,
        ffn=config.ffn,
        windows=tuple(config.windows()),
        mixers=mixers if any(mixers) else (),
        state_bytes=size.state_bytes,
        growth_bytes=size.growth_bytes,
        cached=tuple(cache.width * ITEMSIZE[checkpoint.dtype] for cache in caches(config)),
    )
    return Opened(subject, checkpoint, config)


def _of_unknown_layout(model: Unknown, shown: str) -> Opened:
    """Identify a model by what transformers says of it."""
    described = describe(model)
    described.check_measurable()
    subject = Subject(
        name=shown,
        digest=digest(model),
        commit=sources.commit(model.folder),
        kind=model.kind,
        architecture=described.architecture,
        dtype=str(model.computing).removeprefix("torch."),
        parameters=described.parameters,
        bytes=model.bytes,
        vocabulary=described.get("vocab_size"),
        longest=described.number("max_position_embeddings"),
    )
    return Opened(subject, model, described)


def _mixer(config: Config, index: int) -> str:
    """Name the mixer of a layer, "" for softmax attention."""
    record = mixer_of(config, index)
    return "no attention" if "attention" in config.skips(index) else record.technique if record else ""


def pick_device(name: str | None) -> str:
    """Return the named device, or this machine's accelerator, or the CPU.

    Raises:
        OptionError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return str(accelerator or "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        available = "cpu" + (f", {accelerator}" if accelerator else "")
        raise OptionError(f"--device {name} cannot be used here; give one of {available}") from None
    if torch.device(name).type == "meta":
        raise OptionError("--device meta holds no numbers; leave it out")
    return "cpu" if torch.device(name).type == "cpu" else name


def pick_dtype(name: str, opened: Opened) -> torch.dtype:
    """Return the type to compute in; `auto` is that of the weights, or float32 where the class supports no other."""
    return opened.checkpoint.computing if name == "auto" else getattr(torch, name)


def check_kernels(kernels: str, device: str) -> None:
    """Check that what is asked for can run: "auto", "triton" or "reference".

    Raises:
        OptionError: kernels are asked for, by an argument or the environment, and cannot run on the device.
    """
    try:
        runs_triton(torch.device(device), "decode_attention", kernels)
    except ValueError as error:
        raise OptionError(str(error)) from None


def load_model(opened: Opened, dtype: str, device: str, kernels: str = "auto") -> Any:
    """Load a model with the transformers class that it names; decoding steps run as Triton kernels where `kernels` says so.

    Raises:
        OptionError: kernels are asked for, and cannot run here or not in this model.
        EffconvertError: it does not fit into memory.
        ModelError: transformers cannot load it, or a tensor is missing.
    """
    torch_dtype = pick_dtype(dtype, opened)
    states = state_bytes(opened.known, torch_dtype.itemsize) if opened.known else 0
    need = opened.subject.parameters * torch_dtype.itemsize + states
    free = psutil.virtual_memory().available
    if device == "cpu" and need > free:
        raise EffconvertError(f"{opened.subject.name} takes {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; measure it on a larger machine")
    check_kernels(kernels, device)
    from effconvert.modeling.attention import choose  # imports transformers, as loading does
    from effconvert.modeling.experts import choose_experts

    model = load(opened.folder, opened.config, torch_dtype, device)
    try:
        choose(model, kernels)
        choose_experts(model, kernels)
    except ValueError as error:
        raise OptionError(str(error)) from None
    return model


def load_measured(opened: Opened, dtype: str, device: str, kernels: str = "auto") -> Any:
    """Load what of a model is measured: see `load_model`, and `effconvert.modeling.loading.measurable`."""
    return measurable(load_model(opened, dtype, device, kernels), opened.config)
