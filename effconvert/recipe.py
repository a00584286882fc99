"""Recipes: conversions written down. Reads them, and says what is wrong with them in the words of the command line.

A file holds one recipe or several (YAML documents); one may begin from what another one writes. Paths are those of the folder that
`effconvert run` is called in.
"""

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
from effconvert.options import Conversion, Options, shown
from effconvert.paths import expand, real
from effconvert.surgery._surgery import Step

Kind = TypeVar("Kind", bound=Options)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the last would win, and nobody would know."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)] if isinstance(node, yaml.MappingNode) else []
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class Recipe(Conversion):
    """One conversion, with what is measured afterwards."""

    model: str = Field(min_length=1, description="Folder, Hub id or .gguf file to begin from.")
    steps: tuple[Step, ...] = Field(min_length=1, description="Techniques in order, each with its options.")
    keep_stages: bool = Field(False, description="Write what stands after each step too, as OUTPUT-1-…, OUTPUT-2-…")
    evaluate: EvalOptions | None = Field(None, description="Measure the model and what became of it, as `effconvert eval` does; written to OUTPUT-eval.json.")
    bench: BenchOptions | None = Field(None, description="Measure how fast they are, as `effconvert bench` does; written to OUTPUT-bench.json.")
    report: bool = Field(False, description="Write the report, OUTPUT-report.html.")

    @property
    def target(self) -> Path:
        """The folder to write."""
        from effconvert.convert.run import default_name

        folder = expand(self.output or default_name(self.model, self.steps))
        if not folder.name:
            raise OptionError(f"--output {str(folder)!r} is not the name of a new folder; give one")
        return folder

    def beside(self, what: str) -> Path:
        """Return where a file about the output goes: smol-mqa-eval.json."""
        return self.target.with_name(f"{self.target.name}-{what}")


def read(path: Path, **instead: Any) -> list[Recipe]:
    """Read the recipes in a file, in an order in which each finds what it begins from.

    Args:
        path: a YAML file.
        instead: options that replace what the file says, as the command line does; only for a file with one recipe.

    Raises:
        OptionError: the file is not there, is not YAML, or asks for something impossible; what, and where in it.
    """
    try:
        documents = [document for document in yaml.load_all(expand(path).read_text(encoding="utf-8"), _Loader) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); give a recipe, a YAML file") from None
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:  # dates, numbers: 2001-99-99
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise OptionError(f"{path} is not YAML{where} ({getattr(error, 'problem', None) or type(error).__name__}); mend the file") from None
    if not documents:
        raise OptionError(f"{path} holds no recipe; one begins with `model:` and `steps:`")
    if instead and len(documents) > 1:
        raise OptionError(
            f"{path} holds {len(documents)} recipes, and --{next(iter(instead)).replace('_', '-')} could be meant for any; write it into the file"
        )
    recipes = [_parse(document, f"{path}{f', recipe {number}' if len(documents) > 1 else ''}", instead) for number, document in enumerate(documents, 1)]
    return order(recipes)


def _parse(document: Any, where: str, instead: Mapping[str, Any]) -> Recipe:
    """Make a recipe of a YAML document."""
    given = {**_spelt(document, Recipe, where), **instead}
    if "model" in instead:
        given.pop("revision", None)  # which was that of the recipe's own model
    steps = given.get("steps")
    if isinstance(steps, Mapping | str):
        steps = [steps]
    if isinstance(steps, Sequence) and not isinstance(steps, str):
        given["steps"] = tuple(step(one, f"{where}, step {number}") for number, one in enumerate(steps, 1))
    for name, kind in (("evaluate", EvalOptions), ("bench", BenchOptions)):
        if name in given and given[name] is not None:
            asked = {} if given[name] is True else given[name]  # `evaluate: true` is all of it as it comes, `false` none
            given[name] = _make(kind, _spelt(asked, kind, f"{where}, {name}"), f"{where}, {name}") if asked is not False else None
    return _make(Recipe, given, where)


def step(given: Any, where: str) -> Step:
    """Make a surgery of a step: `gqa: {groups: 8}`, or a bare name.

    Raises:
        OptionError: there is no such technique, or its options are wrong.
    """
    if isinstance(given, Step):
        return given
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, Mapping) or len(given) != 1:
        raise OptionError(f"{where} is {shown(given)}, and it should be one technique with its options, like `gqa: {{groups: 8}}`")
    (name, options), known = next(iter(given.items())), known_steps.catalogue()
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        raise OptionError(f"{where}: there is no technique {shown(name)}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"))
    technique = known_steps.load(name)
    return _make(technique, _spelt({} if options is None else options, technique, f"{where} ({name})"), f"{where} ({name})")


def _spelt(given: Any, kind: type[Options], where: str) -> dict[str, Any]:
    """Return the options as Python spells them."""
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise OptionError(f"{where} is {shown(given)}, and it should be options with their values, like `{next(iter(kind.model_fields)).replace('_', '-')}: …`")
    made = {key.replace("-", "_"): value for key, value in given.items()}
    if len(made) < len(given):
        raise OptionError(f"{where} says something twice, with - and with _; say it once")
    return made


def _make(kind: type[Kind], given: Mapping[str, Any], where: str) -> Kind:
    try:
        return kind(**given)
    except EffconvertError as error:
        raise OptionError(f"{where}: {error}") from None


def order(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return the recipes so that each comes after the one whose output it begins from.

    Raises:
        OptionError: two write the same folder, one writes into what another needs, or they wait for each other.
    """
    writes: dict[Path, Recipe] = {}
    for recipe in recipes:
        for folder in outputs(recipe):
            if writes.setdefault(real(folder), recipe) is not recipe:
                raise OptionError(f"two recipes write {folder}; give each its own output")
    _check_apart(writes, [real(recipe.model) for recipe in recipes])
    done: list[Recipe] = []
    for recipe in recipes:
        waiting = [recipe]
        while (before := writes.get(real(waiting[-1].model))) is not None and before not in done:
            if before in waiting:
                circle = [one.model for one in waiting[waiting.index(before) :]]
                raise OptionError(
                    f"these recipes wait for each other's output: {' <- '.join([*circle, circle[0]])}; begin one of them from a model that is there"
                )
            waiting.append(before)
        done += [one for one in reversed(waiting) if one not in done]
    return done


def _check_apart(writes: Iterable[Path], models: Sequence[Path]) -> None:
    """Refuse outputs that lie in one another or in a model, or where another one is built."""
    from effconvert.convert.output import partial_folder, replaced_folder  # which imports torch: a schema must not wait for it

    for folder in writes:
        for place in (folder, partial_folder(folder), replaced_folder(folder)):
            for other in {*writes, *models} - {folder}:
                if other == place or place in other.parents or other in place.parents:
                    raise OptionError(f"{place}, which is needed for an output, and {other} are the same or lie one inside the other; give another output")


def outputs(recipe: Recipe) -> Iterator[Path]:
    """Yield the folders that a recipe writes, the last one last."""
    if recipe.keep_stages:
        for number, done in enumerate(recipe.steps[:-1], 1):
            yield recipe.beside(f"{number}-{done.name}")
    yield recipe.target


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, made of the options themselves."""
    made = Recipe.model_json_schema(mode="validation")
    definitions = made.setdefault("$defs", {})
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
    for asked in ("evaluate", "bench"):
        made["properties"][asked]["anyOf"].append({"type": "boolean"})
    made["properties"]["steps"] = {"type": "array", "minItems": 1, "description": made["properties"]["steps"]["description"], "items": {"anyOf": choices}}
    for held in definitions.values():
        for value in held.get("properties", {}).values():
            kinds = value.get("anyOf", [value])
            if any(kind.get("type") == "array" for kind in kinds):  # `tasks: piqa` and `batch: 1` mean one of them
                several = value.pop("anyOf", None) or [{key: value.pop(key) for key in ("type", "items") if key in value}]
                value["anyOf"] = [*several, {"type": "string"}, {"type": "integer"}]
    for held in (made, *definitions.values()):
        if "properties" in held:
            held["properties"] = {key.replace("_", "-"): value for key, value in held["properties"].items()}
            held["required"] = [key.replace("_", "-") for key in held.get("required", [])]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "A recipe of effconvert"}
