"""The model card: README.md in the Hub's format, rendered from the manifest and from results.

Metadata of the earlier card is carried over and its text is not, so rendering a card again gives the same card.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from effconvert.eval.results import Benchmark, Cell, Evaluation, Row, Value
from effconvert.eval.verification import Verification
from effconvert.hub.card_data import History, auto_class, front_matter, history, metadata, training, verification
from effconvert.modeling import loading
from effconvert.publishable import cut_paths, without_paths
from effconvert.steps import arguments

THIS = "this model"
NULL = "null is an option that was not set; teacher: null heals towards the model that is converted"
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
COSTS = {"prefill": "prefill", "first": "first token", "decode": "decode step", "cache": "KV cache", "peak": "peak memory"}


def render(
    manifest: dict[str, Any],
    config: dict[str, Any],
    before: str,
    results: Sequence[Evaluation | Benchmark] = (),
    repo: str | None = None,
    picture: str = "",
) -> str:
    """Return the card of a converted model.

    Args:
        manifest: its effconvert.json.
        config: its config.json.
        before: README.md of its source, or an earlier card of its own: metadata is carried over, text is not.
        results: results whose last subject is this model and whose first is the model it is compared with.
        repo: its id on the Hub, where it has one.
        picture: file with the picture of its training, beside the card.

    Raises:
        ModelError: the manifest is damaged.
    """
    manifest = without_paths(manifest)
    past, report = history(manifest), verification(manifest)
    name = repo or "-".join([past.source.rpartition("/")[2], *past.techniques])
    head = metadata(past, report, config, front_matter(before), results, name)
    evaluations = [result for result in results if isinstance(result, Evaluation)]
    benchmarks = [result for result in results if isinstance(result, Benchmark)]
    sections = {
        "": _summary(past, report, manifest, head),
        "How to load": _loading(manifest, config, repo),
        "What it cost": _cost(past, report),
        "Training": _training(manifest, picture),
        "Evaluation": "\n\n".join(map(_evaluation, evaluations)),
        "Speed and memory": "\n\n".join(map(_benchmark, benchmarks)),
        "Limits": "\n".join(f"- {limit}" for limit in _limits(past, report, manifest, head, results)),
        "Recipe": _recipe(past, manifest),
    }
    title = f"# {plain(repo.rpartition('/')[2] if repo else f'{past.source}, {_steps(past.recipe)}')}"
    body = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items() if text)
    return f"---\n{head.to_yaml()}\n---\n\n{title}\n\n{body}\n"


def plain(text: object) -> str:
    """Return `text` on one line, without paths of this machine, escaped for Markdown and its tables."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", cut_paths(" ".join(str(text).split())))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns after the first are right-aligned."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ruler, *rows])


def _steps(recipe: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    return ", then ".join(" ".join([name, *arguments(name, options, defaults=False)]) for step in recipe for name, options in step.items())


def _link(past: History) -> str:
    return f"[{past.source}](https://huggingface.co/{past.source})" if past.hub else plain(past.source)


def _summary(past: History, report: Verification | None, manifest: Mapping[str, Any], head: ModelCardData) -> str:
    lines = [f"{_link(past)}, converted to a cheaper architecture by effconvert {plain(str(manifest.get('effconvert', '')))}: `{_steps(past.recipe)}`."]
    if not past.hub and head.base_model:
        base_models = [head.base_model] if isinstance(head.base_model, str) else head.base_model
        lines[0] += f" The original's card names {', '.join(map(plain, base_models))} as its base model."
    if report is None:
        lines.append("**Not verified**: this checkpoint was written and never loaded or run.")
    elif past.exact(report):
        lines.append("The conversion is exact: logits changed by no more than rounding.")
    elif not past.healed:
        how_much = "The numbers below show how much" if report.after.quality else "How much was not measured at the conversion"
        lines.append(f"**Not healed**: the architecture was changed and nothing was refitted or trained, so quality is lost. {how_much}.")
    return "\n\n".join(lines)


def _loading(manifest: Mapping[str, Any], config: Mapping[str, Any], repo: str | None) -> str:
    name, place = auto_class(config)[0], json.dumps(repo or "path/to/this/folder")
    tokenizer = any(file in manifest.get("files", {}) for file in loading.TOKENIZERS)
    lines = [f"from transformers import {name}{', AutoTokenizer' if tokenizer else ''}", "", f"model = {name}.from_pretrained({place})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({place})"] if tokenizer else []
    message = "Stock transformers opens it; effconvert is not needed."
    if "effconvert" in config:
        message = "transformers has no class for its mixers: `pip install effconvert`, and import it first (or pass `trust_remote_code=True`)."
        lines = ["import effconvert", *lines]
    return "\n".join([message, "", "```python", *lines, "```"])


def _cost(past: History, report: Verification | None) -> str:
    if report is None:
        return ""
    before, after = report.before, report.after
    original = "the original" if past.from_original else "before the last conversion"
    rows: list[tuple[str, ...]] = [("parameters", f"{before.parameters:,}", f"{after.parameters:,}", f"{after.parameters / before.parameters:.3g} x")]
    if before.kv_bytes:
        rows.append(("bytes of KV cache a token", f"{before.kv_bytes:,}", f"{after.kv_bytes:,}", f"{after.kv_bytes / before.kv_bytes:.3g} x"))
    if after.state_bytes:
        rows.append(("bytes of mixers' states, for any length", f"{before.state_bytes:,}", f"{after.state_bytes:,}", ""))
    if before.quality and after.quality:
        rows.append(("perplexity ↓", *(f"{side.perplexity:.4g}" for side in (before.quality, after.quality)), ""))
    if after.quality and after.quality.kl is not None and after.quality.agreement is not None:
        rows += [
            (f"KL from {original}, nats a token ↓", "0", f"{after.quality.kl:.4g}", ""),
            ("same top token ↑", "100%", f"{after.quality.agreement:.1%}", ""),
        ]
    if report.difference is not None:
        rows.append(("largest change of a logit", "", f"{report.difference:.2g}", ""))
    parts = [table(["", original, THIS, "ratio"], rows)]
    if before.quality:
        first = "original:" if original == "the original" else "before:  "
        prompts = f"{first} {json.dumps(before.continuation, ensure_ascii=False)}\nthis:     {json.dumps(after.continuation, ensure_ascii=False)}"
        parts.append(f"Greedy continuations of the same prompt:\n\n```text\n{prompts}\n```")
    return "\n\n".join(parts)


def _training(manifest: Mapping[str, Any], picture: str) -> str:
    course = training(manifest)
    if not course:
        return ""
    rows = [
        (
            f"{point.tokens:,}",
            f"{point.seconds:,.0f}",
            f"{point.held_out:.4g}",
            "" if point.loss is None else f"{point.loss:.4g}",
            *(f"{point.scores[name]:.4g}" if name in point.scores else "" for name in course.scores),
        )
        for point in course.curve
    ]
    chosen = "the model is the best of these" if course.after < course.before else "none of these is better than it was, so it stayed as it was"
    markdown = table(["tokens", "seconds", f"held out: {plain(course.unit)} ↓", "loss", *map(plain, course.scores)], rows)
    image = f"![held-out distance and scores against tokens and minutes]({picture})\n\n" if picture else ""
    return f"Distilled on {plain(course.text)}; {course.held_out_windows} windows of it were held out, and {chosen}.\n\n{image}{markdown}"


def score(value: Value | None) -> str:
    """Return a score with its standard error."""
    return "-" if value is None else _with_error(value.value, value.error, "")


def _with_error(value: float, error: float | None, plus: str) -> str:
    return f"{value:{plus}.4g}" + ("" if error is None else f" ± {error:.2g}")


def _difference(value: Value | None) -> str:
    return "-" if value is None or value.difference is None else _with_error(value.difference, value.difference_error, "+")


def _significance(value: Value | None) -> str:
    if value is None or value.p is None:
        return "unknown"
    return ("yes" if value.significant else "no") + (", p < 0.001" if value.p < 0.001 else f", p = {value.p:.2g}")


def _evaluation(evaluation: Evaluation) -> str:
    compared = len(evaluation.subjects) > 1

    def cells(row: Row) -> Iterator[str]:
        yield f"{plain(row.task)}, {plain(row.metric)}{ARROWS[row.better]}"
        yield f"{row.documents:,}"
        yield "" if row.chance is None else f"{row.chance:.3g}"
        yield from map(score, row.values)
        if compared:
            yield from (_difference(row.values[-1]), _significance(row.values[-1]))

    header = ["task, metric", "documents", "guessing", *([plain(evaluation.subjects[0].name)] if compared else []), THIS]
    markdown = table([*header, *(["difference", "significant at 5 %"] if compared else [])], [list(cells(row)) for row in evaluation.rows])
    meaning = "± is one standard error." + (" Both models ran on the same documents, and the difference is taken document by document." if compared else "")
    return f"{markdown}\n\n{meaning} {_conditions(evaluation)}"


def _benchmark(benchmark: Benchmark) -> str:
    mine = len(benchmark.subjects) - 1

    def cells(cell: Cell) -> list[str]:
        rate = plain(cell.failure) if cell.failure else "-" if cell.decode_rate is None else f"{cell.decode_rate:.4g}"
        return [str(cell.batch), str(cell.context), rate, *(f"{cell.ratios[cost]:.3g} x" if cost in cell.ratios else "-" for cost in COSTS)]

    markdown = table(["batch", "context", "tokens written a second", *COSTS.values()], [cells(cell) for cell in benchmark.cells if cell.subject == mine])
    against = f" Ratios of times and of bytes to {plain(benchmark.subjects[0].name)} in the same run: below 1 is cheaper." if mine else ""
    return f"{markdown}\n\n{against.strip()} {_conditions(benchmark)}".rstrip()


def _conditions(result: Evaluation | Benchmark) -> str:
    settings = {key: result.settings.get(key) for key in ("device", "dtype", "num_fewshot", "limit", "max_length", "rounds", "cache")}
    message = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value is not None)
    return f"Measured {plain(result.date[:10])} on {plain(result.machine)} ({plain(message)}), with {plain(_versions(result.versions))}."


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{library} {number}" for library, number in versions.items())


def _limits(
    past: History, report: Verification | None, manifest: Mapping[str, Any], head: ModelCardData, results: Sequence[Evaluation | Benchmark]
) -> Iterator[str]:
    if report is None:
        yield "The conversion was not verified or measured."
    else:
        quality, made_with = report.after.quality, _versions(manifest.get("versions", {}))
        yield (
            f"Verified: reloaded from disk in transformers, every number finite, parameters and cache as planned. Computed in {plain(report.dtype)} on "
            f"{plain(report.device)}{f', with {plain(made_with)}' if made_with else ''}."
        )
        if not past.from_original:
            yield f"The verification compares the last conversion ({plain(_steps(past.recipe[-past.last :]))}) with the model before it."
        if quality:
            yield (
                f"Perplexity, KL and agreement are of one text ({plain(report.text)}): {quality.tokens:,} tokens in windows of {quality.context}, "
                "each predicted without the text before it. They have no error bars: they show a broken model, and cannot compare two good ones."
            )
        else:
            yield f"No quality was measured at the conversion: {plain(report.unmeasured)}."
    if not past.healed and not (report and past.exact(report)):
        yield "No healing: no weights were refitted or trained after the surgery."
    if not any(isinstance(result, Evaluation) for result in results):
        yield "No task was evaluated."
    yield "The evaluation results of the original's card are not repeated here: they are of another model. Its licence, limits and biases apply here too."
    if not head.license:
        yield "The original names no licence: find out which it is before you use or share this model."
    yield from (plain(note) for result in results for note in result.notes)


def _recipe(past: History, manifest: Mapping[str, Any]) -> str:
    steps = yaml.safe_dump([dict(step) for step in past.recipe], sort_keys=False, allow_unicode=True)
    at = f" at {plain(past.revision)}" if past.revision else ""
    unset = f"\n\nHere {NULL}." if any(value is None for step in past.recipe for options in step.values() for value in options.values()) else ""
    choices = "".join(f"\n\n{plain(choice)}." for choice in manifest.get("choices", ()))
    return f"From {_link(past)}{at}, with effconvert {plain(str(manifest.get('effconvert', '')))}:\n\n```yaml\n{steps}```{unset}{choices}"
