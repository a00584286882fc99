"""Verify a conversion: reload it from disk in transformers, run it, and measure it beside the original."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from effconvert.checkpoint.shards import FLOATS, read_header
from effconvert.convert import exact
from effconvert.convert.plan import Plan
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality import perplexity
from effconvert.eval.quality.perplexity import LogitsFile
from effconvert.eval.quality.text import Text
from effconvert.eval.verification import Side, Verification
from effconvert.modeling import loading
from effconvert.modeling.caches import growth_bytes, state_bytes
from effconvert.modeling.precision import type_on
from effconvert.options import RunOptions
from effconvert.progress import Advance, Progress
from effconvert.quiet import quiet_transformers
from effconvert.surgery._placed import open_checked

LIBRARIES = 330_000_000  # bytes; measured on SmolLM2 beyond the sizes below: 0.32 GB in float32, 0.03 GB in bfloat16
PROMPT = 24  # tokens of the prompt, and of its continuation


@dataclass(frozen=True)
class Material:
    """The inputs of both models."""

    tokenizer: Any
    windows: Tensor  # token ids, [N, T]
    text: str
    unmeasured: str  # why no quality can be measured; empty where it can
    dtype: torch.dtype = torch.float32  # type to run both models in
    memory: int = 0  # bytes that verification takes
    texts: tuple[Tensor, ...] = ()  # token ids [T] for checking an exact conversion, beside the beginning of the first window


def prepare(plan: Plan, text: Text, options: RunOptions) -> Material:
    """Prepare the tokens to measure on, before anything is written.

    Raises:
        OptionError: the text is too short, or there is not enough memory.
        ModelError: the tokenizer is damaged or does not belong to the model.
    """
    config = plan.checkpoint.config
    material = _material(plan, text, min(options.context, config.longest or options.context), options.tokens)
    window = material.windows.shape[1]
    material = replace(material, dtype=(dtype := _dtype(plan, window)), memory=_memory(plan, window, dtype))
    if not plan.is_exact:
        return material
    return replace(material, texts=tuple(exact.texts(config, options.tokens, psutil.virtual_memory().available - material.memory)))


def _material(plan: Plan, text: Text, context: int, tokens: int) -> Material:
    config, folder = plan.checkpoint.config, plan.checkpoint.folder
    random = torch.randint(config.vocabulary, (1, min(context, 2 * PROMPT)), generator=torch.Generator().manual_seed(0))
    if not config.decoder:
        why = "an encoder-decoder; effconvert eval measures targets given sources" if config.encoder_decoder else "an encoder and predicts no next token"
        return Material(None, random, text.name, f"{config.kind} is {why}")
    if not config.predicts:
        return Material(None, random, text.name, f"{config.architecture} has no language-model head")
    if not loading.has_tokenizer(folder):
        return Material(None, random, text.name, "the model has no tokenizer")
    try:
        tokenizer = loading.load_tokenizer(folder)
    except ModelError as error:
        raise ModelError(f"{error}, or use --no-verify") from error
    return Material(tokenizer, perplexity.windows(tokenizer, text, context, tokens, config.vocabulary), text.name, "")


def scratch_bytes(plan: Plan, material: Material) -> int:
    """Return the disk that the original's logits take while the two models are compared."""
    return 0 if material.unmeasured else material.windows.numel() * plan.config.vocabulary * material.dtype.itemsize


def _dtype(plan: Plan, context: int) -> torch.dtype:
    """Return the type to run both models in: float32 if the conversion is exact, one of them needs it, or the CPU is faster in it and it fits; else theirs."""
    if plan.is_exact or plan.config.family.float32_only:
        return torch.float32
    own = plan.checkpoint.computing
    faster = type_on(None, own, max(plan.before.parameters, plan.after.parameters))
    rest, token = _bytes(plan, faster)
    return faster if rest + context * token <= psutil.virtual_memory().available else own


def _bytes(plan: Plan, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of memory that verification takes beside logits, and those of the logits of each token of a window."""
    states = state_bytes(plan.config, dtype.itemsize)
    states += 2 * states // plan.config.layers  # a layer's state beside the new tokens, and once more when it is sliced
    weights = max(plan.before.parameters, plan.after.parameters) * dtype.itemsize + states
    # Beside that the libraries. Pages mapped from files can be dropped and do not count.
    return weights + plan.peak + LIBRARIES, 2 * plan.config.vocabulary * dtype.itemsize  # logits, twice


def _memory(plan: Plan, context: int, dtype: torch.dtype) -> int:
    """Return the bytes of memory that verification takes with windows of `context` tokens.

    Raises:
        OptionError: that much is not free.
    """
    rest, token = _bytes(plan, dtype)
    size, free = rest + context * token, psutil.virtual_memory().available
    if size <= free:
        return size
    if (fits := (free - rest) // token) >= PROMPT:
        raise OptionError(
            f"verification takes {size / 1e9:.1f} GB with windows of {context} tokens, and {free / 1e9:.1f} GB are free; "
            f"give --context {1 << fits.bit_length() - 1}"  # a power of two below, as what is free changes
        )
    raise OptionError(
        f"verification loads the model whole, which takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
        "use --no-verify here (writing takes one layer at a time), and measure on a larger machine"
    )


def check_finite(folder: Path, plan: Plan, advance: Advance) -> None:
    """Check every written number; `advance` counts the bytes that were checked.

    Raises:
        ModelError: one is NaN or infinite; its tensor is named.
    """
    for shard in plan.shards:
        for tensor in read_header(folder / shard).values():
            if tensor.dtype in FLOATS:
                tensor.read("cpu")
            advance(tensor.stop - tensor.start)


def verify(plan: Plan, folder: Path, material: Material, scratch: Path, progress: Progress) -> Verification:
    """Reload the model in `folder` and compare it with its original.

    Raises:
        ModelError: it does not load, computes NaN, or differs from the plan.
    """
    try:
        with quiet_transformers():
            with progress.bar("checking every number", plan.after.bytes, "bytes") as advance:
                check_finite(folder, plan, advance)
            open_checked(folder)  # as the next command will
            count = material.windows.numel() + sum(map(len, material.texts))
            with progress.bar("measuring the original", count, "tokens") as advance:
                original = _run(plan, plan.checkpoint.folder, material, advance, record=scratch)
            with progress.bar("measuring the converted model", count, "tokens") as advance:
                recorded = LogitsFile(scratch, material.dtype, plan.checkpoint.config.vocabulary)
                converted = _run(plan, folder, material, advance, reference=recorded)
    finally:
        scratch.unlink(missing_ok=True)
    if original.sees_later != converted.sees_later:
        bidirectional, causal = ("the original", "the converted model")[:: 1 if original.sees_later else -1]
        raise ModelError(f"tokens see later ones in {bidirectional}, and not in {causal}: the technique does not fit such attention, please report it")
    _check(plan.before, original.side, "the original")
    _check(plan.after, converted.side, "the converted model")
    texts = [_beginning(material), *material.texts]
    difference, compared = exact.compare(texts, original.logits, converted.logits) if plan.is_exact else (None, 0)
    dtype = str(material.dtype).removeprefix("torch.")
    return Verification(original.side, converted.side, difference, material.text, dtype, original.device, material.unmeasured, compared)


@dataclass(frozen=True)
class Run:
    """The results of one of the two models."""

    side: Side
    logits: list[Tensor]  # of each text, [places, V]
    sees_later: bool  # whether tokens see later ones
    device: str


def _run(plan: Plan, folder: Path, material: Material, advance: Advance, record: Path | None = None, reference: LogitsFile | None = None) -> Run:
    config = plan.config if folder != plan.checkpoint.folder else plan.checkpoint.config
    whole, windows, has_quality = loading.load(folder, config, material.dtype), material.windows, not material.unmeasured
    model = loading.measurable(whole, config)
    parameters = sum(parameter.numel() for name, parameter in whole.named_parameters() if not config.family.is_buffer(name))
    prompt = windows[0, :PROMPT]
    logits = [perplexity.logits_of(model, _beginning(material)).float().cpu(), *exact.logits(model, material.texts, config.decoder, advance)]
    quality = perplexity.summary(perplexity.measure(model, list(windows), record, reference, advance), windows.shape[1]) if has_quality else None
    continuation = perplexity.continuation(model, material.tokenizer, prompt, PROMPT) if has_quality else ""
    cache = state = 0
    if plan.config.decoder:
        spans = [window - 1 for window in config.windows() if window]
        short = prompt[: max(1, min([len(prompt), *spans]))]  # before any window is full
        itemsize = FLOATS[plan.checkpoint.dtype].itemsize
        growing, _ = perplexity.kv_bytes(model, short)
        for tokens in (short, windows[0]) if config.replaced else ():  # a state may grow, and not with each token
            _, actual = perplexity.kv_bytes(model, tokens)
            if actual != (planned := state_bytes(config, model.dtype.itemsize, len(tokens))):
                raise ModelError(f"its mixers hold {actual} bytes after {len(tokens)} tokens, and the plan said {planned}: a fault of effconvert")
        cache, state = growing // len(short) * itemsize // model.dtype.itemsize + growth_bytes(config, itemsize), state_bytes(config, itemsize)
    later = perplexity.sees_later(model, windows[0][: 2 * PROMPT])
    return Run(Side(parameters, cache, quality, continuation, state), logits, later, str(model.device))


def _beginning(material: Material) -> Tensor:
    return material.windows[0][: 4 * PROMPT]


def _check(size: Any, side: Side, which: str) -> None:
    for what, expected, actual in (("parameters", size.parameters, side.parameters), ("bytes of KV cache a token", size.kv_bytes, side.kv_bytes)):
        if expected != actual:
            raise ModelError(f"{which} has {actual} {what} in transformers, and the plan said {expected}: its config.json and its tensors do not agree")
