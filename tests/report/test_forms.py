"""The three forms agree, show what was measured, distrust what should be distrusted, and believe nothing."""

import html
import json
import platform
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import MambaConfig, MambaForCausalLM

from effconvert.checkpoint.shards import ITEMSIZE
from effconvert.convert.run import convert
from effconvert.errors import OptionError
from effconvert.eval.results import save
from effconvert.eval.subject import open_model
from effconvert.modeling.caches import kv_bytes
from effconvert.options import RunOptions
from effconvert.report import report
from effconvert.report.tables import cache_bytes
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.attention.narrow_kv import NarrowKv
from effconvert.surgery.attention.share_kv import ShareKv
from effconvert.surgery.ffn.chunk_ffn import ChunkFfn
from effconvert.surgery.mixing.streaming import Streaming
from effconvert.surgery.projections.monarch import Monarch
from tests.heal.healing import prose, put, run
from tests.models import save as save_model
from tests.models import tiny
from tests.report.examples import HOSTILE, benchmark, evaluation


def text_of(page):
    """What a reader of the page may see: its text, with pictures' text."""
    body = re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


def numbers(text):
    return set(re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", text))


def plain(markdown):
    """Markdown's table rows and lists without its escapes."""
    return re.sub(r"\\(.)", r"\1", markdown)


def test_the_three_forms_say_the_same(converted, results, tmp_path):
    made = report(converted, results, tmp_path / "out.html")
    held = json.loads((tmp_path / "out.json").read_text())
    assert held == json.loads(json.dumps(asdict(made)))
    page, markdown = text_of(tmp_path / "out.html"), plain((tmp_path / "out.md").read_text())
    rows = [cell.strip() for line in markdown.splitlines() if line.startswith("|") for cell in line.strip("|").split(" | ")]
    assert len(rows) > 200
    assert not [cell for cell in rows if cell.strip("| -") and " ".join(cell.split()) not in " ".join(page.split())]
    assert numbers(markdown) <= numbers(page)
    for doubt in made.doubts:
        assert doubt in markdown
        assert " ".join(doubt.split()) in " ".join(page.split())


def test_what_was_measured_is_what_is_shown(converted, results, tmp_path):
    made = report(converted, results, tmp_path / "out.html")
    markdown = plain((tmp_path / "out.md").read_text())
    assert made.summary == "gqa --groups 2 --pool mean, from tiny"
    assert "| hellaswag | acc_norm ↑ | 0.4312 ± 0.0049 | 0.3987 ± 0.0049 | -0.0325 ± 0.0041 | ▼ worse (p < 0.001) | 82.1% | 0.25 | 10042 |" in markdown
    assert "| piqa | acc ↑ | 0.684 ± 0.011 | 0.676 ± 0.011 | -0.0087 ± 0.0092 | ○ not significant (p = 0.34) | 95.3% | 0.5 | 1838 |" in markdown
    assert "| wikitext | word_perplexity ↓ | 33.4 ± 2.8 | 41.9 ± 2.8 | +8.46 ± 0.93 | ▼ worse (p < 0.001) | - | - | 62 |" in markdown
    cards = {card.what: card for card in made.cards}
    assert (cards["KV cache a token"].before, cards["KV cache a token"].after, cards["KV cache a token"].change) == ("384 B", "192 B", "0.5 x")
    assert cards["significantly worse"].after == "6 of 9"
    assert (cards["perplexity"].before, cards["perplexity"].after) == ("7.5 ± 1.0", "11.3")
    assert (cards["same top token"].after, cards["same top token"].note) == ("0.710", "± 0.012, one standard error, 8 documents")
    assert made.missing == {}
    assert f"| converted from | tiny |\n| versions | python {platform.python_version()}, " in markdown
    assert f"| SHA-256 of tiny-gqa-2 | {made.subject.digest} |" in markdown
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg") == 2 + 2 * 4 + 2 + 1  # differences, speed of two batch sizes, layers, cache
    assert len(page) < 1_000_000


def test_a_better_score_is_judged_by_which_way_is_better(converted, subjects, tmp_path):
    tasks = (
        ("up", "acc", "higher", None, 500, 0.5, 0.7, 0.01),
        ("down", "loss", "lower", None, 500, 2.0, 1.0, 0.01),
        ("what", "size", None, None, 500, 2.0, 1.0, 0.01),
    )
    save(evaluation(*subjects, tasks=tasks), tmp_path / "eval.json")
    made = report(converted, [tmp_path / "eval.json"], tmp_path / "out.html")
    markdown = (tmp_path / "out.md").read_text()
    assert re.findall(r"[▲▼◆] (?:better|worse|changed)", markdown) == ["▲ better", "▲ better", "◆ changed"]
    assert next(card for card in made.cards if card.what == "significantly worse").after == "0 of 3"
    assert any(doubt.startswith("Better than the original on up, down") for doubt in made.doubts)


def test_without_results_the_verification_is_shown_and_what_would_add_the_rest(converted, tmp_path):
    made = report(converted, [], tmp_path / "out.html")
    markdown = plain((tmp_path / "out.md").read_text())
    assert "Measured by the verification" in markdown
    assert f"same most likely token | - | {made.manifest.report.after.quality.agreement:.1%}" in markdown
    assert list(made.missing.values()) == [
        "effconvert eval tiny tiny-gqa-2 -o eval.json  # in a folder that has both models",
        "effconvert bench tiny tiny-gqa-2 -o bench.json  # in a folder that has both models",
        "effconvert report tiny-gqa-2 eval.json bench.json --overwrite",
    ]
    assert "of it, only what the cards say is known here" in text_of(tmp_path / "out.html")
    assert "384 B" in markdown  # of the original, from the manifest


def test_a_model_that_was_converted_twice_is_compared_with_what_the_last_conversion_began_from(llama, converted, subjects, tmp_path):
    convert(str(converted), (Gqa(groups=1, pool="mean"),), RunOptions(output=tmp_path / "twice", tokens=120, context=40))
    made = report(tmp_path / "twice", [], tmp_path / "out.html")
    markdown = plain((tmp_path / "out.md").read_text())
    assert made.verdict.endswith("and compared with tiny-gqa-2.")
    assert {card.what: card.note for card in made.cards if card.note} == {
        "parameters": "before: tiny-gqa-2",
        "KV cache a token": "before: tiny-gqa-2",
        "perplexity": "in the verification; before: tiny-gqa-2",
        "same top token": "as tiny-gqa-2, in the verification",
    }
    told = "The verification compares the last conversion with tiny-gqa-2, from which that began, and not with the first original, tiny."
    assert told in made.doubts
    assert "| tiny-gqa-2 | '" in markdown
    assert next(iter(made.missing.values())) == "effconvert eval tiny twice -o eval.json  # in a folder that has both models"
    save(evaluation(subjects[0], open_model(str(tmp_path / "twice")).subject), tmp_path / "eval.json")
    doubts = report(tmp_path / "twice", [tmp_path / "eval.json"], tmp_path / "with.html").doubts
    assert not any("they are not the same" in doubt for doubt in doubts)


def test_a_model_that_was_never_verified_is_called_that_at_the_top(llama, tmp_path):
    convert(str(llama), (Gqa(groups=1, pool="mean"),), RunOptions(output=tmp_path / "bare", verify=False))
    made = report(tmp_path / "bare", [], tmp_path / "out.html")
    assert made.verified is False
    assert made.doubts[0].startswith("NOT VERIFIED")
    page = text_of(tmp_path / "out.html")
    assert page.index("NOT VERIFIED") < page.index("parameters") < page.index("What to distrust")
    assert "NOT VERIFIED" in (tmp_path / "out.md").read_text().partition("## ")[0]


def test_a_model_that_effconvert_did_not_write_is_told_apart(llama, tmp_path):
    made = report(llama, [], tmp_path / "out.html")
    assert made.verified is None
    assert "not written by effconvert" in made.summary
    assert made.commands == ("effconvert report tiny --overwrite",)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("kind", "told", "pictures"),
    [
        ("bert", "This model keeps no KV cache.", 2 + 2 + 2),
        ("fnet", "no attention; FFN 32 to 48", 2 + 2 + 2),
        ("gemma3_text", "1 see a window of 8 tokens (hatched), 1 see everything", 2 + 4 + 2 + 1),
    ],
)
def test_every_kind_of_model_has_its_report(kind, told, pictures, tmp_path):
    subject = open_model(str(save_model(tiny(kind), tmp_path / kind))).subject
    original = replace(subject, name="another", digest="1" * 64)
    timed = benchmark(original, subject, batches=(1,), contexts=(64,))
    if not subject.kv_bytes:  # an encoder writes nothing
        nothing = {"first": None, "decode": None, "predicted": None, "cache_bytes": None, "ratios": {}}
        timed = replace(timed, cells=tuple(replace(cell, **nothing) for cell in timed.cells))
    save(evaluation(original, subject), tmp_path / "eval.json")
    save(timed, tmp_path / "bench.json")
    report(tmp_path / kind, [tmp_path / "eval.json", tmp_path / "bench.json"], tmp_path / "out.html")
    assert told in text_of(tmp_path / "out.html")
    assert "No timing of this model" not in text_of(tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text().count("<svg") == pictures


def test_what_is_not_known_of_a_model_is_said_and_not_made_up(converted, subjects, tmp_path):
    """Beside a model of an unknown layout, and of one."""
    config = MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4)
    stranger = open_model(str(save_model(MambaForCausalLM(config), tmp_path / "stranger"))).subject
    for this, others in ((converted, (stranger, subjects[1])), (tmp_path / "stranger", (subjects[0], stranger))):
        save(evaluation(*others), tmp_path / "eval.json")
        report(this, [tmp_path / "eval.json"], tmp_path / "out.html", overwrite=True)
        told = text_of(tmp_path / "out.html")
        assert told.count("not known") == 6
        assert "effconvert does not know the layout of stranger, and so neither its layers nor its cache by formula." in told
        assert "keeps no KV cache" not in told
        assert ("KV cache of one sequence" in told) == (this == converted)


def test_what_the_numbers_themselves_make_doubtful_is_said(converted, subjects, results, tmp_path):
    other = evaluation(replace(subjects[0], digest="b" * 64, name="another"), subjects[1], versions={"torch": "2.11.0"}, date="2026-01-01T00:00:00+00:00")
    save(other, tmp_path / "other.json")
    many = tuple((f"task{i}", "acc", "higher", 0.25, 1000, 0.5, 0.49, 0.01) for i in range(20))
    strange = replace(subjects[0], name="strange", digest="9" * 64, dtype="float32", vocabulary=99, parameters=5)
    save(evaluation(strange, subjects[1], tasks=many), tmp_path / "many.json")
    told = "\n".join(report(converted, [tmp_path / "many.json", *results, tmp_path / "other.json"], tmp_path / "out.html").doubts)
    for part in (
        "The original in the results, strange, has 5 parameters",
        "has no error bar: it shows a broken model",
        "eval.json: invented data for tests",
        "compare with different originals (many.json with strange, eval.json with tiny, other.json with another)",
        "tokens in their vocabularies, so their perplexities cannot be compared (258, 99)",
        "types of weights, which alone can change results (bfloat16, float32)",
        "Few documents: 12 of 44 metrics have under 100 (text: 8)",
        "26 of 38 differences are not significant",
        "38 comparisons at the 5 % level: about 2",
        "greedy continuations",
        "timings spread over more than 20%",
        "could not be timed with batch 4 and context 8192: out of memory",
        "of different versions",
        "of different days",
    ):
        assert part in told, told


def test_times_that_overlap_are_not_called_a_difference(converted, subjects, tmp_path):
    heavy, twin = replace(subjects[1], digest="8" * 64, bytes=10**9), replace(subjects[1], digest="7" * 64)
    for name, original in (("heavy", heavy), ("twin", twin)):
        save(benchmark(original, subjects[1], batches=(1,), contexts=(64, 128)), tmp_path / f"{name}.json")
    told = {name: report(converted, [tmp_path / f"{name}.json"], tmp_path / f"{name}-report.html").doubts for name in ("heavy", "twin")}
    assert not any("overlap" in doubt for doubt in told["heavy"])
    assert any(doubt.startswith("In 2 of 2 settings the ranges of the two models' decode times overlap") for doubt in told["twin"])


def test_quiet_and_plentiful_results_leave_no_doubt_of_their_own(llama, subjects, tmp_path):
    tasks = (("piqa", "acc", "higher", 0.5, 1838, 0.7, 0.6, 0.01),)
    clean = evaluation(*subjects[:1], tasks=tasks, notes=(), continuations=())
    save(replace(clean, rows=clean.rows[:1]), tmp_path / "eval.json")
    made = report(llama, [tmp_path / "eval.json"], tmp_path / "out.html")
    assert made.doubts == (made.verdict,)


def test_a_model_that_was_changed_after_verification_is_distrusted(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "changed"))
    file = folder / "generation_config.json"
    file.write_text(file.read_text() + " ")
    assert report(folder, [], tmp_path / "out.html").doubts[0].startswith("generation_config.json changed since effconvert wrote it")
    assert not any("changed since effconvert wrote it" in doubt for doubt in report(converted, [], tmp_path / "whole.html").doubts)


def test_two_runs_write_the_same_bytes(converted, results, tmp_path, contents):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for place in "ab":
        report(converted, results, tmp_path / place / "out.html")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(contents(tmp_path / "a")) == ["out.html", "out.json", "out.md"]


def test_matplotlib_is_left_as_it_was(converted, results, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report(converted, results, tmp_path / "out.html")
    assert dict(matplotlib.rcParams) == before


def test_nothing_in_a_file_is_taken_for_code(converted, subjects, tmp_path):
    original, model = (replace(subject, name=f"{HOSTILE}{index}", architecture=HOSTILE) for index, subject in enumerate(subjects))
    tasks = ((HOSTILE, HOSTILE, "higher", None, 500, 0.5, 0.4, 0.01), (HOSTILE, HOSTILE, "lower", None, 500, 5.0, 4.0, 0.01))
    hostile = {"notes": (HOSTILE,), "settings": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "machine": HOSTILE}
    save(evaluation(original, model, tasks=tasks, prompt=HOSTILE, continuations=(HOSTILE, HOSTILE), **hostile), tmp_path / "eval.json")
    save(benchmark(original, model, **hostile), tmp_path / "bench.json")
    folder = Path(shutil.copytree(converted, tmp_path / "hostile"))
    manifest = json.loads((folder / "effconvert.json").read_text())
    manifest["source"]["model"] = manifest["source"]["commit"] = manifest["effconvert"] = manifest["report"]["text"] = HOSTILE
    manifest["recipe"] = [{HOSTILE: {HOSTILE: HOSTILE}}]
    (folder / "effconvert.json").write_text(json.dumps(manifest))
    report(folder, [tmp_path / "eval.json", tmp_path / "bench.json"], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 20
    assert HOSTILE in text_of(tmp_path / "out.html")
    markdown = (tmp_path / "out.md").read_text()
    assert not re.search(r"^(?! {4}).*(?<!\\)<script", markdown, re.MULTILINE)
    assert HOSTILE in plain(markdown)


def test_a_page_asks_the_network_for_nothing(converted, results, tmp_path):
    report(converted, results, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) <= {"data:,", *re.findall(r'href="(#[^"]*)"', page)}
    assert set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of namespaces
    assert "<script" not in page
    assert "@import" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {pair for name in ids for pair in ((name, ""), ("", name))}


def test_without_a_training_a_picture_of_somebody_else_is_in_nobodys_way(converted, tmp_path):
    (tmp_path / "out.png").write_text("mine")
    report(converted, [], tmp_path / "out.html")
    assert (tmp_path / "out.png").read_text() == "mine"


def test_a_training_is_shown_as_a_curve_and_a_table(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "trained")
    manifest = json.loads((tmp_path / "trained" / "effconvert.json").read_text())
    curve = [{"tokens": 0, "seconds": 2.5, "held_out": 0.4}, {"tokens": 20480, "seconds": 60.0, "held_out": 0.1, "loss": 0.15, "scores": {"passkey 256": 0.9}}]
    manifest["distillation"] = {"text": "novels.txt", "sha256": "", "measure": "kl", "before": 0.4, "after": 0.1, "curve": curve, "held_out_windows": 32}
    (tmp_path / "trained" / "effconvert.json").write_text(json.dumps(manifest))
    (tmp_path / "taken.png").write_text("mine")
    with pytest.raises(OptionError, match=r"taken.png exists; give another --output, or --overwrite"):
        report(tmp_path / "trained", [], tmp_path / "taken.html")
    report(tmp_path / "trained", [], tmp_path / "out.html")
    markdown = plain((tmp_path / "out.md").read_text())
    assert "| 0 | 2 | 0.4 | - | - |" in markdown
    assert "| 20,480 | 60 | 0.1 | 0.15 | 0.9 |" in markdown
    assert "32 windows of it were held out. The model that was written has 0.1, 75% of the distance before closed." in markdown
    page = (tmp_path / "out.html").read_text()
    assert "Training: KL(original || model), nats a token from 0.4 to 0.1 in 20,480 tokens" in page
    assert all(f">{text}<" in page for text in ("minutes", "scores", "passkey 256"))
    picture = (tmp_path / "out.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert b"nats a token from 0.4 to 0.1" in picture  # for those who do not see it
    assert "(out.png)" in (tmp_path / "out.md").read_text()


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "sliding_window": 6}
CACHED = {  # a family, changes of its config, a step
    "FFNs in pieces": ("llama", {}, ChunkFfn(size=4)),
    "thin FFNs": ("llama", {}, Monarch(blocks=4, parts="mlp")),
    "narrow heads": ("llama", {}, NarrowKv(keep=0.5)),
    "a window": ("llama", {}, Streaming(window=8, layers="0")),
    "a layer that reads another's": ("gemma3_text", WINDOWS, ShareKv(layers="3")),
}


@pytest.mark.parametrize("name", CACHED)
def test_the_cache_on_the_page_is_that_of_the_plan(name, tmp_path):
    kind, changes, step = CACHED[name]
    put(tmp_path / "model", kind, **changes)
    (tmp_path / "text.txt").write_text(prose())
    run(tmp_path / "model", step)
    opened = open_model("out")
    for context in (4, 8, 60):
        assert cache_bytes(opened.subject, context) == kv_bytes(opened.known, ITEMSIZE[opened.checkpoint.dtype], context)
    mixers = set(opened.subject.mixers)
    assert mixers == {"a window": {"streaming", ""}, "narrow heads": {"narrow-kv"}}.get(name, set())
    earlier = replace(opened.subject, cached=())  # as results of earlier versions have it, which is enough where layers with keys have as many
    assert kind == "gemma3_text" or cache_bytes(earlier, 60) == pytest.approx(cache_bytes(opened.subject, 60))


def test_speeds_by_several_kernels_are_no_comparison_of_models(converted, subjects, tmp_path):
    found = benchmark(*subjects)
    twice = replace(found, subjects=(subjects[1], subjects[1]), settings={**found.settings, "kernels": ["reference", "triton"]})
    save(twice, tmp_path / "bench.json")
    with pytest.raises(OptionError, match=r"each model by several --kernels, and a report compares models; measure again by one of them"):
        report(converted, [tmp_path / "bench.json"], tmp_path / "out.html")
