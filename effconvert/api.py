"""The Python API: the commands as functions that return their results as plain data.

    import effconvert

    outcome = effconvert.convert("./SmolLM2-135M", {"gqa": {"groups": 1}}, output="smol-mqa")
    outcome = effconvert.transplant("smol-mqa", base="./SmolLM2-135M", instruct="./SmolLM2-135M-Instruct")
    quality = effconvert.evaluate(["./SmolLM2-135M", "smol-mqa"], tasks=["piqa"], limit=200)
    speed = effconvert.bench(["./SmolLM2-135M", "smol-mqa"], context=[512, 2048])
    model, tokenizer = effconvert.load("smol-mqa")

Options are those of the command line with underscores. A wrong one raises an `OptionError` with the same message.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from os import PathLike, fspath
from typing import Any, TypeVar

from effconvert.convert import run
from effconvert.convert.run import Outcome
from effconvert.eval.quality import evaluate as evaluation
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.results import Benchmark, Evaluation, Subject, check_output, save
from effconvert.eval.speed import bench as timing
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.eval.subject import load_model, open_model, pick_device
from effconvert.modeling import loading
from effconvert.options import Options, RunOptions
from effconvert.progress import Progress
from effconvert.recipe import step
from effconvert.surgery._surgery import Step

Function = TypeVar("Function", bound=Callable[..., Any])
Models = Sequence[str | PathLike[str]] | str | PathLike[str]


def _takes(kind: type[Options]) -> Callable[[Function], Function]:
    """Show the fields of `kind` in the signature of a function that takes them as `**options`."""

    def decorate(function: Function) -> Function:
        own = signature(function)
        parameters = [parameter for parameter in own.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
        parameters += [Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation) for name, field in kind.model_fields.items()]
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


@_takes(RunOptions)
def convert(model: str | PathLike[str], /, *steps: Step | Mapping[str, Any] | str, progress: Progress | None = None, **options: Any) -> Outcome:
    """Convert a model by one or several steps in order.

    Args:
        model: a folder, a Hub id or a .gguf file.
        steps: as objects (`Gqa(groups=1)`), or as in a recipe (`{"gqa": {"groups": 1}}`, or the bare name).
        progress: shows the progress; by default nothing is shown.
        options: those of `RunOptions`: output, revision, dry_run, overwrite, verify, text, tokens, context and more.

    Raises:
        OptionError: the options are impossible for this model.
        ModelError: the model cannot be converted, or the result failed verification.
        EffconvertError: the disk or the network failed; the same call resumes.
    """
    parsed = tuple(step(entry, f"step {number}") for number, entry in enumerate(steps, 1))
    return run.convert(fspath(model), parsed, RunOptions(**options), progress)


@_takes(RunOptions)
def transplant(
    model: str | PathLike[str], /, base: str | PathLike[str], instruct: str | PathLike[str], *, progress: Progress | None = None, **options: Any
) -> Outcome:
    """Put an instruct model's training into a model converted from its base; `options` are those of `RunOptions`.

    Args:
        model: the converted model.
        base: what it was converted from.
        instruct: what the base was trained on to.
        progress: shows the progress; by default nothing is shown.
        options: see `convert`.

    Raises:
        OptionError, ModelError, EffconvertError: see `convert`.
    """
    return convert(model, {"transplant": {"base": fspath(base), "instruct": fspath(instruct)}}, progress=progress, **options)


@_takes(EvalOptions)
def evaluate(models: Models, /, progress: Progress | None = None, **options: Any) -> Evaluation:
    """Measure how good models are, the original first; `options` are those of `EvalOptions`: with `output` the results are written to that file too.

    Raises:
        OptionError, ModelError, EffconvertError: see `effconvert.eval.quality.evaluate.evaluate`.
    """
    evaluated: Evaluation = _saved(evaluation.evaluate, _as_list(models), EvalOptions(**options), progress)
    return evaluated


@_takes(BenchOptions)
def bench(models: Models, /, progress: Progress | None = None, **options: Any) -> Benchmark:
    """Measure how fast models are, the original first; `options` are those of `BenchOptions`: with `output` the results are written to that file too.

    Raises:
        OptionError, ModelError, EffconvertError: see `effconvert.eval.speed.bench.bench`.
    """
    benchmark: Benchmark = _saved(timing.bench, _as_list(models), BenchOptions(**options), progress)
    return benchmark


def _saved(measure: Callable[..., Any], models: Sequence[str], options: EvalOptions | BenchOptions, progress: Progress | None) -> Any:
    """Measure, and write the results where `output` says."""
    check_output(options.output, models)
    results = measure(models, options, progress)
    if options.output:
        save(results, options.output)
    return results


@dataclass(frozen=True)
class Loaded:
    """A loaded model; unpacks into the model and its tokenizer."""

    model: Any  # of transformers, on its device, in evaluation mode
    tokenizer: Any  # None where the model has none
    subject: Subject

    def __iter__(self) -> Iterator[Any]:
        """Yield the model and the tokenizer."""
        return iter((self.model, self.tokenizer))


def load(model: str | PathLike[str], dtype: str = "auto", device: str | None = None, kernels: str = "auto") -> Loaded:
    """Load a model with transformers, strictly: no tensor missing, none left over, and no remote code.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or a .gguf file.
        dtype: `auto` (that of the weights), float32, bfloat16 or float16.
        device: by default this machine's accelerator, or the CPU.
        kernels: decoding steps run as Triton kernels (`triton`), as in transformers (`reference`), or as EFFCONVERT_KERNELS says, else by what was
            measured to be faster (`auto`): kernels on no card so far, on a CPU shared KV heads and experts without copies; docs/kernels.md. transformers'
            continuous batching (`generate_batch`) knows no attention function of ours: give `reference` for it.

    Raises:
        OptionError: the model, type or device does not exist, or kernels cannot run there.
        ModelError: the model cannot be loaded.
    """
    options = BenchOptions(dtype=dtype, device=device, kernels=(kernels,))  # checks them
    opened = open_model(fspath(model))
    tokenizer = loading.load_tokenizer(opened.folder) if loading.has_tokenizer(opened.folder) else None
    return Loaded(load_model(opened, options.dtype, pick_device(options.device), kernels), tokenizer, opened.subject)


def _as_list(models: Models) -> list[str]:
    sequence = [models] if isinstance(models, str | PathLike) else models
    return [fspath(model) for model in sequence]
