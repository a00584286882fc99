"""The model card: what the Hub reads of it, what people read, and what must not stand in it."""

import re
from dataclasses import asdict
from typing import Any

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard

from effconvert.errors import ModelError
from effconvert.eval.quality.perplexity import Quality
from effconvert.eval.results import Benchmark, Cell, Evaluation, Row, Subject, Timing, Value
from effconvert.eval.verification import Side, Verification
from effconvert.families import FAMILIES
from effconvert.hub.card import render
from effconvert.hub.card_data import auto_class
from effconvert.publishable import cut_paths, without_paths

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
COMMIT = "a" * 40
HUB = {"model": "lab/tiny", "revision": "v1", "commit": COMMIT}
LOCAL = {"model": "tiny", "revision": None, "commit": None}
ORIGINAL = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language:
- no
- en
base_model: lab/older
datasets: lab/text
tags: [onnx, small]
inference: false
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {type: piqa, name: PIQA}
    metrics: [{type: acc, value: 0.99}]
---
# Tiny, the best of all models
"""


def report(**changes: Any) -> Verification:
    before = Side(1000, 64, Quality(2.0, 4088, 512), "a sea")
    after = Side(900, 16, Quality(3.0, 4088, 512, 1.25, 0.375), "a | b ``` c")
    fields = {"before": before, "after": after, "difference": None, "text": "novels.txt", "dtype": "bfloat16", "device": "cpu", "unmeasured": ""}
    return Verification(**{**fields, **changes})


def manifest(source: dict[str, Any] = HUB, measured: Verification | None = None, **changes: Any) -> dict[str, Any]:
    measured = measured or report()
    recipe = [{"gqa": {"groups": 2, "pool": "mean"}}]
    held = {"effconvert": "0.1.0", "recipe": recipe, "source": source, "verified": True, "report": asdict(measured), "files": {"tokenizer.json": 1}}
    return {**held, **changes}


def subject(name: str) -> Subject:
    return Subject(name, name, None, "llama", "LlamaForCausalLM", "bfloat16", 1000, 2000, 258, 64)


def evaluation(*names: str, **changes: Any) -> Evaluation:
    values = (Value(0.7312345678901234, 0.01), Value(0.6012345678901234, 0.011, -0.13, 0.0087, 1e-9, 0.4))
    unsure = (Value(12.5, 0.3), Value(12.625, None, 0.125, None, 0.4))
    rows = (
        Row("piqa", "acc_norm", "higher", 0.5, 1838, "1.0", values[-len(names) :]),
        Row("wiki|text", "word_perplexity", "lower", None, 62, "2.0", unsure[-len(names) :]),
    )
    fields = {
        "subjects": tuple(map(subject, names)),
        "rows": rows,
        "continuations": (),
        "prompt": "",
        "notes": ("wikitext lost <b>beginnings</b>",),
        "settings": {"num_fewshot": 3, "limit": None, "device": "cuda", "dtype": "auto"},
        "versions": {"torch": "2.13.0"},
        "machine": "a GPU",
        "date": "2026-11-22T12:00:00+00:00",
    }
    return Evaluation(**{**fields, **changes})


def benchmark() -> Benchmark:
    timing = Timing(0.5, 0.4, 0.6, (0.4, 0.5, 0.6))
    cells = (
        Cell(0, 4, 512, timing, timing, timing, None, None, None, None, {}),
        Cell(1, 4, 512, timing, timing, timing, None, None, None, None, {"prefill": 1.02, "decode": 0.75, "cache": 0.5}),
        Cell(1, 8, 512, None, None, None, None, None, None, None, {}, "out of memory"),
    )
    return Benchmark(
        (subject("tiny"), subject("out")), cells, 1e9, (), {"device": "cpu", "rounds": 3}, {"torch": "2.13.0"}, "a CPU", "2026-11-21T12:00:00+00:00"
    )


def test_what_stays_true_of_a_converted_model_is_carried_over_and_the_rest_is_not() -> None:
    card = ModelCard(render(manifest(), CONFIG, ORIGINAL))
    held = card.data.to_dict()
    assert held["base_model"] == "lab/tiny"
    assert "base_model_relation" not in held  # the Hub has no word for surgery
    assert (held["license"], held["license_name"], held["license_link"]) == ("other", "tiny-licence", "LICENSE")
    assert held["language"] == ["no", "en"]  # which YAML would take for false
    assert held["datasets"] == "lab/text"
    assert held["tags"] == ["small", "effconvert", "gqa"]
    assert held["pipeline_tag"] == "text-generation"
    assert held["library_name"] == "transformers"
    assert "inference" not in held
    assert 0.99 not in [result.metric_value for result in card.data.eval_results]
    assert "best of all" not in card.text


def test_scores_on_one_text_do_not_stand_under_another() -> None:
    """The Hub joins results of one task and type of dataset, unless their configs differ."""
    row = Row("text", "perplexity", "lower", None, 8, "1", (Value(7.5, 0.3),))
    card = ModelCard(render(manifest(), CONFIG, ORIGINAL, [evaluation("tiny", rows=(row,), settings={"text": "novel.txt"})]))
    (model,) = card.data.to_dict()["model-index"]
    found = {entry["dataset"]["name"]: {metric["type"]: metric["value"] for metric in entry["metrics"]} for entry in model["results"]}
    assert found["novel.txt"] == {"perplexity": 7.5}
    assert len(found) == 2
    assert {metrics["perplexity"] for metrics in found.values()} > {7.5}


def test_a_local_model_has_the_base_model_that_its_card_names() -> None:
    card = ModelCard(render(manifest(LOCAL), CONFIG, ORIGINAL))
    assert card.data.base_model == "lab/older"
    assert "names lab/older as its base model" in card.text
    assert ModelCard(render(manifest(LOCAL), CONFIG, "")).data.base_model is None
    snapshot = {"model": COMMIT, "revision": None, "commit": COMMIT}  # a folder of huggingface_hub's cache, given by its path
    assert ModelCard(render(manifest(snapshot), CONFIG, "")).data.base_model is None


def test_a_model_that_was_converted_twice_is_traced_to_its_root() -> None:
    once = {"effconvert": "0.1.0", "recipe": [{"expand-kv": {"heads": 4}}], "source": HUB, "verified": True}
    card = ModelCard(render(manifest({**LOCAL, "made_by": once}), CONFIG, ""))
    assert card.data.base_model == "lab/tiny"
    assert card.data.tags == ["effconvert", "expand-kv", "gqa"]
    (recipe,) = re.findall("```yaml\n(.*?)```", card.text, re.DOTALL)
    assert yaml.safe_load(recipe) == [{"expand-kv": {"heads": 4}}, {"gqa": {"groups": 2, "pool": "mean"}}]
    assert COMMIT in card.text
    assert "| before the last conversion |" in card.text
    assert [result.metric_type for result in card.data.eval_results] == ["perplexity"]  # the others are not of the original
    exact = report(difference=0.0)
    assert "The conversion is exact" in render(manifest(measured=exact), CONFIG, "")
    assert "The conversion is exact" not in render(manifest({**LOCAL, "made_by": once}, exact), CONFIG, "")
    assert "Not healed" in render(manifest({**LOCAL, "made_by": once}, exact), CONFIG, "")
    first = ModelCard(render(manifest(LOCAL), CONFIG, ""))
    assert [result.metric_type for result in first.data.eval_results] == ["perplexity", "kl_from_original", "same_top_token_as_original"]


def test_a_step_that_is_no_surgery_makes_it_a_finetune() -> None:
    healed = render(manifest(recipe=[{"gqa": {"groups": 2, "pool": "mean"}}, {"distill": {"steps": 10}}]), CONFIG, "")
    assert ModelCard(healed).data.base_model_relation == "finetune"
    assert "Not healed" not in healed
    assert "No healing" not in healed
    alone = render(manifest(), CONFIG, "")
    assert "Not healed" in alone
    assert "No healing" in alone


def test_results_are_read_back_as_they_were_given() -> None:
    card = ModelCard(render(manifest(), CONFIG, "", [evaluation("tiny", "out"), benchmark()]))
    read = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert read == {
        ("novels.txt", "perplexity"): report().after.quality.perplexity,
        ("novels.txt", "kl_from_original"): 1.25,
        ("novels.txt", "same_top_token_as_original"): 0.375,
        ("piqa", "acc_norm"): 0.6012345678901234,
        ("wiki|text", "word_perplexity"): 12.625,
    }
    assert "| piqa, acc_norm ↑ | 1,838 | 0.5 | 0.7312 ± 0.01 | 0.6012 ± 0.011 | -0.13 ± 0.0087 | yes, p < 0.001 |" in card.text
    assert r"| wiki\|text, word_perplexity ↓ | 62 |  | 12.5 ± 0.3 | 12.62 | +0.125 | no, p = 0.4 |" in card.text
    assert r"- wikitext lost \<b\>beginnings\</b\>" in card.text
    assert "a GPU (device cuda, dtype auto, num fewshot 3), with torch 2.13.0" in card.text
    assert "| 4 | 512 | 8 | 1.02 x | - | 0.75 x | 0.5 x | - |" in card.text  # 4 sequences in half a second
    assert "| 8 | 512 | out of memory |" in card.text
    assert "No task was evaluated" not in card.text


def test_a_model_that_was_measured_alone_is_compared_with_nothing() -> None:
    text = render(manifest(), CONFIG, "", [evaluation("out")])
    assert "| piqa, acc_norm ↑ | 1,838 | 0.5 | 0.6012 ± 0.011 |\n" in text
    assert "document by document" not in text


def test_the_verification_is_told_with_what_limits_it() -> None:
    text = render(manifest(versions={"torch": "2.13.0"}), CONFIG, "")
    assert "| parameters | 1,000 | 900 | 0.9 x |" in text
    assert "| bytes of KV cache a token | 64 | 16 | 0.25 x |" in text
    assert "| perplexity ↓ | 7.389 | 20.09 |  |" in text
    assert "| same top token ↑ | 100% | 37.5% |  |" in text
    assert "bfloat16 on cpu, with torch 2.13.0" in text
    assert "novels.txt" in text
    assert "No task was evaluated" in text
    assert "names no licence" in text
    assert "names no licence" not in render(manifest(), CONFIG, ORIGINAL)


def test_what_was_not_verified_not_measured_or_not_changed_is_said() -> None:
    assert "**Not verified**" in render(manifest(verified=False, report=None), CONFIG, "")
    bare = Side(1000, 0, None, "")
    encoder = render(manifest(measured=report(before=bare, after=bare, unmeasured="bert is an encoder")), {"architectures": ["BertForMaskedLM"]}, "")
    assert "No quality was measured at the conversion: bert is an encoder." in encoder
    assert "so quality is lost. How much was not measured at the conversion." in encoder
    assert "KV cache" not in encoder
    assert "AutoModelForMaskedLM" in encoder
    assert ModelCard(encoder).data.eval_results is None
    exact = render(manifest(measured=report(difference=0.0)), CONFIG, "")
    assert "logits changed by no more than rounding" in exact
    assert "| largest change of a logit |  | 0 |  |" in exact
    assert "Not healed" not in exact


@pytest.mark.parametrize("results", [(), (evaluation("tiny", "out"), benchmark())])
def test_a_card_made_over_a_card_is_the_same_card(results: tuple[Evaluation | Benchmark, ...]) -> None:
    for source in (HUB, LOCAL):
        first = render(manifest(source), CONFIG, ORIGINAL, results, "lab/pushed")
        assert render(manifest(source), CONFIG, first, results, "lab/pushed") == first
        assert render(manifest(source), CONFIG, render(manifest(source), CONFIG, ORIGINAL), results, "lab/pushed") == first
        assert str(ModelCard(first)) == first  # as the Hub's own library would write it


@pytest.mark.parametrize(
    "before",
    [
        "---\nlicense: [\n---\n",
        "---\n- license\n---\n",
        "---\nlicense: {a: b}\ntags: {}\nlanguage: [[en]]\n---\n",
        "---\n&a [*a]\n---\n",
        "\x00\ud7ff---",
        "---\n---\n",
    ],
)
def test_a_damaged_card_of_the_source_says_nothing(before: str) -> None:
    assert render(manifest(), CONFIG, before) == render(manifest(), CONFIG, "")


def test_a_byte_order_mark_and_windows_lines_are_read_over() -> None:
    assert render(manifest(), CONFIG, "\ufeff" + ORIGINAL.replace("\n", "\r\n")) == render(manifest(), CONFIG, ORIGINAL)


@pytest.mark.parametrize("damage", [{"report": {"before": 1}}, {"source": []}, {"recipe": [{"gqa": 2}]}, {"source": {"made_by": {"recipe": []}}}])
def test_a_damaged_manifest_is_the_models_fault(damage: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="convert again"):
        render(manifest(**damage), CONFIG, "")


def test_no_path_of_this_machine_comes_into_a_card() -> None:
    source = {**LOCAL, "model": "/home/someone/models/tiny"}
    recipe = [{"gqa": {"groups": 2, "pool": "mean"}}, {"refit": {"text": r"C:\Users\someone\novels.txt"}}]
    measured = report(text="/home/someone/novels.txt")
    noted = evaluation("/home/someone/tiny", "~someone/out", notes=("read (/home/someone/a.txt) and/or https://huggingface.co/lab",), machine="~someone/cpu")
    text = render(manifest(source, measured, recipe=recipe), CONFIG, "", [noted])
    assert "someone" not in text
    assert "novels.txt" in text
    assert "read (a.txt) and/or https://huggingface.co/lab" in text


def test_paths_are_cut_and_ids_and_what_models_write_are_not() -> None:
    held = {"model": "/a/b c/tiny/", "hub": "lab/tiny", "list": ["./x/y", "../z", "~/w", "C:\\d\\e", "1/2", "tokens / s"], "continuation": "/usr/bin"}
    assert without_paths(held) == {"model": "tiny", "hub": "lab/tiny", "list": ["y", "z", "w", "e", "1/2", "tokens / s"], "continuation": "/usr/bin"}
    assert cut_paths("of /a/b/c.txt, in ~/d/e: 3 of 4/5 / x") == "of c.txt, in e: 3 of 4/5 / x"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("which", ["lm", "base"])
def test_the_class_that_the_card_names_opens_the_model(kind: str, which: str) -> None:
    architecture = getattr(FAMILIES[kind], which)
    named = getattr(transformers, auto_class({"architectures": [architecture]})[0])
    opened = named._model_mapping[getattr(transformers, architecture).config_class]
    assert architecture in [found.__name__ for found in (opened if isinstance(opened, tuple) else (opened,))]


def test_a_class_that_no_auto_class_opens_is_named_itself() -> None:
    text = render(manifest(), {"architectures": ["BertForPreTraining"]}, "")
    assert "from transformers import BertForPreTraining, AutoTokenizer" in text
    assert "pipeline_tag" not in text


def test_a_training_is_shown_with_its_curve():
    curve = [{"tokens": 0, "seconds": 2.5, "held_out": 0.4}, {"tokens": 20480, "seconds": 60.0, "held_out": 0.1, "loss": 0.15, "scores": {"passkey 256": 0.9}}]
    course = {"text": "a|b.txt", "sha256": "", "measure": "kl", "before": 0.4, "after": 0.1, "curve": curve, "held_out_windows": 32}
    card = render(manifest(distillation=course), CONFIG, "")
    assert "## Training\n\nDistilled on a\\|b.txt; 32 windows of it were held out, and the model is the best of these." in card
    assert "| 20,480 | 60 | 0.1 | 0.15 | 0.9 |" in card
    assert "## Training" not in render(manifest(distillation={"kl_before": 0.4}), CONFIG, "")  # as earlier versions wrote it
