"""The model card: README.md in the Hub's format, made of what effconvert recorded when it converted and of what was measured since.

Metadata is carried over from the card before and text is not, so that a card made over a card is the same card.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from effconvert.eval.results import Benchmark, Cell, Evaluation, Row, Value
from effconvert.eval.verification import Verification
from effconvert.hub.card_data import History, auto_class, front_matter, history, metadata, verification
from effconvert.hub.publishable import nameless, without_paths
from effconvert.modeling import loading

THIS = "this model"
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
COSTS = {"prefill": "prefill", "first": "first token", "decode": "decode step", "cache": "KV cache", "peak": "peak memory"}


def render(manifest: dict[str, Any], config: dict[str, Any], before: str, results: Sequence[Evaluation | Benchmark] = (), repo: str | None = None) -> str:
    """Return the card of a converted model.

    Args:
        manifest: its effconvert.json.
        config: its config.json.
        before: README.md of its source, or an earlier card of its own: metadata is carried over, text is not.
        results: measurements whose last subject is this model and whose first is what it is compared with.
        repo: its id on the Hub, where it has one.

    Raises:
        ModelError: the manifest is damaged.
    """
    manifest = without_paths(manifest)
    past, report = history(manifest), verification(manifest)
    name = repo or "-".join([past.source.rpartition("/")[2], *past.techniques])
    head = metadata(past, report, config, front_matter(before), results, name)
    evaluations = [held for held in results if isinstance(held, Evaluation)]
    benchmarks = [held for held in results if isinstance(held, Benchmark)]
    sections = {
        "": _summary(past, report, manifest, head),
        "How to load": _loading(manifest, config, repo),
        "What it cost": _cost(past, report),
        "Evaluation": "\n\n".join(map(_evaluation, evaluations)),
        "Speed and memory": "\n\n".join(map(_benchmark, benchmarks)),
        "Limits": "\n".join(f"- {limit}" for limit in _limits(past, report, manifest, head, results)),
        "Recipe": _recipe(past, manifest),
    }
    title = f"# {plain(repo.rpartition('/')[2] if repo else f'{past.source}, {_steps(past.recipe)}')}"
    body = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items() if text)
    return f"---\n{head.to_yaml()}\n---\n\n{title}\n\n{body}\n"


def plain(text: object) -> str:
    """Return what somebody wrote on one line without paths of this machine, every character of it as itself in Markdown and in a table."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", nameless(" ".join(str(text).split())))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with numbers to the right of its first column."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ruler, *rows])


def _steps(recipe: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    spelt = [[name, *(f"--{key} {value}" for key, value in options.items() if value is not None)] for step in recipe for name, options in step.items()]
    return ", then ".join(" ".join(words) for words in spelt)


def _link(past: History) -> str:
    return f"[{past.source}](https://huggingface.co/{past.source})" if past.hub else plain(past.source)


def _summary(past: History, report: Verification | None, manifest: Mapping[str, Any], head: ModelCardData) -> str:
    lines = [f"{_link(past)}, converted to a cheaper architecture by effconvert {plain(str(manifest.get('effconvert', '')))}: `{_steps(past.recipe)}`."]
    if not past.hub and head.base_model:
        named = [head.base_model] if isinstance(head.base_model, str) else head.base_model
        lines[0] += f" The card that came with it names {', '.join(map(plain, named))} as its base model."
    if report is None:
        lines.append("**Not verified**: this checkpoint was written and never loaded or run.")
    elif report.difference is not None:
        lines.append("The conversion is exact: no logit may change, and none did beyond rounding.")
    elif not past.healed:
        lines.append("**Surgery alone**: nothing was trained after it, so quality is lost. The numbers below say how much.")
    return "\n\n".join(lines)


def _loading(manifest: Mapping[str, Any], config: Mapping[str, Any], repo: str | None) -> str:
    name, place = auto_class(config)[0], json.dumps(repo or "path/to/this/folder")
    tokenizer = any(file in manifest.get("files", {}) for file in loading.TOKENIZERS)
    lines = [f"from transformers import {name}{', AutoTokenizer' if tokenizer else ''}", "", f"model = {name}.from_pretrained({place})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({place})"] if tokenizer else []
    told = "Stock transformers opens it; effconvert is not needed."
    if "effconvert" in config:
        told = "It has mixers that transformers does not know: `pip install effconvert`, and import that first (or pass `trust_remote_code=True`)."
        lines = ["import effconvert", *lines]
    return "\n".join([told, "", "```python", *lines, "```"])


def _cost(past: History, report: Verification | None) -> str:
    if report is None:
        return ""
    before, after = report.before, report.after
    rows: list[tuple[str, ...]] = [("parameters", f"{before.parameters:,}", f"{after.parameters:,}", f"{after.parameters / before.parameters:.3g} x")]
    if before.kv_bytes:
        rows.append(("bytes of KV cache a token", f"{before.kv_bytes:,}", f"{after.kv_bytes:,}", f"{after.kv_bytes / before.kv_bytes:.3g} x"))
    if after.state_bytes:
        rows.append(("bytes that mixers hold of a sequence, however short", f"{before.state_bytes:,}", f"{after.state_bytes:,}", ""))
    if before.quality and after.quality:
        rows.append(("perplexity ↓", *(f"{side.perplexity:.4g}" for side in (before.quality, after.quality)), ""))
    if after.quality and after.quality.kl is not None and after.quality.agreement is not None:
        rows += [("KL from the source, nats a token ↓", "0", f"{after.quality.kl:.4g}", ""), ("same top token ↑", "100%", f"{after.quality.agreement:.1%}", "")]
    if report.difference is not None:
        rows.append(("largest change of a logit", "", f"{report.difference:.2g}", ""))
    source = "the source" if past.last == len(past.recipe) else "before the last conversion"
    parts = [table(["", source, THIS, "ratio"], rows)]
    if before.quality:
        prompts = f"source: {json.dumps(before.continuation, ensure_ascii=False)}\nthis:   {json.dumps(after.continuation, ensure_ascii=False)}"
        parts.append(f"What each writes after the same prompt, always the most likely token:\n\n```text\n{prompts}\n```")
    return "\n\n".join(parts)


def measured(value: Value | None) -> str:
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
        yield from map(measured, row.values)
        if compared:
            yield from (_difference(row.values[-1]), _significance(row.values[-1]))

    header = ["task, metric", "documents", "guessing", *([plain(evaluation.subjects[0].name)] if compared else []), THIS]
    made = table([*header, *(["difference", "significant at 5 %"] if compared else [])], [list(cells(row)) for row in evaluation.rows])
    meaning = "± is one standard error." + (" Both models were asked the same documents, and the difference is taken document by document." if compared else "")
    return f"{made}\n\n{meaning} {_conditions(evaluation)}"


def _benchmark(benchmark: Benchmark) -> str:
    mine = len(benchmark.subjects) - 1

    def cells(cell: Cell) -> list[str]:
        rate = plain(cell.failure) if cell.failure else "-" if cell.decode_rate is None else f"{cell.decode_rate:.4g}"
        return [str(cell.batch), str(cell.context), rate, *(f"{cell.ratios[cost]:.3g} x" if cost in cell.ratios else "-" for cost in COSTS)]

    made = table(["batch", "context", "tokens written a second", *COSTS.values()], [cells(cell) for cell in benchmark.cells if cell.subject == mine])
    against = f" Ratios of times and of bytes to {plain(benchmark.subjects[0].name)} in the same run: below 1 is cheaper." if mine else ""
    return f"{made}\n\n{against.strip()} {_conditions(benchmark)}".rstrip()


def _conditions(held: Evaluation | Benchmark) -> str:
    settings = {key: held.settings.get(key) for key in ("device", "dtype", "num_fewshot", "limit", "max_length", "rounds", "cache")}
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value is not None)
    return f"Measured {plain(held.date[:10])} on {plain(held.machine)} ({plain(told)}), with {plain(_versions(held.versions))}."


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{library} {number}" for library, number in versions.items())


def _limits(
    past: History, report: Verification | None, manifest: Mapping[str, Any], head: ModelCardData, results: Sequence[Evaluation | Benchmark]
) -> Iterator[str]:
    if report is None:
        yield "Nothing of it was verified or measured when it was converted."
    else:
        quality, made_with = report.after.quality, _versions(manifest.get("versions", {}))
        yield (
            f"Verified: reloaded from disk in stock transformers, every number finite, parameters and cache as planned. Computed in {plain(report.dtype)} on "
            f"{plain(report.device)}{f', with {plain(made_with)}' if made_with else ''}."
        )
        if past.last < len(past.recipe):
            yield f"What was verified is the last conversion ({plain(_steps(past.recipe[-past.last :]))}), beside the model that it was given."
        if quality:
            yield (
                f"Perplexity, KL and agreement are of one text ({plain(report.text)}): {quality.tokens:,} tokens in windows of {quality.context}, "
                "each predicted from its own beginning only. They have no error bars: they show ruin, and cannot tell two good models apart."
            )
        else:
            yield f"No quality was measured at the conversion: {plain(report.unmeasured)}."
    if not past.healed and (report is None or report.difference is None):
        yield "No healing: no weight was refitted or trained after the surgery."
    if not any(isinstance(held, Evaluation) for held in results):
        yield "No task was evaluated."
    yield "The evaluation results of the original's card are not repeated here: they are of another model. Its licence, limits and biases hold here too."
    if not head.license:
        yield "What came with the source names no licence: find out which it is before you use or share this."
    yield from (plain(note) for held in results for note in held.notes)


def _recipe(past: History, manifest: Mapping[str, Any]) -> str:
    steps = yaml.safe_dump([dict(step) for step in past.recipe], sort_keys=False, allow_unicode=True)
    at = f" at {plain(past.revision)}" if past.revision else ""
    return f"From {_link(past)}{at}, with effconvert {plain(str(manifest.get('effconvert', '')))}:\n\n```yaml\n{steps}```"
