"""What is written beside the weights: the manifest's record of a conversion, its recipe and its model card."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from effconvert.checkpoint import sources
from effconvert.checkpoint.belonging import text_of
from effconvert.checkpoint.manifest import CARD, MANIFEST, RECIPE, read_manifest
from effconvert.convert import output
from effconvert.convert.plan import Plan
from effconvert.eval.results import versions
from effconvert.eval.verification import Verification
from effconvert.hub.card import NULL, render
from effconvert.options import CALIBRATION_WORDS, RunOptions
from effconvert.paths import expand, seen_from
from effconvert.version import __version__

CALIBRATION_OPTIONS = ("calibrate", "calibration_tokens", "calibration_window")  # options of calibration


def record(conversion: Plan, source: dict[str, Any], report: Verification | None, layer_errors: Mapping[str, Any], choices: Sequence[str]) -> dict[str, Any]:
    """Return what the manifest says of this conversion."""
    record = {"source": source, "verified": report is not None, "report": report and asdict(report), "versions": versions()}
    if conversion.calibration and not conversion.calibration.pending:
        record["calibration"] = conversion.calibration.record
    if layer_errors:
        record["layer_errors"] = layer_errors
    if choices:
        record["choices"] = list(choices)
    return record


def source(model: str, options: RunOptions, folder: Path) -> dict[str, Any]:
    """Return where the model came from, back to the first original. Of a folder only the name: others will read this."""
    source = {"model": folder.name if expand(model).exists() else model, "revision": options.revision, "commit": sources.commit(folder)}
    before = read_manifest(folder)
    origin = {key: before[key] for key in ("effconvert", "recipe", "source", "verified") if key in before}
    return {**source, **({"made_by": origin} if origin else {})}


def texts(model: str, plan: Plan, target: Path, options: RunOptions, record: dict[str, Any]) -> dict[str, str]:
    """Return the files that people read: the recipe, which makes the same bytes again, and the model card. Its paths are as seen from `target`."""

    def read(options: Mapping[str, Any]) -> dict[str, Any]:
        named = {
            key: seen_from(target, value)
            for key in ("model", "teacher", "base", "instruct", "calibrate", "data", "cache-teacher", "include-path")
            if (value := options.get(key)) and value not in CALIBRATION_WORDS
        }
        return {**options, **named}

    source = record["source"]
    revision = None if expand(model).exists() else source["commit"] or source["revision"]
    settings = {name.replace("_", "-"): getattr(options, name) for name in CALIBRATION_OPTIONS} if plan.needs_text else {}
    steps = [{name: read(own) for name, own in step.items()} for step in plan.recipe]
    recipe = read({"model": model, "revision": revision, "steps": steps, **settings})
    recipe_text = f"# Written by effconvert {__version__}. The same bytes again: effconvert run {RECIPE} -o DIR\n"
    if plan.calibration and plan.calibration.key:
        recipe_text += f"# The model wrote its calibration text. Other machines and versions may sample another one; {MANIFEST} has the sha256 of this one.\n"
    if any(value is None for step in steps for own in step.values() for value in own.values()):
        recipe_text += f"# {NULL}.\n"
    recipe_text += "".join(f"# {choice}\n" for choice in record.get("choices", ()))
    before = text_of(plan.checkpoint.folder / CARD) or ""
    manifest = {**output.identity(plan), **record, "files": dict.fromkeys(plan.output_files)}
    recipe_text += yaml.safe_dump({key: value for key, value in recipe.items() if value}, sort_keys=False, allow_unicode=True)
    return {RECIPE: recipe_text, CARD: render(manifest, plan.config.content, before)}
