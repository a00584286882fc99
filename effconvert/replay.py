"""Carry out recipes: convert, then measure; what an earlier run finished is found and not done again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effconvert.convert.run import Outcome, convert
from effconvert.convert.watch import Silent, Watcher
from effconvert.errors import OptionError
from effconvert.eval.evaluate import evaluate
from effconvert.eval.harness import check_tasks
from effconvert.eval.report import report
from effconvert.eval.results import Benchmark, Evaluation, check_output, read, save
from effconvert.eval.speed import bench
from effconvert.eval.subject import open_model
from effconvert.options import Conversion, RunOptions
from effconvert.recipe import Recipe, outputs
from effconvert.surgery._surgery import Surgery


@dataclass(frozen=True)
class Replay:
    """What came of a recipe."""

    conversions: tuple[Outcome, ...]  # one for each stage that was kept, the whole last
    evaluation: Evaluation | None = None
    benchmark: Benchmark | None = None
    files: tuple[Path, ...] = ()  # what was written beside the output


def replay(recipes: Sequence[Recipe], dry_run: bool = False, watcher: Watcher | None = None) -> list[Replay]:
    """Carry out `recipes`, which `effconvert.recipe.read` put in order.

    Everything that can be foreseen is refused before anything is written. A stage that this very recipe wrote before is taken as it is.

    Raises:
        OptionError, ModelError, EffconvertError: as the commands do; the recipe's output is named.
    """
    watcher = watcher or Silent()
    for recipe in recipes:
        _foresee(recipe, recipes, watcher if dry_run else Silent())
    return [] if dry_run else [_carry_out(recipe, watcher) for recipe in recipes]


def _foresee(recipe: Recipe, recipes: Sequence[Recipe], watcher: Watcher) -> None:
    """Plan a recipe; where it begins from what another one is still to write, plan both as one."""
    model, revision = recipe.model, recipe.revision
    before: tuple[Surgery, ...] = ()
    while not Path(model).expanduser().exists() and (writer := _writer(model, recipes)):
        stage = [folder.resolve() for folder in outputs(writer)].index(Path(model).expanduser().resolve())
        model, revision, before = writer.model, writer.revision, (*_stages(writer)[stage], *before)
    for steps, folder in zip(_stages(recipe), outputs(recipe), strict=True):
        convert(model, (*before, *steps), _options(recipe, folder, revision=revision, dry_run=True), watcher, reuse=True)
    if recipe.evaluate:
        check_tasks(recipe.evaluate)
    for file in _files(recipe).values():
        check_output(file)


def _carry_out(recipe: Recipe, watcher: Watcher) -> Replay:
    conversions = [
        convert(recipe.model, steps, _options(recipe, folder), watcher, reuse=True) for steps, folder in zip(_stages(recipe), outputs(recipe), strict=True)
    ]
    first = f"{recipe.model}@{recipe.revision}" if recipe.revision else recipe.model
    models, files = [first, *(str(outcome.output) for outcome in conversions)], _files(recipe)
    evaluation = evaluate(models, recipe.evaluate, watcher) if recipe.evaluate else None
    if evaluation:
        save(evaluation, files["evaluate"])
    benchmark = (_measured_before(files["bench"], models, recipe) or bench(models, recipe.bench, watcher)) if recipe.bench else None
    if benchmark:
        save(benchmark, files["bench"])
    if recipe.report:
        results = [file for what, file in files.items() if what != "report"]
        report(recipe.target, results, files["report"], overwrite=True)
    return Replay(tuple(conversions), evaluation, benchmark, tuple(files.values()))


def _stages(recipe: Recipe) -> list[tuple[Surgery, ...]]:
    """Return the steps that lead to each folder of `outputs`: all of them, and with stages kept those up to each."""
    first = 1 if recipe.keep_stages else len(recipe.steps)
    return [recipe.steps[:count] for count in range(first, len(recipe.steps) + 1)]


def _writer(model: str, recipes: Sequence[Recipe]) -> Recipe | None:
    place = Path(model).expanduser().resolve()
    return next((recipe for recipe in recipes if place in [folder.resolve() for folder in outputs(recipe)]), None)


def _options(recipe: Recipe, folder: Path, **more: object) -> RunOptions:
    own = {name: getattr(recipe, name) for name in Conversion.model_fields}
    return RunOptions(**{**own, "output": folder, **more})


def _files(recipe: Recipe) -> dict[str, Path]:
    """Return the files that go beside the output."""
    files = {}
    if recipe.evaluate:
        files["evaluate"] = recipe.evaluate.output or recipe.beside("eval.json")
    if recipe.bench:
        files["bench"] = recipe.bench.output or recipe.beside("bench.json")
    if recipe.report:
        files["report"] = recipe.beside("report.html")
    return files


def _measured_before(file: Path, models: Sequence[str], recipe: Recipe) -> Benchmark | None:
    """Return what an interrupted run measured: speeds are in no cache, but the file is there if they were."""
    if not file.is_file():
        return None
    try:
        held = read(file)
    except OptionError:
        return None
    asked = recipe.bench.model_dump(mode="json", exclude={"output"}, exclude_none=True) if recipe.bench else {}
    now = [open_model(model).subject.digest for model in models]
    same = [subject.digest for subject in held.subjects] == now and all(held.settings.get(key) == value for key, value in asked.items())
    return held if isinstance(held, Benchmark) and same else None
