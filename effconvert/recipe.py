"""Read recipes, which are conversions in YAML. Errors are the same as on the command line, with keys in place of options.

A file has one recipe or several (YAML documents); one may convert the output of another. What is read (a model, a text) is looked up beside the file,
then in the folder in which `effconvert run` is called. What is written is relative to the latter.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field

from effconvert import steps as known_steps
from effconvert.errors import EffconvertError, OptionError
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.speed.bench_options import BenchOptions
from effconvert.options import CALIBRATION_WORDS, LAYERS, Conversion, Options, RunOptions, shown
from effconvert.paths import expand, found_from, real
from effconvert.surgery._surgery import Step

Kind = TypeVar("Kind", bound=Options)
READ = ("model", "teacher", "base", "instruct", "text", "calibrate", "data", "cache_teacher", "pairs", "include_path")  # options that name what is read


class _Loader(yaml.SafeLoader):
    """Refuses what YAML would silently read as something else: duplicate keys, of which it uses the last, and numbers in base 8 or 60."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if isinstance(node, yaml.MappingNode) else []
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        written, value = str(node.value), super().construct_yaml_int(node)
        plain = written.replace("_", "")
        if ":" in plain:
            raise yaml.constructor.ConstructorError(None, None, f"YAML reads {written} as {value}, in base 60: write {value}, or '{written}'", node.start_mark)
        if re.fullmatch(r"[-+]?0\d+", plain) and int(plain) != value:
            raise yaml.constructor.ConstructorError(None, None, f"YAML reads {written} as {value}, in base 8: write {value} or {int(plain)}", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class Recipe(Conversion):
    """One conversion, with the measurements afterwards."""

    model: str = Field(min_length=1, description="Folder, Hub id or .gguf file to convert.")
    steps: tuple[Step, ...] = Field(min_length=1, description="Steps in order, each with its options.")
    keep_stages: bool = Field(False, description="Also write the model after each step, as OUTPUT-1-…, OUTPUT-2-…")
    evaluate: EvalOptions | None = Field(None, description="Run `effconvert eval` on the original and the results; writes OUTPUT-eval.json.")
    bench: BenchOptions | None = Field(None, description="Run `effconvert bench` on the same models; writes OUTPUT-bench.json.")
    report: bool = Field(False, description="Write the report, OUTPUT-report.html.")

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return the message for an unknown key: steps and options of `effconvert run` have places of their own."""
        flag = name.replace("_", "-")
        if flag in known_steps.catalogue():
            return f"--{flag} is a step; write it into `steps`, like `steps: [..., {flag}]`"
        if name in RunOptions.model_fields:
            return f"--{flag} is no key of a recipe; it is an option of the command: effconvert run RECIPE --{flag}"
        return super().unknown(name)

    @property
    def target(self) -> Path:
        """The folder to write."""
        from effconvert.convert.run import default_name

        folder = expand(self.output or default_name(self.model, self.steps))
        if not folder.name:
            raise OptionError(f"--output {str(folder)!r} is not the name of a new folder; give one")
        return folder

    def beside(self, what: str) -> Path:
        """Return the path of a file about the output: smol-mqa-eval.json."""
        return self.target.with_name(f"{self.target.name}-{what}")


def read(path: Path, **overrides: Any) -> list[Recipe]:
    """Read the recipes in a file, ordered so that each comes after the one whose output it converts.

    Args:
        path: a YAML file.
        overrides: options that replace those in the file, as from the command line; only for a file with one recipe.

    Raises:
        OptionError: the file does not exist, is not YAML, or has impossible options; the message names the place in it.
    """
    try:
        documents = [document for document in yaml.load_all(expand(path).read_text(encoding="utf-8"), _Loader) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); give a recipe, a YAML file") from None
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:  # dates, numbers: 2001-99-99
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise OptionError(f"{path} cannot be read as a recipe{where} ({getattr(error, 'problem', None) or type(error).__name__}); fix the file") from None
    if not documents:
        raise OptionError(f"{path} has no recipe; give a file with `model:` and `steps:`")
    if overrides and len(documents) > 1:
        raise OptionError(
            f"{path} has {len(documents)} recipes, and --{next(iter(overrides)).replace('_', '-')} could be for any of them; write it into the file"
        )
    recipes = [_parse(document, f"{path}{f', recipe {number}' if len(documents) > 1 else ''}", overrides) for number, document in enumerate(documents, 1)]
    return order(_located(recipes, expand(path).parent, overrides))


def _located(recipes: Sequence[Recipe], folder: Path, overrides: Mapping[str, Any]) -> list[Recipe]:
    """Return recipes from a file in `folder` with the places of what they read, but for `overrides`, and for what other recipes write."""
    if folder == Path():
        return list(recipes)
    written = {real(output) for recipe in recipes for output in outputs(recipe)}

    def located(options: Kind) -> Kind:
        names = [name for name in READ if name in type(options).model_fields and name not in overrides]  # a step may have a method of such a name
        given = {name: value for name in names if (value := getattr(options, name)) is not None}
        local = {name: value for name, value in given.items() if real(value) not in written and value not in CALIBRATION_WORDS}
        return options.model_copy(update={name: type(value)(found_from(folder, str(value))) for name, value in local.items()})

    return [
        located(recipe).model_copy(update={"steps": tuple(map(located, recipe.steps)), "evaluate": recipe.evaluate and located(recipe.evaluate)})
        for recipe in recipes
    ]


def _parse(document: Any, where: str, overrides: Mapping[str, Any]) -> Recipe:
    """Build a recipe from a YAML document."""
    entry = {**_python_keys(document, Recipe, where), **overrides}
    if "model" in overrides:
        entry.pop("revision", None)  # it belongs to the recipe's own model
    steps = entry.get("steps")
    if isinstance(steps, Mapping | str):
        steps = [steps]
    if isinstance(steps, Sequence) and not isinstance(steps, str):
        entry["steps"] = tuple(step(value, f"{where}, step {number}") for number, value in enumerate(steps, 1))
    for name, kind in (("evaluate", EvalOptions), ("bench", BenchOptions)):
        if name in entry and entry[name] is not None:
            nested = {} if entry[name] is True else entry[name]  # `evaluate: true` means all defaults, `false` none at all
            entry[name] = _build(kind, _python_keys(nested, kind, f"{where}, {name}"), f"{where}, {name}") if nested is not False else None
    if isinstance(bench := entry.get("bench"), BenchOptions) and len(bench.kernels) > 1:
        raise OptionError(f"{where}: bench measures each model once in a recipe, so give one of kernels; `effconvert bench --kernels` takes several")
    return _build(Recipe, entry, where)


def step(entry: Any, where: str) -> Step:
    """Build a step from an entry of a recipe: `gqa: {groups: 8}`, or a bare name.

    Raises:
        OptionError: there is no such technique, or its options are wrong.
    """
    if isinstance(entry, Step):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise OptionError(f"{where} is {shown(entry)}, and it should be one technique with its options, like `gqa: {{groups: 8}}`")
    (name, options), known = next(iter(entry.items())), known_steps.catalogue()
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        raise OptionError(f"{where}: there is no technique {shown(name)}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"))
    technique, where = known_steps.load(name), f"{where} ({name})"
    values = _python_keys({} if options is None else options, technique, where)
    if unknown := [key for key in values if key not in technique.model_fields]:
        raise OptionError(f"{where}: {'; '.join(as_keys(_unknown_in_step(name, key)) for key in unknown)}")
    return _build(technique, values, where)


def _unknown_in_step(name: str, key: str) -> str:
    """Return the message for an unknown option of a step, which may have its place elsewhere in the recipe."""
    flag, message = key.replace("_", "-"), known_steps.load(name).unknown(key)
    if flag in known_steps.catalogue():
        return f"--{flag} is a step of its own; write it behind this one, like `steps: [{name}: {{...}}, {flag}]`"
    if key in Recipe.model_fields:
        return f"--{flag} is for all steps; give it beside `steps`, not in one of them"
    return message if name in known_steps.healing_methods() else known_steps.explained(key, message)


def _python_keys(entry: Any, kind: type[Options], where: str) -> dict[str, Any]:
    """Return the options with underscores in place of hyphens."""
    if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
        raise OptionError(f"{where} is {shown(entry)}, and it should be options with their values, like `{next(iter(kind.model_fields)).replace('_', '-')}: …`")
    options = {key.replace("-", "_"): value for key, value in entry.items()}
    if len(options) < len(entry):
        raise OptionError(f"{where} has an option twice, with - and with _; give it once")
    return options


def _build(kind: type[Kind], entry: Mapping[str, Any], where: str) -> Kind:
    try:
        return kind(**entry)
    except EffconvertError as error:
        raise OptionError(f"{where}: {as_keys(str(error))}") from None


def as_keys(message: str) -> str:
    """Write the options in a message as the keys of a recipe, but for those of a whole command: `--groups 3` as `groups 3`."""
    about, command, rest = message.partition("effconvert ")
    about = re.sub(r"(?<![\w-])--no-([a-z-]+)", r"\1: false", about)
    return re.sub(r"(?<![\w-])--(?!help\b)([a-z-]+)", r"\1", about) + command + rest


def order(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Sort the recipes so that each comes after the one whose output it converts.

    Raises:
        OptionError: two recipes write the same folder, one writes into a folder that another needs, or they depend on each other.
    """
    writes: dict[Path, Recipe] = {}
    for recipe in recipes:
        for folder in outputs(recipe):
            if writes.setdefault(real(folder), recipe) is not recipe:
                raise OptionError(f"two recipes write {folder}; give each its own output")
    _check_apart(writes, [real(recipe.model) for recipe in recipes])
    ordered: list[Recipe] = []
    for recipe in recipes:
        waiting = [recipe]
        while (before := writes.get(real(waiting[-1].model))) is not None and before not in ordered:
            if before in waiting:
                circle = [waiting_recipe.model for waiting_recipe in waiting[waiting.index(before) :]]
                raise OptionError(f"these recipes wait for each other's output: {' <- '.join([*circle, circle[0]])}; give one of them a model that exists")
            waiting.append(before)
        ordered += [recipe for recipe in reversed(waiting) if recipe not in ordered]
    return ordered


def _check_apart(writes: Iterable[Path], models: Sequence[Path]) -> None:
    """Refuse outputs inside each other or inside a model, and outputs whose working folders collide."""
    from effconvert.convert.output import partial_folder, replaced_folder  # imports torch, which a schema must not load

    for folder in writes:
        for place in (folder, partial_folder(folder), replaced_folder(folder)):
            for other in {*writes, *models} - {folder}:
                if other == place or place in other.parents or other in place.parents:
                    raise OptionError(f"{place}, which is needed for an output, and {other} are the same or one inside the other; give another output")


def outputs(recipe: Recipe) -> Iterator[Path]:
    """Yield the folders that a recipe writes, the last one last."""
    if recipe.keep_stages:
        for number, ordered in enumerate(recipe.steps[:-1], 1):
            yield recipe.beside(f"{number}-{ordered.name}")
    yield recipe.target


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, generated from the option classes."""
    options = Recipe.model_json_schema(mode="validation")
    definitions = options.setdefault("$defs", {})
    choices: list[dict[str, Any]] = []
    for name, summary in known_steps.catalogue().items():
        technique = known_steps.load(name)
        own = technique.model_json_schema()
        definitions |= own.pop("$defs", {})
        definitions[name] = own
        value: dict[str, Any] = {"$ref": f"#/$defs/{name}"} if own.get("required") else {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
        choices.append({"type": "object", "description": summary, "properties": {name: value}, "required": [name], "additionalProperties": False})
        if not own.get("required"):
            choices.append({"const": name, "description": summary})
    definitions.pop("Step", None)
    for nested in ("evaluate", "bench"):
        options["properties"][nested]["anyOf"].append({"type": "boolean"})
    options["properties"]["steps"] = {"type": "array", "minItems": 1, "description": options["properties"]["steps"]["description"], "items": {"anyOf": choices}}
    for definition in definitions.values():
        for value in definition.get("properties", {}).values():
            kinds = value.get("anyOf", [value])
            if value.get("metavar") == LAYERS:  # `layers: 3` and `layers: [0, 1-3]` too
                value["anyOf"] = [*kinds, {"type": "integer"}, {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}]
            if any(kind.get("type") == "array" for kind in kinds):  # `tasks: piqa` and `batch: 1` mean a list of one
                several = value.pop("anyOf", None) or [{key: value.pop(key) for key in ("type", "items") if key in value}]
                value["anyOf"] = [*several, {"type": "string"}, {"type": "integer"}]
    for definition in (options, *definitions.values()):
        if "properties" in definition:
            definition["properties"] = {key.replace("_", "-"): value for key, value in definition["properties"].items()}
            definition["required"] = [key.replace("_", "-") for key in definition.get("required", [])]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **options, "title": "A recipe of effconvert"}
