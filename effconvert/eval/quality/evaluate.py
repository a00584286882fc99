"""Measure the quality of models, the original first. Each is loaded once, one after the other, and earlier results come from a cache."""

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
from effconvert.eval.quality.encoder_decoders import EncoderDecoders
from effconvert.eval.quality.encoders import Encoders
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.running import Running
from effconvert.eval.quality.store import Result, Store
from effconvert.eval.quality.text import Text, default_text, read_text
from effconvert.eval.results import Evaluation
from effconvert.eval.subject import open_model, pick_device, pick_dtype
from effconvert.modeling.loading import has_tokenizer
from effconvert.modeling.precision import slow
from effconvert.paths import expand
from effconvert.progress import NoProgress, Progress
from effconvert.quiet import quiet_transformers

Measured = Decoders | Encoders | EncoderDecoders
KINDS: dict[str, type[Measured]] = {"decoder": Decoders, "encoder": Encoders, "encoder-decoder": EncoderDecoders}


@dataclass(frozen=True)
class Prepared:
    """Everything that a measurement needs, checked; no model is loaded yet."""

    running: list[Running]
    plan: Measured
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
    if remark := next(filter(None, (slow(device, pick_dtype(options.dtype, model.opened), "--dtype") for model in running)), ""):
        progress.log(remark)
    for model in running:
        if (role := model.opened.role) != (first := running[0].opened.role):
            raise OptionError(
                f"{running[0].name} is of another kind than {model.name} ({first}, {role}), and no measurement fits both; measure them separately"
            )
        if not has_tokenizer(model.opened.folder):
            raise ModelError(f"{model.name} has no tokenizer, which its measurements need; put its files into the model's folder")
    store, kind = Store(options.cache), KINDS[running[0].opened.role]
    return Prepared(
        running, kind(running, options, text, store, scratch, show_bars=sys.stderr.isatty() and not isinstance(progress, NoProgress)), store, text, device
    )


def evaluate(models: Sequence[str], options: EvalOptions, progress: Progress | None = None) -> Evaluation:
    """Measure `models`, the original first, as `options` say.

    Args:
        models: folders, Hub ids or .gguf files.
        options: what is measured, on what.
        progress: shows the progress; by default nothing is shown.

    Raises:
        OptionError: the options are impossible for these models.
        ModelError: a model cannot be loaded, or computes NaN.
        EffconvertError: memory, disk or network failed; results so far are in the cache, and the same call resumes there.
    """
    progress = progress or NoProgress()
    with TemporaryDirectory(prefix="effconvert-eval-") as scratch, quiet_transformers():
        prepared = prepare(models, options, Path(scratch), progress)
        running, plan = prepared.running, prepared.plan
        by_model = [_measure(plan, index, running[index], prepared.store, progress) for index in range(len(running))]
    samples = [[sample for result in model_results for sample in result.samples] for model_results in by_model]
    notes = [
        *(note for model in running for note in model.opened.notes),
        *plan.notes,
        *(f"{model.name}: {note}" for model, model_results in zip(running, by_model, strict=True) for result in model_results for note in result.notes),
    ]
    if isinstance(plan, Decoders) and plan.harness:
        for model_samples in samples:
            model_samples += plan.harness.combine({name: tuple(sample for sample in model_samples if sample.task == name) for name in plan.harness.tasks})
    rows, doubts = table.rows(samples, [model.name for model in running])
    texts = [next((result.texts for result in model_results if result.texts), ("", "")) for model_results in by_model]
    return Evaluation(
        subjects=tuple(model.opened.subject for model in running),
        rows=rows,
        continuations=tuple(continuation for _, continuation in texts),
        prompt=texts[0][0],
        notes=(*notes, *doubts),
        settings=_settings(options, prepared.text, prepared.device, plan),
        versions=results.versions(),
        machine=results.machine(prepared.device),
        date=results.now(),
    )


def _measure(plan: Measured, index: int, model: Running, store: Store, progress: Progress) -> list[Result]:
    model_results: list[Result] = []
    try:
        for measurement in plan.measurements(index):
            result = store.get(measurement.key)
            if result is None or measurement.always:
                bar = progress.bar(f"{model.name}: {measurement.what}", measurement.total, measurement.unit)
                with bar as advance, models_fault(model), enough_memory(measurement.what):
                    result = measurement.run(advance)
                store.put(measurement.key, result)
            model_results.append(result)
    finally:
        model.close()
    return model_results


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turn the errors of a full memory or disk into one line."""
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


@contextmanager
def models_fault(model: Running) -> Iterator[None]:
    """Turn any error of a class of transformers into one line, where effconvert does not know the layout."""
    try:
        yield
    except EffconvertError:
        raise
    except Exception as error:
        if model.opened.known:
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"{model.name}: {model.opened.subject.architecture} of transformers fails in this measurement ({what}); leave the model out"
        ) from error


def _settings(options: EvalOptions, text: Text, device: str, plan: Measured) -> dict[str, object]:
    """Return the settings that the numbers depend on, without paths of this machine."""
    own = options.model_dump(mode="json", exclude={"output", "cache", "include_path", "text", "pairs", "confirm_run_unsafe_code"})
    longest = {"max_length": plan.max_length, "passkey": plan.passkeys} if isinstance(plan, Decoders) else {}
    name = {"text": text.name, "text_sha256": sha256(text.content.encode()).hexdigest(), "pairs": options.pairs.name if options.pairs else None}
    return {**own, **plan.read, **longest, **name, "device": device, "seed": 0}
