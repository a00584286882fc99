"""Run recipes: convert, then measure; finished parts of an earlier run are reused."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from effconvert import processes
from effconvert.convert.run import Outcome, convert
from effconvert.errors import EffconvertError, OptionError
from effconvert.eval.quality.evaluate import evaluate, prepare
from effconvert.eval.results import Benchmark, Evaluation, check_output, machine, read, save, versions
from effconvert.eval.speed.bench import bench, contexts_of, device_of
from effconvert.eval.subject import open_model
from effconvert.heal.distill import Distill
from effconvert.heal.transplant import Transplant
from effconvert.options import Conversion, RunOptions
from effconvert.paths import expand, real
from effconvert.progress import Advance, NoProgress, Progress, Unit
from effconvert.recipe import Recipe, as_keys, outputs
from effconvert.report import report
from effconvert.report.page import FORMS, check_drawing, forms
from effconvert.surgery._surgery import Step

Result = TypeVar("Result")


@dataclass(frozen=True)
class Replay:
    """The results of a recipe."""

    conversions: tuple[Outcome, ...]  # one for each folder of `outputs`
    evaluation: Evaluation | None = None
    benchmark: Benchmark | None = None
    files: tuple[Path, ...] = ()  # files written beside the output


@dataclass(frozen=True)
class _Through:
    """Shows a plan that goes through a model which is not written yet, with a note that says so."""

    progress: Progress
    note: str

    def plan(self, model: str, plan: Any, output: Path, verify_bytes: int) -> None:
        """Show the plan with the note."""
        self.progress.plan(model, replace(plan, remarks=(*plan.remarks, self.note)), output, verify_bytes)

    def step(self, what: str) -> None:
        """Show the step."""
        self.progress.step(what)

    def log(self, line: str) -> None:
        """Show the line."""
        self.progress.log(line)

    def bar(self, what: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        """Show the bar."""
        return self.progress.bar(what, total, unit)


def replay(recipes: Sequence[Recipe], dry_run: bool = False, progress: Progress | None = None) -> list[Replay]:
    """Run `recipes`, in the order of `effconvert.recipe.read`.

    All checks run before anything is written. A stage that this same recipe wrote before is reused.

    Raises:
        OptionError, ModelError, EffconvertError: as the commands do; the recipe's output is named.
    """
    progress = progress or NoProgress()
    if processes.count() > 1 and (len(recipes) > 1 or any(recipe.evaluate or recipe.bench or recipe.report for recipe in recipes)):
        raise OptionError(f"{processes.count()} processes were started, which only distill uses; evaluate, bench and report in a command of its own")
    planned = [_named(recipe, recipes, partial(_plan, recipe, recipes, progress if dry_run else NoProgress())) for recipe in recipes]
    if dry_run:
        return [Replay(outcomes) for outcomes in planned]
    return [_named(recipe, recipes, partial(_run, recipe, progress)) for recipe in recipes]


def _named(recipe: Recipe, recipes: Sequence[Recipe], act: Callable[[], Result]) -> Result:
    """Call `act`; if it fails and there are several recipes, name the one in the error."""
    try:
        return act()
    except EffconvertError as error:
        raise type(error)((f"the recipe for {recipe.target}: " if len(recipes) > 1 else "") + as_keys(str(error))) from error


def _plan(recipe: Recipe, recipes: Sequence[Recipe], progress: Progress) -> tuple[Outcome, ...]:
    """Plan a recipe; if it converts an output that is not written yet, plan both recipes as one."""
    model, revision = recipe.model, recipe.revision
    before: tuple[Step, ...] = ()
    while (writer := _writer(model, recipes)) and (writer.overwrite or not expand(model).exists()):
        if revision:
            raise OptionError(f"--revision is for models on the Hub, and {model} is the output of another recipe; leave it out")
        stage = [real(folder) for folder in outputs(writer)].index(real(model))
        model, revision, before = writer.model, writer.revision, (*_stages(writer)[stage], *before)
    if before:
        steps = " -> ".join(step.name for step in before)
        note = f"{recipe.model} is not written yet: it will be {model} after {steps}, so this plan starts there, and `before` is {model}"
        progress = _Through(progress, note)
    _check_files(recipe, recipes)
    if recipe.report:
        check_drawing()
    outcomes = [
        convert(model, _as_one(before, steps), _options(recipe, folder, revision=revision, dry_run=True), progress, reuse=True)
        for steps, folder in zip(_stages(recipe), outputs(recipe), strict=True)
    ]
    first = _first(model, revision)
    if recipe.evaluate:
        with TemporaryDirectory() as scratch:
            prepare([first], recipe.evaluate, Path(scratch), NoProgress())
    if recipe.bench:
        device_of(recipe.bench)
        contexts_of([open_model(first)], recipe.bench)
    return tuple(outcomes)


def _as_one(before: Sequence[Step], steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps of a plan that goes through a model which is not written yet, without those that need it on disk; they change no shape."""
    chain = (*before, *steps)
    if not before:
        return chain
    last = len(chain) - 1
    known = tuple(step for at, step in enumerate(chain) if not isinstance(step, Transplant) and (at == last or not isinstance(step, Distill)))
    return known or chain[:1]


def _check_files(recipe: Recipe, recipes: Sequence[Recipe]) -> None:
    """Refuse results files inside a model's folder, or with the same path."""
    folders = {real(folder) for other in recipes for folder in outputs(other)}
    places = [real(file) for other in recipes for file in _files(other).values()]
    for what, file in _files(recipe).items():
        place = real(file)
        if place in folders or folders & set(place.parents):
            raise OptionError(f"{file} would be in the folder of a model; give another --output")
        if places.count(place) > 1:
            raise OptionError(f"{file} would be written twice; give each measurement its own --output")
        if what not in FORMS:
            check_output(file, [recipe.model])
        elif file.exists() and not recipe.overwrite and (file.is_dir() or b"effconvert" not in file.read_bytes()):
            raise OptionError(f"{file} exists and is no report of effconvert; move it, or write overwrite: true")


def _first(model: str, revision: str | None) -> str:
    return f"{model}@{revision}" if revision else model


def _run(recipe: Recipe, progress: Progress) -> Replay:
    conversions = [
        convert(recipe.model, steps, _options(recipe, folder), progress, reuse=True) for steps, folder in zip(_stages(recipe), outputs(recipe), strict=True)
    ]
    models, files = [_first(recipe.model, recipe.revision), *(str(outcome.output) for outcome in conversions)], _files(recipe)
    evaluation = evaluate(models, recipe.evaluate, progress) if recipe.evaluate else None
    if evaluation:
        save(evaluation, files["evaluate"])
    benchmark = _earlier_benchmark(files["bench"], models, recipe) if recipe.bench else None
    if benchmark:
        progress.log(f"{files['bench']} has the speeds of these models, measured on {benchmark.date}; remove it to measure them again")
    elif recipe.bench:
        benchmark = bench(models, recipe.bench, progress)
    if benchmark:
        save(benchmark, files["bench"])
    if recipe.report:
        page = report(recipe.target, [file for what, file in files.items() if what not in FORMS], files[".html"], overwrite=True)
        files = {what: file for what, file in files.items() if what not in FORMS or what in forms(page)}
    return Replay(tuple(conversions), evaluation, benchmark, tuple(files.values()))


def _stages(recipe: Recipe) -> list[tuple[Step, ...]]:
    """Return the steps that lead to each folder of `outputs`: all steps, and with keep_stages also those up to each stage."""
    first = 1 if recipe.keep_stages else len(recipe.steps)
    return [recipe.steps[:count] for count in range(first, len(recipe.steps) + 1)]


def _writer(model: str, recipes: Sequence[Recipe]) -> Recipe | None:
    place = real(model)
    return next((recipe for recipe in recipes if place in [real(folder) for folder in outputs(recipe)]), None)


def _options(recipe: Recipe, folder: Path, **more: object) -> RunOptions:
    own = {name: getattr(recipe, name) for name in Conversion.model_fields}
    return RunOptions(**{**own, "output": folder, **more})


def _files(recipe: Recipe) -> dict[str, Path]:
    """Return the files beside the output."""
    files = {}
    if recipe.evaluate:
        files["evaluate"] = recipe.evaluate.output or recipe.beside("eval.json")
    if recipe.bench:
        files["bench"] = recipe.bench.output or recipe.beside("bench.json")
    if recipe.report:
        files |= {form: recipe.beside(f"report{form}") for form in FORMS}
    return files


def _earlier_benchmark(file: Path, models: Sequence[str], recipe: Recipe) -> Benchmark | None:
    """Return the benchmark of an interrupted run from its file, if it is for the same models, settings, libraries and machine."""
    if not file.is_file():
        return None
    try:
        earlier = read(file)
    except OptionError:
        return None
    if not recipe.bench or not isinstance(earlier, Benchmark):
        return None
    opened = [open_model(model) for model in models]
    device = device_of(recipe.bench)
    resolved = {"context": contexts_of(opened, recipe.bench), "device": device}
    expected = {**recipe.bench.model_dump(mode="json", exclude={"output"}), **resolved}
    same_models = [subject.digest for subject in earlier.subjects] == [model.subject.digest for model in opened]
    same_setup = (earlier.versions, earlier.machine) == (versions(), machine(device))  # speeds depend on libraries and machine
    return earlier if same_models and same_setup and all(earlier.settings.get(key) == value for key, value in expected.items()) else None
