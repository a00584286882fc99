"""lm-eval's tasks through its Python API: the same tasks, requests and metrics, one task at a time, with the contribution of each document."""

import contextlib
import inspect
import io
import json
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from traceback import extract_tb
from typing import Any

import numpy as np
import torch

from effconvert.errors import EffconvertError, OptionError, is_offline
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.paired import Better, Samples, pooled
from effconvert.eval.quality.store import Result
from effconvert.paths import expand

SEED, OTHER_SEED = 0, 1234  # lm-eval's own


class Harness:
    """The tasks of --tasks, loaded once for all models."""

    def __init__(self, options: EvalOptions, show_bars: bool) -> None:
        self.options, self.show_bars = options, show_bars
        self.notes: list[str] = []
        with _quiet(self.show_bars):
            loaded = _load(options)
        self.tasks: dict[str, Any] = dict(loaded["tasks"])
        self.groups: dict[str, Any] = {name: group for name, group in loaded["groups"].items() if group.has_aggregation}
        for name, task in self.tasks.items():
            if getattr(task, "UNSAFE_CODE", False) and not options.confirm_run_unsafe_code:
                raise OptionError(f"the task {name} executes code written by a model; give --confirm-run-unsafe-code where that is safe")
            if getattr(task, "MULTIMODAL", False):
                raise OptionError(f"the task {name} needs images, which these models do not read; leave it out")
            shots = options.num_fewshot if options.num_fewshot is not None else (task.get_config("num_fewshot") or 0)
            if task.get_config("num_fewshot") == 0 and options.num_fewshot:
                self.notes.append(f"{name} sets its num_fewshot to 0, so --num-fewshot does not apply to it, as in lm-eval")
            else:
                task.set_config(key="num_fewshot", value=shots)
        self._check_samples()

    def key(self, name: str) -> dict[str, Any]:
        """Return the part of the cache key that is the task's: its definition and its documents."""
        return {"task": self._definitions[name], "batch_size": self.options.batch_size, "apply_chat_template": self.options.apply_chat_template}

    def run(self, name: str, model: Any, tokenizer: Any, max_length: int | None) -> Result:
        """Run task `name` on `model`."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        batch = self.options.batch_size
        size = 1 if batch == "auto" and model.device.type == "cpu" else batch
        with _quiet(self.show_bars) as truncations:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=max_length)
            task = self.tasks[name]
            task.set_fewshot_seed(seed=OTHER_SEED)
            random.seed(SEED)
            np.random.seed(OTHER_SEED)
            torch.manual_seed(OTHER_SEED)
            try:
                results = evaluate(
                    lm,
                    {"tasks": {name: task}, "groups": {}, "group_map": {}},
                    limit=self._limit,
                    samples=self._chosen(name),
                    log_samples=True,
                    apply_chat_template=self.options.apply_chat_template,
                    fewshot_as_multiturn=self.options.apply_chat_template,
                    confirm_run_unsafe_code=self.options.confirm_run_unsafe_code,
                )
            except torch.OutOfMemoryError:
                raise EffconvertError(
                    f"no memory left for the task {name}; give a smaller --batch-size or --max-length, and run the same command again"
                ) from None
            except Exception as error:  # the task's own Python may raise anything
                if is_offline(error):
                    raise _reason(error, (name,)) from error
                last = extract_tb(error.__traceback__)[-1]
                if isinstance(error, AssertionError) and "lm_eval" in Path(last.filename).parts and "max_length" in (last.line or ""):
                    raise OptionError(
                        f"an answer in the task {name} is longer than the {lm.max_length} tokens that are read at a time; give a larger --max-length "
                        "if the models read more, or leave the task out"
                    ) from error
                raise OptionError(f"the task {name} failed ({type(error).__name__}: {error}); fix it, or leave it out") from error
        notes = (f"{name}: {truncations.count} inputs were longer than the model reads and lost their beginning",) if truncations.count else ()
        return Result(tuple(self._samples(name, results)), notes=notes)

    def combine(self, by_task: dict[str, tuple[Samples, ...]]) -> Iterator[Samples]:
        """Yield the scores of the groups, each computed from those of its tasks."""
        from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

        for name, group in self.groups.items():
            leaves = [task.task_name for task in group.get_all_tasks()]
            for rule in group.aggregate_metric_list:
                by_filter: dict[str, list[Samples]] = {}
                for samples in (samples for leaf in leaves for samples in by_task.get(leaf, ()) if samples.aggregation == "mean"):
                    metric, _, chosen = samples.metric.partition(",")
                    if metric == rule.metric and (rule.filter_list is None or (chosen or "none") in rule.filter_list):
                        by_filter.setdefault(samples.metric, []).append(samples)
                for metric, parts in by_filter.items():
                    sizes, errors = [len(part.items) for part in parts], [part.error for part in parts]
                    value = aggregate_subtask_metrics([part.value for part in parts], sizes, rule.weight_by_size)
                    error = None
                    if None not in errors:
                        error = pooled_sample_stderr(errors, sizes) if rule.weight_by_size else unweighted_mean_stderr(errors)
                    yield pooled(name, metric, str(group.version), parts, value, error, rule.weight_by_size)

    def _samples(self, name: str, results: Any) -> Iterator[Samples]:
        scores, logged = results["results"][name], results["samples"][name]
        for key, value in scores.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            documents = [document for document in logged if document["filter"] == chosen and metric in document]
            items = [_numbers(document[metric]) for document in documents]
            error = scores.get(f"{metric}_stderr,{chosen}")
            aggregation = _aggregation(self.tasks[name], metric) if None not in items else ""
            yield Samples(
                task=name,
                metric=metric if chosen == "none" else key,
                better=_better(results["higher_is_better"][name].get(metric)),
                chance=_chance(self.tasks[name], metric, documents),
                version=str(results["versions"][name]),
                aggregation=aggregation,
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                documents=tuple(document["doc_hash"] for document in documents),
                items=tuple(items) if aggregation else (),
            )

    @cached_property
    def _definitions(self) -> dict[str, str]:
        """A hash of each task's configuration and documents."""
        with _quiet(self.show_bars):
            return {name: self._definition(name, task) for name, task in self.tasks.items()}

    def _definition(self, name: str, task: Any) -> str:
        """Return a hash of a task's configuration and documents."""
        digest = sha256(json.dumps(task.dump_config(), default=_source, sort_keys=True).encode())
        chosen = self.options.samples.get(name) if self.options.samples else None
        for _, document in task.doc_iterator(limit=_count(self._limit, task), samples=list(chosen) if chosen else None):
            digest.update(json.dumps(document, default=str, sort_keys=True).encode())
        for document in (task.fewshot_docs() or ()) if task.get_config("num_fewshot") else ():
            digest.update(json.dumps(document, default=str, sort_keys=True).encode())
        for file in self._own_code:
            digest.update(file.read_bytes())
        return digest.hexdigest()

    @property
    def _own_code(self) -> list[Path]:
        """The Python files of --include-path, any of which a task may call; lm-eval's own code is covered by its version."""
        folder = self.options.include_path
        return sorted(expand(folder).rglob("*.py")) if folder else []

    @property
    def _limit(self) -> int | float | None:
        limit = self.options.limit
        return int(limit) if limit is not None and limit >= 1 else limit

    def _chosen(self, name: str) -> dict[str, list[int]] | None:
        chosen = self.options.samples
        return {name: list(chosen[name])} if chosen and name in chosen else None

    def _check_samples(self) -> None:
        for name, chosen in (self.options.samples or {}).items():
            if name not in self.tasks:
                raise OptionError(f"--samples names the task {name!r}, and --tasks has {', '.join(self.tasks)}; name one of these")
            count = len(self.tasks[name].eval_docs)
            if not chosen or not all(0 <= index < count for index in chosen):
                raise OptionError(f"--samples for {name} should be numbers from 0 to {count - 1}")


class _Truncations(logging.Handler):
    """Counts the inputs that lm-eval truncates, by its warnings."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a message about truncation."""
        self.count += "runcat" in record.getMessage() and record.levelno >= logging.WARNING


@contextlib.contextmanager
def _quiet(show_bars: bool) -> Iterator["_Truncations"]:
    """Silence lm-eval and its libraries, except for progress bars on a terminal; count the inputs that they truncate."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    counter, logger, hub = _Truncations(), logging.getLogger("lm_eval"), get_verbosity()
    set_verbosity(logging.CRITICAL)  # retries: only their result is reported
    level, propagates = logger.level, logger.propagate
    logger.addHandler(counter)
    logger.propagate = False
    hidden = contextlib.nullcontext() if show_bars and sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with hidden, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield counter
    finally:
        set_verbosity(hub)
        logger.removeHandler(counter)
        logger.setLevel(level)
        logger.propagate = propagates


def _load(options: EvalOptions) -> Any:
    """Find and load the tasks: first in --include-path, which is fast, then among all of lm-eval's, which takes seconds."""
    from lm_eval.tasks import TaskManager

    own = str(expand(options.include_path)) if options.include_path else None
    if own:
        manager = TaskManager(include_path=own, include_defaults=False)
        if all(name in manager.task_index for name in options.tasks):
            try:
                return manager.load(list(options.tasks))
            except Exception as error:  # task files, the dataset library and the network may raise anything
                if not set(options.tasks) & set(manager.all_groups):  # only a group may name tasks of lm-eval's
                    raise _reason(error, options.tasks) from error
    manager = TaskManager(include_path=own)
    for name in options.tasks:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, n=3)
            reason = f"the nearest are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
            raise OptionError(f"there is no task {name!r}; {reason}" + ("" if own else "; --include-path adds a folder of your own"))
    try:
        return manager.load(list(options.tasks))
    except Exception as error:
        raise _reason(error, options.tasks) from error


def _reason(error: Exception, names: tuple[str, ...]) -> EffconvertError:
    """Say why tasks did not load."""
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if is_offline(error):
        return EffconvertError(f"the tasks {', '.join(names)} need data that is not here, and the Hub cannot be reached ({reason}); try again with a network")
    return OptionError(f"the tasks {', '.join(names)} cannot be loaded ({reason}); fix the task file, or leave it out")


def _source(value: Any) -> str:
    """Serialise a value that JSON cannot: a function as its source, without its address in memory."""
    if callable(value):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    return str(value)


def _count(limit: int | float | None, task: Any) -> int | None:
    from lm_eval.evaluator_utils import get_sample_size

    count: int | None = get_sample_size(task, limit)
    return count


def _numbers(item: Any) -> Any:
    """Return an item as plain numbers, None where it is not numeric."""
    if isinstance(item, bool | int | float | np.number):
        return float(item)
    if isinstance(item, list | tuple) and item and all(isinstance(part, bool | int | float | np.number) for part in item):
        return tuple(float(part) for part in item)
    return None


def _aggregation(task: Any, metric: str) -> str:
    """Return lm-eval's name of a metric's aggregation function, "" where it has none."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    function = task.aggregation().get(metric)
    return next((str(name) for name, registered in AGGREGATION_REGISTRY.items() if registered is function), "")


def _better(higher: bool | None) -> Better | None:
    return None if higher is None else "higher" if higher else "lower"


def _chance(task: Any, metric: str, documents: list[Any]) -> float | None:
    """Return the score of guessing: one over the number of choices, or 0 where an answer has to be written."""
    if metric.startswith("exact_match") or (metric == "acc" and task.OUTPUT_TYPE != "multiple_choice"):
        return 0.0
    if metric not in ("acc", "acc_norm", "acc_bytes") or not documents:
        return None
    try:
        return float(np.mean([1 / len(task.doc_to_choice(document["doc"])) for document in documents]))
    except (AttributeError, TypeError):  # a task in Python without choices
        return None
