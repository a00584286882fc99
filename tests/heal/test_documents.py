"""Windows of one document each: what they hold, that filling changes nothing, conversations, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert import training_text
from effconvert.convert.plan import plan
from effconvert.convert.training_text import items, read_text
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.text import read_calibration
from effconvert.heal._documents import predicted_tokens, windows_of_conversations, windows_of_texts
from effconvert.heal.distill import Distill
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.mixing.linear import Linear
from effconvert.surgery.mixing.retnet import Retnet
from tests.heal.healing import letters, opened, prose, put, run

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
SHORT = {"window": 32, "batch_tokens": 128, "train_tokens": 2560, "rate": 3e-3}
TALK = ({"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a bird"}, {"role": "user", "content": "and now"})
TALK += ({"role": "assistant", "content": "the sea"},)


def talking(template=TEMPLATE):
    tokenizer = letters()
    tokenizer.chat_template = template
    return tokenizer


def rows_to(file, rows):
    if file.endswith(".parquet"):
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversations(count=80):
    said = [prose(20 + number % 30, seed=number) for number in range(count)]
    return [{"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}]} for text in said]


def model(folder="model", **more):
    put(Path(folder), noise=1.0, only="weight", **more)
    talking().save_pretrained(folder)


def test_no_window_goes_across_the_end_of_a_document():
    found = windows_of_texts(letters(), [1], ["sun and sea", "a", "", "moon " * 5], 8, 99)
    texts = [letters().decode(ids[ids != 0]) for ids in found.ids]
    assert texts == ["<s>sun and", "<s> sea", "<s>a", *("<s>" + ("moon " * 5)[at : at + 7] for at in range(0, 25, 7))]
    assert found.predicted[1].tolist() == [False, True, True, True, True, False, False, False]


def test_a_token_counts_whose_next_one_is_predicted():
    (item,) = predicted_tokens(windows_of_texts(letters(), [], ["sea"], 5, 99))
    ids = item["input_ids"].tolist()
    assert item["counts"].tolist() == [True, True, False, False, False]
    assert item["labels"].tolist() == [ids[1], ids[2], -100, -100, -100]


@pytest.mark.parametrize("technique", [Gqa(groups=1, pool="mean"), Linear(), Retnet()])
def test_what_a_model_computes_of_filled_windows_is_what_it_computes_of_each_document(technique):
    model()
    Path("text.txt").write_text(prose())
    run("model", technique)
    converted, texts = opened("out", dtype=torch.float32), [prose(length, seed=length) for length in (5, 19, 32)]
    found = predicted_tokens(windows_of_texts(letters(), [], texts, 32, 99))
    with torch.no_grad():
        together = converted.base_model(input_ids=torch.stack([item["input_ids"] for item in found])).last_hidden_state
        for text, states, item in zip(texts, together, found, strict=True):
            alone = converted.base_model(input_ids=torch.tensor([letters()(text).input_ids])).last_hidden_state[0]
            torch.testing.assert_close(states[item["counts"]], alone[:-1], atol=2e-5, rtol=2e-5)


def test_what_the_assistant_says_is_predicted_and_nothing_else():
    found = windows_of_conversations(talking(), [TALK], 200, 99)
    assert letters().decode(found.ids[0][found.predicted[0]]) == "a bird\nthe sea\n"
    short = windows_of_conversations(talking(), [TALK], 16, 99)
    assert len("a bird\nthe sea\n") - len(short.ids) <= short.predicted.sum() <= len("a bird\nthe sea\n")  # the first token of a window is none
    assert not short.predicted[:, 0].any()
    assert short.predicted.any(1).all()  # the others are left out


def test_templates_that_are_missing_or_write_the_past_anew_or_refuse_are_refused():
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        windows_of_conversations(letters(), [TALK], 32, 99)
    with pytest.raises(ModelError, match="writes earlier messages in another way once more follow"):
        windows_of_conversations(talking("{{ messages | length }}" + TEMPLATE), [TALK], 32, 99)
    with pytest.raises(OptionError, match=r"refuses conversation 2 of --data .*no users"):
        windows_of_conversations(talking("{% if messages[0].role == 'user' %}{{ raise_exception('no users') }}{% endif %}"), [TALK[1:2], TALK], 32, 99)
    said_first = windows_of_conversations(talking(), [TALK[1:]], 200, 99)
    assert letters().decode(said_first.ids[0][said_first.predicted[0]]) == "the sea\n"


def test_a_mark_of_byte_order_is_no_part_of_a_text():
    Path("plain.txt").write_text(prose(50))
    Path("marked.txt").write_text(prose(50), encoding="utf-8-sig")
    assert read_calibration("marked.txt").content == read_calibration("plain.txt").content


@pytest.mark.parametrize("file", ["text.parquet", "text.jsonl"])
def test_rows_with_a_text_are_joined_or_have_windows_of_their_own(file):
    texts = [prose(50, seed=seed) for seed in range(60)]
    rows_to(file, [{"text": text} for text in texts])
    assert read_calibration(file).content == "\n\n".join(texts)
    model()
    joined = run("model", Gqa(groups=1), Distill(data=file, **SHORT), dry_run=True, calibrate="docstrings").plan
    apart = run("model", Gqa(groups=1), Distill(data=file, packing="documents", **SHORT), dry_run=True, calibrate="docstrings").plan
    assert joined.fingerprint != apart.fingerprint
    windows = items(apart, read_text(apart))
    assert len(windows.train) + len(windows.held_out) == 120  # of 32 and 18 tokens
    assert {int(item["counts"].sum()) for item in windows.train} == {31, 17}
    assert all(item["counts"].all() or item["counts"].sum() == 31 for item in items(joined, read_text(joined)).train)


@pytest.mark.parametrize("more", [{}, {"cache_teacher": "kept"}, {"cache_teacher": "kept", "cache_kind": "topk", "ce": 0.2}])
def test_a_model_is_trained_on_conversations(more):
    model()
    rows_to("talk.parquet", conversations())
    run("model", Gqa(groups=1, pool="mean"), Distill(data="talk.parquet", **{**SHORT, **more}))
    told = json.loads(Path("out/effconvert.json").read_text())["distillation"]
    assert told["after"] < 0.97 * told["before"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": "text.txt", "packing": "documents"}, OptionError, r"needs documents, and --data text\.txt is one text"),
        ({"packing": "documents"}, OptionError, "needs documents, and --data docstrings is one text"),
        ({"data": "talk.jsonl", "recall": 0.5}, OptionError, "--recall copies passages within full windows"),
        ({"data": "few.jsonl"}, OptionError, r"few\.jsonl has . windows, and --window 32 needs at least 4"),
        ({"data": "neither.jsonl"}, OptionError, "from row 1 on: it has neither; each row needs a `text`, or each `messages` with a role and a content each"),
        ({"data": "wrong.jsonl"}, OptionError, "from row 1 on: its `messages` are no list of messages with a role each"),
        ({"data": "tools.jsonl"}, OptionError, "from row 1 on: a message has no text as its content, such as a call of a tool"),
        ({"data": "numbers.jsonl"}, OptionError, "from row 1 on: its `text` is no text"),
        ({"data": "mixed.jsonl"}, OptionError, "from row 2 on: it is a conversation, and others are texts"),
        ({"data": "blank.jsonl"}, OptionError, r"blank\.jsonl has no row with a text; give another"),
        ({"data": "asked.jsonl"}, OptionError, "no conversation in which the assistant answers, and only answers are trained on"),
        ({"data": "list.jsonl"}, OptionError, "cannot be read .*; give a text file .*, or JSON lines with a `text` in each row"),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    model()
    Path("text.txt").write_text(prose())
    rows_to("talk.jsonl", conversations())
    rows_to("few.jsonl", conversations(1))
    rows_to("neither.jsonl", [{"other": "a"}])
    rows_to("wrong.jsonl", [{"messages": [{"from": "user", "value": "a"}]}])
    rows_to("tools.jsonl", [{"messages": [{"role": "assistant", "content": None}]}])
    rows_to("numbers.jsonl", [{"text": 1}, {"text": 2}])
    rows_to("mixed.jsonl", [{"text": "a"}, *conversations(1)])
    rows_to("blank.jsonl", [{"text": text} for text in ("", " ", "\n", None)])
    rows_to("asked.jsonl", [{"messages": TALK[:1]}] * 50)
    Path("list.jsonl").write_text("[1]\n[2]\n")
    before = {path.name for path in Path().iterdir()}
    with pytest.raises(error, match=message):
        run("model", Gqa(groups=1), Distill(**{**SHORT, **options}))
    assert {path.name for path in Path().iterdir()} == before


def test_conversations_are_no_calibration_text_and_encoders_have_no_windows_of_documents():
    rows_to("talk.jsonl", conversations())
    with pytest.raises(OptionError, match=r"has conversations .*, and a `text` in each row is needed here"):
        read_calibration("talk.jsonl")
    put(Path("encoder"), "bert")
    rows_to("text.jsonl", [{"text": prose(50, seed=seed)} for seed in range(60)])
    with pytest.raises(ModelError, match="windows of one document each are for models that predict the next token, and BertForMaskedLM does not"):
        run("encoder", Gqa(groups=1), Distill(data="text.jsonl", packing="documents", **SHORT))


def test_of_a_long_text_no_more_is_read_than_is_needed(monkeypatch):
    model()
    seen = []
    real = training_text.read_rows

    def watched(*given):
        for row in real(*given):
            seen.append(row)
            yield row

    monkeypatch.setattr(training_text, "read_rows", watched)
    monkeypatch.setattr(training_text, "READ", 640)
    monkeypatch.setattr(training_text, "PIECE", 100)
    rows_to("text.jsonl", [{"text": prose(50, seed=seed)} for seed in range(100)])
    for packing in ("joined", "documents"):
        seen.clear()
        conversion = plan(open_checkpoint(Path("model")), (Gqa(groups=1), Distill(data="text.jsonl", packing=packing, **{**SHORT, "train_tokens": 1024})))
        text = read_text(conversion)
        assert len(text.ids) == 64  # 32 to train on, and the most that are held out
        assert text.name == "the first 2,048 tokens of text.jsonl"
        assert len(seen) < 45
