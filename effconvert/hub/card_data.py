"""The metadata of a model card: base model, licence, tags, task and evaluation results; and the model's history."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from pydantic import TypeAdapter, ValidationError

from effconvert import steps
from effconvert.checkpoint.sources import HUB_ID
from effconvert.errors import ModelError
from effconvert.eval.results import Benchmark, Evaluation
from effconvert.eval.training import Training
from effconvert.eval.verification import Verification

# Metadata that a converted model shares with its original. Evaluation results are not among it: the model is another.
CARRIED = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "datasets")
# Tags of files that a conversion leaves behind.
FORMATS = {"coreml", "exl2", "gguf", "jax", "mlx", "onnx", "openvino", "pytorch", "tf", "tflite", "transformers.js"}
ON_TEXT = {"text", "masked", "states", "targets"}  # of our own measurements, those on the text that was given
# Ending of a transformers class -> the Auto class that opens it, and the Hub's name of its task.
TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "Model": ("AutoModel", "feature-extraction"),
}


@dataclass(frozen=True)
class History:
    """The conversions that led to a model, from the first original on."""

    source: str  # Hub id or folder name of the first original
    hub: bool  # whether it is on the Hub
    revision: str | None  # its commit, where that is known
    recipe: tuple[Mapping[str, Mapping[str, Any]], ...]  # all steps since
    last: int  # number of steps in the last conversion, which the verification covers
    from_original: bool  # whether that began from the first original, so that the verification compares with it

    @property
    def techniques(self) -> list[str]:
        """The name of each step, once."""
        return list(dict.fromkeys(name for step in self.recipe for name in step))

    @property
    def healed(self) -> bool:
        """Whether the recipe has healing steps."""
        return not set(self.techniques) <= {*steps.techniques(), "transplant"}  # which recovers nothing

    def exact(self, report: Verification) -> bool:
        """Whether nothing was lost since the original: the one conversion that there was may change no logit, and did not."""
        return self.from_original and report.difference is not None


def history(manifest: Mapping[str, Any]) -> History:
    """Follow a manifest back to the first model.

    Raises:
        ModelError: the manifest is damaged.
    """
    steps: list[Mapping[str, Mapping[str, Any]]] = []
    try:
        last, from_original = len(manifest["recipe"]), not manifest["source"].get("made_by")
        while True:
            steps = [*manifest["recipe"], *steps]
            source = manifest["source"]
            if not source.get("made_by"):
                break
            manifest = source["made_by"]
        model, commit = str(source["model"]), source.get("commit")
        for step in steps:
            if not all(isinstance(options, dict) for options in step.values()):
                raise TypeError(step)
    except (AttributeError, KeyError, TypeError):
        raise ModelError("effconvert.json is damaged: it does not say what was converted, and how; convert again") from None
    # A folder in huggingface_hub's cache is named like its commit.
    hub = bool(commit and commit != model and HUB_ID.match(model))
    return History(model, hub, commit or source.get("revision"), tuple(steps), last, from_original)


def verification(manifest: Mapping[str, Any]) -> Verification | None:
    """Return the verification's results, None where the model was not verified.

    Raises:
        ModelError: the manifest is damaged, or another version wrote it.
    """
    if manifest.get("report") is None:
        return None
    try:
        return TypeAdapter(Verification).validate_python(manifest["report"])
    except ValidationError:
        raise ModelError("effconvert.json is damaged, or another version of effconvert wrote it: its report cannot be read; convert again") from None


def training(manifest: Mapping[str, Any]) -> Training | None:
    """Return the course of its distillation, None where it was not distilled, or an earlier version wrote it down in another way."""
    try:
        return TypeAdapter(Training).validate_python(manifest["distillation"]) if manifest.get("distillation") else None
    except ValidationError:
        return None


def front_matter(readme: str) -> dict[str, Any]:
    """Return the metadata of a README.md; empty where there is none, or it cannot be read."""
    match = REGEX_YAML_BLOCK.search(readme.removeprefix("\ufeff"))
    try:
        content = yaml.load(match[2], yaml.BaseLoader) if match else {}  # every value as text, so that Norwegian (no) is not False
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def metadata(
    past: History, report: Verification | None, config: Mapping[str, Any], before: Mapping[str, Any], results: Sequence[Evaluation | Benchmark], name: str
) -> ModelCardData:
    """Return the card's metadata: base model, licence, task, tags and scores."""
    carried: dict[str, Any] = {key: words for key in CARRIED if (words := _words(before.get(key)))}
    task = auto_class(config)[1]
    tags = _words(before.get("tags")) or []
    scores = [*_verified(past, report, task), *(score for value in results if isinstance(value, Evaluation) for score in _scores(value, task))]
    return ModelCardData(
        base_model=past.source if past.hub else _words(before.get("base_model")),
        # Of the Hub's four relations (finetune, adapter, merge, quantized) none is true of surgery alone.
        base_model_relation="finetune" if past.healed else None,
        tags=[*(tag for tag in ([tags] if isinstance(tags, str) else tags) if tag.lower() not in FORMATS), "effconvert", *past.techniques],
        model_name=name.rpartition("/")[2] if scores else None,
        eval_results=scores or None,
        **{"library_name": "transformers", "pipeline_tag": task, **carried},
    )


def _words(value: Any) -> str | list[str] | None:
    """Return a string or a list of strings; None for anything else, which the Hub would refuse."""
    if isinstance(value, list):
        return [word for word in value if isinstance(word, str)] or None
    return value if isinstance(value, str) and value else None


def _verified(past: History, report: Verification | None, task: str | None) -> list[EvalResult]:
    quality = report and report.after.quality
    if not report or not quality:
        return []
    # Scores of one type and config are one entry: without configs, those of an evaluation would stand under this text.
    about: dict[str, Any] = {"dataset_type": "text", "dataset_name": report.text, "dataset_config": "verification"}
    about["dataset_args"] = {"tokens": quality.tokens, "context": quality.context}
    distances = {"kl_from_original": quality.kl, "same_top_token_as_original": quality.agreement} if past.from_original else {}
    values = {"perplexity": quality.perplexity, **distances}
    return [EvalResult(task or "other", metric_type=metric, metric_value=value, **about) for metric, value in values.items() if value is not None]


def _scores(evaluation: Evaluation, task: str | None) -> list[EvalResult]:
    fewshot, text = evaluation.settings.get("num_fewshot"), str(evaluation.settings.get("text"))
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=row.task,
            dataset_name=text if row.task in ON_TEXT else row.task,
            dataset_config=text if row.task in ON_TEXT else None,
            dataset_args={"documents": row.documents, "version": row.version} | ({"num_few_shot": fewshot} if fewshot is not None else {}),
            metric_type=row.metric,
            metric_value=value.value,
        )
        for row in evaluation.rows
        if (value := row.values[-1]) is not None
    ]


def auto_class(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the Auto class that opens a model, and the Hub's name of its task, where it has one."""
    architecture = str((config.get("architectures") or ["AutoModel"])[0])
    if config.get("is_encoder_decoder") and architecture.endswith(("ForConditionalGeneration", "MTModel")):
        return "AutoModelForSeq2SeqLM", None  # what it writes, translations or summaries, nobody says
    return next((classes for ending, classes in TASKS.items() if architecture.endswith(ending)), (architecture, None))
