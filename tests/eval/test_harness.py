"""lm-eval's tasks: the same numbers as lm-eval's own, chance, groups, the cache, and what can be wrong with a task."""

import json
import subprocess
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import constants
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from effconvert.errors import OptionError
from effconvert.eval.quality import running
from tests.eval.evaluating import WORDS, choices, measure, moved, prose, row, write_task

EASY = ("--text", "prose.txt", "--tokens", "120", "--context", "30", "--no-generation", "--passkey", "")
FEW = [{"question": f"which {index}", "options": list(WORDS[index : index + 3]), "label": index % 3} for index in range(6)]
NEXT = list(pairwise(WORDS))


@pytest.fixture(autouse=True)
def own_datasets(tmp_path, monkeypatch):
    """Keep what the dataset library makes of the tasks' files beside them, have a short text here, and lm-eval not describe this machine."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it asks pip for a list of packages
    prose()


@pytest.fixture
def offline(monkeypatch):
    """What HF_HUB_OFFLINE=1 makes of the libraries when they are imported."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def tasks(tmp_path):
    """A task of each kind, a group of two and a tag of two."""
    folder = choices(tmp_path / "tasks", few=FEW, tag="picks")
    choices(folder, name="many", count=7, many=lambda index: 2 + index % 4, tag="picks")
    last = [{"text": f"{one} and", "target": other} for one, other in NEXT]
    metrics = [{"metric": "perplexity"}, {"metric": "acc"}]
    write_task(folder, "last", last, output_type="loglikelihood", doc_to_text="{{text}}", doc_to_target=" {{target}}", metric_list=metrics)
    metrics = [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}]
    write_task(folder, "roll", last, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}} {{target}}", metric_list=metrics)
    generation = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
    write_task(folder, "write", last, output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{target}}", **generation)
    for name, by_size in (("both", True), ("each", False)):
        group = {"group": name, "task": ["pick", "many"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return folder


def of_lm_eval(model, tasks, names, **how):
    """What lm-eval finds by itself: value and standard error of each task and metric."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what lm-eval says is not what is tested
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        settings = {"batch_size": 1, "device": "cpu", "task_manager": manager, **how}
        found = simple_evaluate(model="hf", model_args={"pretrained": str(model), "max_length": 64}, tasks=names, **settings)
    scores = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if which == "none" and not metric.endswith("_stderr"):
                error = metrics[f"{metric}_stderr,none"]
                scores[task, metric] = (value, None if error == "N/A" else error)
    return scores


def ours(model, tasks, names, **options):
    found = measure(model, tasks=",".join(names), include_path=tasks, **options)
    return {(held.task, held.metric): (held.values[0].value, held.values[0].error) for held in found.rows if held.task != "text"}


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("names", "how"),
    [
        (["pick", "last", "roll", "write"], {}),
        (["pick"], {"num_fewshot": 2}),
        (["many", "write"], {"limit": 5}),
        (["many", "pick"], {"limit": 0.3}),
        (["pick", "roll"], {"samples": {"pick": [1, 4, 9], "roll": [0, 3]}}),
        (["picks"], {}),
        (["each"], {"num_fewshot": 1}),
    ],
    ids=lambda given: "-".join(given) or "plain",
)
def test_scores_and_errors_are_those_of_lm_eval_to_the_last_digit(llama, tasks, names, how):
    assert ours(llama, tasks, names, **how) == of_lm_eval(llama, tasks, names, **how)


def test_a_second_model_is_asked_the_very_same(llama, tasks, tmp_path):
    other = moved(llama, tmp_path / "other")
    evaluation = measure(llama, other, tasks="each", include_path=tasks, num_fewshot=2)
    expected = of_lm_eval(other, tasks, ["each"], num_fewshot=2)
    for held in evaluation.rows:
        if held.task != "text":
            assert (held.values[1].value, held.values[1].error) == expected[held.task, held.metric]


def test_a_group_by_size_scores_as_in_lm_eval(llama, tasks):
    found, expected = ours(llama, tasks, ["both"]), of_lm_eval(llama, tasks, ["both"])
    assert found.keys() == expected.keys()
    assert {key: value for key, (value, _) in found.items()} == {key: value for key, (value, _) in expected.items()}


def test_a_group_by_size_has_the_error_of_lm_eval(llama, tasks):
    assert ours(llama, tasks, ["both"])["both", "acc"][1] == pytest.approx(of_lm_eval(llama, tasks, ["both"])["both", "acc"][1])


FILTERS = [
    {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
    {"name": "whole", "filter": [{"function": "take_first"}]},
]


@pytest.fixture
def filtered(tmp_path):
    """Two tasks and a group of them, with two filters: one gives what is right always, one never."""
    folder = tmp_path / "filtered"
    generation = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
    for name in ("one", "two"):
        rows = [{"text": first, "target": second} for first, second in NEXT]
        write_task(folder, name, rows, output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{target}}", filter_list=FILTERS, **generation)
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "group", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "exact_match"}]}))
    return folder


def test_each_filter_has_a_row_of_its_own(llama, filtered):
    found = ours(llama, filtered, ["one"])
    assert found.keys() == {("one", "exact_match,first"), ("one", "exact_match,whole")}


def test_a_group_has_a_score_for_each_filter(llama, filtered):
    evaluation = measure(llama, tasks="group", include_path=filtered)
    assert {(held.metric, held.documents) for held in evaluation.rows if held.task == "group"} == {("exact_match,first", 22), ("exact_match,whole", 22)}


def test_chance_is_one_over_the_number_of_choices(llama, tasks):
    evaluation = measure(llama, tasks="last,roll,write,both", include_path=tasks, limit=7)
    chances = {(held.task, held.metric): held.chance for held in evaluation.rows if held.task != "text"}
    many = sum(1 / (2 + index % 4) for index in range(7)) / 7
    assert chances == {
        ("pick", "acc"): pytest.approx(1 / 3),
        ("pick", "acc_norm"): pytest.approx(1 / 3),
        ("many", "acc"): pytest.approx(many),
        ("many", "acc_norm"): pytest.approx(many),
        ("last", "perplexity"): None,
        ("last", "acc"): 0,
        ("roll", "word_perplexity"): None,
        ("roll", "byte_perplexity"): None,
        ("roll", "bits_per_byte"): None,
        ("write", "exact_match"): 0,
        ("both", "acc"): pytest.approx((7 / 3 + 7 * many) / 14),
    }
    better = {held.metric: held.better for held in evaluation.rows}
    assert (better["acc"], better["exact_match"], better["word_perplexity"], better["perplexity"]) == ("higher", "higher", "lower", "lower")


def test_inputs_are_cut_short_as_in_lm_eval_and_counted(llama, tmp_path):
    folder = write_task(
        tmp_path / "tasks",
        "long",
        [{"text": "a long story " * 9, "target": "end"}, {"text": "short", "target": "end"}],
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target=" {{target}}",
        metric_list=[{"metric": "perplexity"}],
    )
    rolled = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    write_task(folder, "roll", [{"text": "a long story " * 9}], **rolled)
    sensitive = moved(llama, tmp_path / "sensitive")  # to every token that it reads
    evaluation = measure(sensitive, tasks="long", include_path=folder)
    assert ours(sensitive, folder, ["long", "roll"]) == of_lm_eval(sensitive, folder, ["long", "roll"])
    assert [note for note in evaluation.notes if "long: 1 inputs were longer than the model reads" in note]


# What was measured is not measured again.


@pytest.fixture
def computed(monkeypatch):
    """How often a task was run."""
    from effconvert.eval.quality.harness import Harness

    seen, run = [], Harness.run
    monkeypatch.setattr(Harness, "run", lambda self, name, *rest: seen.append(name) or run(self, name, *rest))
    return seen


@pytest.fixture
def loaded(monkeypatch):
    """Which models were loaded."""
    seen, load = [], running.load_measured
    monkeypatch.setattr(running, "load_measured", lambda opened, *rest: seen.append(opened.subject.name) or load(opened, *rest))
    return seen


def test_a_second_run_computes_nothing_and_says_the_same(llama, tasks, tmp_path, loaded):
    other = moved(llama, tmp_path / "other")
    given = {"tasks": "roll,write,both", "include_path": tasks, "generation": True}
    first = measure(llama, other, **given)
    assert loaded == ["tiny", "other"]
    second = measure(llama, other, **given)
    assert loaded == ["tiny", "other"]
    assert (first.rows, first.notes, first.continuations, first.prompt) == (second.rows, second.notes, second.continuations, second.prompt)
    third = measure(llama, other, **given, cache=False)
    assert loaded == ["tiny", "other"] * 2
    assert first.rows == third.rows


def test_one_model_is_in_memory_at_a_time(llama, tmp_path, monkeypatch):
    alive, load = [], running.load_measured

    def loads(*given):
        assert not [model for model in alive if model() is not None], "the model before is still there"
        model = load(*given)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(running, "load_measured", loads)
    measure(llama, moved(llama, tmp_path / "other"), generation=True)
    assert len(alive) == 2


def test_another_model_costs_the_originals_text_again_and_none_of_its_tasks(llama, tasks, tmp_path, computed):
    given = {"tasks": "pick", "include_path": tasks}
    measure(llama, moved(llama, tmp_path / "one"), **given)
    both = measure(llama, tmp_path / "one", moved(llama, tmp_path / "two", by=0.1), **given)
    assert computed == ["pick"] * 3
    assert all(row(both, "text", "kl").values[1:])
    assert both.rows == measure(llama, tmp_path / "one", tmp_path / "two", **given, cache=False).rows


def rewrite(file, old, new):
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))


CHANGES = {
    "document": lambda tasks, model: rewrite(tasks / "pick-test.jsonl", "sun 0", "sun 9"),
    "label": lambda tasks, model: rewrite(tasks / "pick-test.jsonl", '"label": 0', '"label": 1'),
    "prompt": lambda tasks, model: rewrite(tasks / "pick.yaml", "{{question}}:", "{{question}}?"),
    "metrics": lambda tasks, model: rewrite(tasks / "pick.yaml", "- metric: acc_norm\n", "- metric: acc_bytes\n"),
    "weight": lambda tasks, model: model.rename(model.with_name("old")) and moved(model.with_name("old"), model, by=0.1),
    "tokenizer": lambda tasks, model: rewrite(model / "tokenizer_config.json", "}", " }"),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_has_changed_is_measured_again(model, tasks, computed, change):
    given = {"tasks": "pick", "include_path": tasks}
    measure(model, **given)
    change(tasks, model)
    again = measure(model, **given)
    assert computed == ["pick", "pick"]
    assert again.rows == measure(model, **given, cache=False).rows


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "setting", [{"num_fewshot": 1}, {"limit": 5}, {"samples": {"pick": [3]}}, {"max_length": 50}, {"dtype": "float32"}, {"batch_size": 2}], ids=str
)
def test_what_is_asked_otherwise_is_measured_again(llama, tasks, computed, setting):
    measure(llama, tasks="pick", include_path=tasks)
    measure(llama, tasks="pick", include_path=tasks, **setting)
    assert computed == ["pick", "pick"]
    measure(llama, tasks="pick", include_path=tasks, **setting)
    assert computed == ["pick", "pick"]


def test_other_examples_are_measured_again(llama, tasks, computed):
    given = {"tasks": "pick", "include_path": tasks, "num_fewshot": 2}
    measure(llama, **given)
    (tasks / "pick-train.jsonl").write_text("".join(json.dumps({**one, "question": "another"}) + "\n" for one in FEW))
    measure(llama, **given)
    assert computed == ["pick", "pick"]


METRIC = """
def right():
    return 1.0

def process(doc, results):
    return {"acc": right()}
"""


@pytest.fixture
def scripted(tmp_path):
    """A task with Python beside it."""
    folder = choices(tmp_path / "tasks")
    (folder / "code.py").write_text(METRIC)
    content = (folder / "pick.yaml").read_text().replace("- metric: acc_norm\n", "") + "process_results: !function code.process\n"
    (folder / "pick.yaml").write_text(content)
    return folder


def test_a_task_with_python_beside_it_is_remembered_too(llama, scripted, computed):
    assert measure(llama, tasks="pick", include_path=scripted).rows == measure(llama, tasks="pick", include_path=scripted).rows
    assert computed == ["pick"]
    rewrite(scripted / "code.py", "right()}", "0.0}")
    measure(llama, tasks="pick", include_path=scripted)
    assert computed == ["pick", "pick"]


KEY = """
import sys
from pathlib import Path
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.harness import Harness
print(Harness(EvalOptions(tasks="pick", include_path=Path(sys.argv[1])), show_bars=False).key("pick")["task"])
"""


@pytest.mark.slow
def test_a_task_with_python_has_one_key_in_every_process(scripted, python, environment):
    (scripted / "pick.yaml").write_text((scripted / "pick.yaml").read_text() + "process_docs: !function code.documents\n")
    with (scripted / "code.py").open("a") as file:
        file.write("\n\ndef documents(dataset):\n    return dataset\n")
    keys = {subprocess.run([python, "-c", KEY, str(scripted)], env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(keys) == 1
    assert len(keys.pop().strip()) == 64


def test_another_function_of_a_tasks_python_is_measured_again(llama, scripted, computed):
    measure(llama, tasks="pick", include_path=scripted)
    rewrite(scripted / "code.py", "return 1.0", "return 0.0")
    measure(llama, tasks="pick", include_path=scripted)
    assert computed == ["pick", "pick"]


@pytest.mark.few(4)
@pytest.mark.parametrize("content", ["", "{", "[]", '{"samples": 1}', b"\xff"])
def test_a_damaged_cache_is_measured_again(llama, tasks, computed, tmp_path, content):
    first = measure(llama, tasks="pick", include_path=tasks)
    for file in (tmp_path / "cache" / "eval").glob("*.json"):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert measure(llama, tasks="pick", include_path=tasks).rows == first.rows
    assert computed == ["pick", "pick"]


def test_a_crash_in_the_second_task_keeps_the_first(llama, tasks, computed):
    (tasks / "broken.py").write_text("def process(doc, results):\n    raise ZeroDivisionError('a fault of the task')\n")
    choices(tasks, name="second", metric_list=[{"metric": "acc"}])
    with (tasks / "second.yaml").open("a") as file:
        file.write("process_results: !function broken.process\n")
    given = {"tasks": "pick,second", "include_path": tasks, "cache": True}
    with pytest.raises(Exception, match="a fault of the task"):
        measure(llama, **given)
    assert computed == ["pick", "second"]
    choices(tasks, name="second", metric_list=[{"metric": "acc"}])  # mended
    mended = measure(llama, **given)
    assert computed == ["pick", "second", "second"]
    assert mended.rows == measure(llama, **{**given, "cache": False}).rows


# What can be wrong with a task.


def refused(command, code, told, *arguments):
    result = command("eval", *arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    for part in told if isinstance(told, tuple) else (told,):
        assert part in line
    assert result.stdout == ""


def test_a_task_that_fails_while_it_runs_says_so_in_a_line(command, llama, tasks):
    (tasks / "broken.py").write_text("def process(doc, results):\n    raise ZeroDivisionError('a fault of the task')\n")
    with (tasks / "pick.yaml").open("a") as file:
        file.write("process_results: !function broken.process\n")
    refused(command, 2, ("pick", "a fault of the task"), llama, *EASY, "--tasks", "pick", "--include-path", tasks)


def test_an_answer_that_is_longer_than_what_is_read_is_said(command, llama, tasks):
    told = ("an answer in the task pick is longer than the 2 tokens that are read at a time", "give a larger --max-length")
    refused(command, 2, told, llama, *EASY, "--tasks", "pick", "--include-path", tasks, "--max-length", 2)


@pytest.mark.parametrize("option", [("--max-length", 32), ("--batch-size", 7), ("--include-path", "tasks")])
def test_what_is_for_tasks_alone_is_refused_without_any(command, llama, option):
    refused(command, 2, f"{option[0]} is for lm-eval's tasks, and none is named", llama, *EASY, *option)


@pytest.mark.slow  # lm-eval reads all of its tasks
def test_a_task_that_is_not_there_is_named_beside_the_nearest_of_the_askers_own_and_lm_evals(command, llama, tasks):
    choices(tasks, name="hellaswagg")
    told = ("there is no task 'helaswagg'; the nearest are", "hellaswagg", "hellaswag")
    refused(command, 2, told, llama, *EASY, "--tasks", "arc_easy,helaswagg", "--include-path", tasks)


def test_a_task_that_needs_a_network_says_so_where_there_is_none(command, llama, tasks, offline):
    content = yaml.safe_load((tasks / "pick.yaml").read_text())
    del content["dataset_kwargs"]
    (tasks / "far.yaml").write_text(yaml.safe_dump({**content, "task": "far", "dataset_path": "somebody/questions"}))
    told = ("the tasks far need data that is not here", "the Hub cannot be reached", "try again with a network")
    refused(command, 1, told, llama, *EASY, "--tasks", "far", "--include-path", tasks)


def test_no_network_is_exit_code_1_wherever_it_shows(command, llama, tasks, offline, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route")

    with monkeypatch.context() as broken:
        broken.setattr("lm_eval.evaluate", fail)
        refused(command, 1, ("the tasks pick need data that is not here", "try again with a network"), llama, *EASY, "--tasks", "pick", "--include-path", tasks)
    result = command("gqa", "--groups", 2, "--calibrate", "somebody/texts", llama, "-o", "out")
    assert (result.exit_code, "--calibrate somebody/texts is not here, and the Hub cannot be reached" in result.stderr) == (1, True), result.stderr


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("output_type: multiple_choice", "output_type: telepathy", "cannot be loaded"),
        ("test_split: test", "test_split: exam", "cannot be loaded"),
        ("pick-test.jsonl", "gone.jsonl", "cannot be loaded"),
        ("metric: acc\n", "metric: beauty\n", "cannot be loaded"),
    ],
)
def test_a_broken_task_file_is_refused(command, llama, tasks, old, new, told):
    rewrite(tasks / "pick.yaml", old, new)
    refused(command, 2, (told, "pick"), llama, *EASY, "--tasks", "pick", "--include-path", tasks)


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ('{"pik": [0]}', "--samples names the task 'pik', and --tasks has pick"),
        ('{"pick": [0, 12]}', "--samples for pick should be numbers from 0 to 11"),
        ('{"pick": [-1]}', "--samples for pick should be numbers from 0 to 11"),
        ('{"pick": []}', "--samples for pick should be numbers"),
        ('{"pick": ["a"]}', "--samples is 'a', and it should be a whole number"),
        ("[0]", "--samples is neither JSON"),
    ],
)
def test_samples_that_are_none_are_refused(command, llama, tasks, samples, told):
    refused(command, 2, told, llama, *EASY, "--tasks", "pick", "--include-path", tasks, "--samples", samples)


def test_samples_may_be_a_file(llama, tasks):
    Path("samples.json").write_text('{"pick": [4, 1]}')
    evaluation = measure(llama, tasks="pick", include_path=tasks, samples="samples.json")
    assert row(evaluation, "pick", "acc").documents == 2
    assert ours(llama, tasks, ["pick"], samples={"pick": [1, 4]}) == ours(llama, tasks, ["pick"], samples="samples.json")


def test_a_model_without_a_chat_template_is_not_asked_through_one(command, llama, tasks):
    refused(command, 2, "tiny has no chat template", llama, *EASY, "--tasks", "pick", "--include-path", tasks, "--apply-chat-template")


def test_a_chat_template_is_used_as_lm_eval_uses_it(model, tasks):
    (model / "chat_template.jinja").write_text("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")
    found = ours(model, tasks, ["pick"], apply_chat_template=True, num_fewshot=1, limit=4)
    assert found == of_lm_eval(model, tasks, ["pick"], apply_chat_template=True, num_fewshot=1, limit=4)


def test_a_task_that_executes_what_a_model_writes_is_refused_unless_it_is_allowed(command, llama, tasks):
    with (tasks / "write.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    refused(
        command, 2, "the task write executes code written by a model; give --confirm-run-unsafe-code", llama, *EASY, "--tasks", "write", "--include-path", tasks
    )
    evaluation = measure(llama, tasks="write", include_path=tasks, confirm_run_unsafe_code=True, limit=2)
    assert row(evaluation, "write", "exact_match").documents == 2


@pytest.mark.slow
def test_a_group_of_ones_own_may_hold_lm_evals_tasks(command, llama, tasks, offline):
    (tasks / "mine.yaml").write_text(yaml.safe_dump({"group": "mine", "task": ["pick", "piqa"], "aggregate_metric_list": [{"metric": "acc"}]}))
    result = command("eval", llama, *EASY, "--tasks", "mine", "--include-path", tasks)
    assert "the Hub cannot be reached" in result.stderr  # for piqa, which is found


@pytest.mark.parametrize("given", [{"num_fewshot": 2}, {"limit": 3}, {"samples": {"pick": [0]}}, {"apply_chat_template": True}], ids=str)
def test_what_is_about_tasks_needs_tasks(llama, given):
    with pytest.raises(OptionError, match="--tasks"):
        measure(llama, **given)


def test_examples_that_a_task_does_not_take_are_told_of(llama, tasks):
    rewrite(tasks / "pick.yaml", "test_split", "num_fewshot: 0\ntest_split")
    evaluation = measure(llama, tasks="pick", include_path=tasks, num_fewshot=2)
    assert [note for note in evaluation.notes if "pick" in note and "0" in note and "few" in note]
