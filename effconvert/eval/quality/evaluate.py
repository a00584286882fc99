"""Measure models beside each other: each in memory once, one after the other, the original first; what was measured before is not measured again."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from effconvert.errors import EffconvertError, ModelError, OptionError
from effconvert.eval import results
from effconvert.eval.quality import table
from effconvert.eval.quality.decoders import Decoders
from effconvert.eval.quality.encoders import Encoders
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.running import Running
from effconvert.eval.quality.store import Measured, Store
from effconvert.eval.quality.text import Text, default_text, read_text
from effconvert.eval.results import Evaluation
from effconvert.eval.subject import open_model, pick_device
from effconvert.modeling.loading import has_tokenizer
from effconvert.paths import expand
from effconvert.progress import NoProgress, Progress
from effconvert.quiet import quiet_transformers


@dataclass(frozen=True)
class Prepared:
    """Everything that is needed to measure, looked at and found sound; no model is loaded yet."""

    running: list[Running]
    plan: Decoders | Encoders
    store: Store
    text: Text
    device: str


def prepare(models: Sequence[str], options: EvalOptions, scratch: Path, progress: Progress) -> Prepared:
    """Open the models, the text and the tasks.

    Raises:
        OptionError, ModelError, EffconvertError: as `evaluate`.
    """
    if not models:
        raise OptionError("there is no model to measure; give at least one")
    if options.include_path and not expand(options.include_path).is_dir():
        raise OptionError(f"--include-path {options.include_path} is no folder; give one with task files")
    text = read_text(options.text) if options.text else default_text()
    device = pick_device(options.device)
    running = [Running(open_model(model, progress.step), options.dtype, device) for model in models]
    for model in running:
        if model.opened.decoder != running[0].opened.decoder:
            raise OptionError(f"{running[0].name} and {model.name} are a decoder and an encoder, and nothing is measured on both; compare like with like")
        if not has_tokenizer(model.opened.folder):
            raise ModelError(f"{model.name} has no tokenizer beside it, so it cannot be given text; put one there")
    store, kind = Store(options.cache), Decoders if running[0].opened.decoder else Encoders
    return Prepared(
        running, kind(running, options, text, store, scratch, talk=sys.stderr.isatty() and not isinstance(progress, NoProgress)), store, text, device
    )


def evaluate(models: Sequence[str], options: EvalOptions, progress: Progress | None = None) -> Evaluation:
    """Measure `models`, the original first, as `options` say.

    Args:
        models: folders, Hub ids or .gguf files.
        options: what is measured, on what.
        progress: shows the progress; by default nothing is shown.

    Raises:
        OptionError: the asker wants something impossible.
        ModelError: a model cannot be loaded, or computes NaN.
        EffconvertError: memory, disk or network failed; what was measured until then is kept, and the same call goes on from there.
    """
    progress = progress or NoProgress()
    with TemporaryDirectory(prefix="effconvert-eval-") as scratch, quiet_transformers():
        prepared = prepare(models, options, Path(scratch), progress)
        running, plan = prepared.running, prepared.plan
        found = [_measure(plan, index, running[index], prepared.store, progress) for index in range(len(running))]
    by_model = [[sample for measured in kept for sample in measured.samples] for kept in found]
    notes = [*plan.notes, *(f"{model.name}: {note}" for model, kept in zip(running, found, strict=True) for measured in kept for note in measured.notes)]
    if isinstance(plan, Decoders) and plan.harness:
        for samples in by_model:
            samples += plan.harness.combine({name: tuple(found for found in samples if found.task == name) for name in plan.harness.tasks})
    rows, doubts = table.rows(by_model, [model.name for model in running])
    written = [next((measured.texts for measured in kept if measured.texts), ("", "")) for kept in found]
    return Evaluation(
        subjects=tuple(model.opened.subject for model in running),
        rows=rows,
        continuations=tuple(texts[1] for texts in written),
        prompt=written[0][0],
        notes=(*notes, *doubts),
        settings=_settings(options, prepared.text, prepared.device, plan),
        versions=results.versions(),
        machine=results.machine(prepared.device),
        date=results.now(),
    )


def _measure(plan: Decoders | Encoders, index: int, model: Running, store: Store, progress: Progress) -> list[Measured]:
    found = []
    try:
        for measurement in plan.measurements(index):
            known = store.get(measurement.key)
            if known is None or measurement.wanted:
                with progress.bar(f"{model.name}: {measurement.what}", measurement.total, measurement.unit) as advance, enough_memory(measurement.what):
                    known = measurement.run(advance)
                store.put(measurement.key, known)
            found.append(known)
    finally:
        model.close()
    return found


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turn what happens when memory or disk is full into an error of one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise EffconvertError(f"no memory left for {what}; give a smaller --context, --batch-size or --dtype, and run the same command again") from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise EffconvertError(f"no memory left for {what}; give a smaller --context or --batch-size, and run the same command again") from None
    except OSError as error:
        raise EffconvertError(f"no room for {what} ({error.strerror}); make some where temporary files go (TMPDIR), and run the same command again") from None


def _settings(options: EvalOptions, text: Text, device: str, plan: Decoders | Encoders) -> dict[str, object]:
    """Return what the numbers depend on, without paths of this machine."""
    kept = options.model_dump(mode="json", exclude={"output", "cache", "include_path", "text", "pairs", "confirm_run_unsafe_code"})
    longest = {"max_length": plan.max_length, "passkey": plan.passkeys} if isinstance(plan, Decoders) else {}
    name = {"text": text.name, "text_sha256": sha256(text.content.encode()).hexdigest(), "pairs": options.pairs.name if options.pairs else None}
    return {**kept, **plan.read, **longest, **name, "device": device, "seed": 0}
