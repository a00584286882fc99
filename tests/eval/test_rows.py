"""Rows of files: which are texts, which conversations, which are skipped, and what is said of the others."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from effconvert.errors import OptionError
from effconvert.eval.quality.rows import read_rows
from effconvert.eval.quality.text import read_calibration, read_text

TALK = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a bird"}]
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "is it"}]}, TALK[1]]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(file, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def rows(file):
    return list(read_rows(file, "--data"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "s[1].jsonl", "hf::a.jsonl", "a*.json", "b.d/[x]?.json"])
def test_a_file_is_read_whatever_it_is_called(name):
    Path("s1.jsonl").write_text(lines([{"text": "another"}]))
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("\n" + lines([{"text": "this"}, {"text": "one", "id": 1}]), encoding="utf-8-sig")
    assert rows(name) == ["this", "one"]
    assert read_calibration(name).content == "this\n\none"


def test_arrays_and_what_is_compressed_are_read():
    Path("a.json").write_text(json.dumps([{"text": "this"}, {"text": "one"}], indent=1))
    Path("a.jsonl").write_text('\n [{"text": "this"},\n{"text": "one"}]')
    Path("one.json").write_text(json.dumps({"text": "this"}, indent=1))
    assert rows("a.jsonl") == [*rows("one.json"), "one"] == ["this", "one"]
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines([{"text": "this"}, {"text": "one"}]).encode()))
    assert rows("a.json") == rows("a.jsonl.gz") == ["this", "one"]


@pytest.mark.parametrize("name", ["a.parquet", "A[1].PARQUET"])
def test_of_parquet_only_text_and_messages_are_read(name):
    strange = pyarrow.array([[("a", 1)]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        assert rows(parquet(name, strange=strange, text=pyarrow.array(["one", None, "two"], kind))) == ["one", "two"]


@pytest.mark.parametrize(
    "blank",
    [{"messages": None}, {"messages": []}, {"text": None, "messages": None}, {"text": "", "messages": None}, {"text": " \n"}],
    ids=json.dumps,
)
def test_blank_rows_are_skipped_among_texts_and_among_conversations(blank):
    Path("talk.jsonl").write_text(lines([blank, {"messages": TALK}, {"text": "", "messages": TALK}, {"text": None, "messages": IN_PARTS}]))
    assert rows("talk.jsonl") == [tuple(TALK)] * 3
    Path("text.jsonl").write_text(lines([blank, {"text": "this", "messages": None}]))
    assert rows("text.jsonl") == ["this"]
    Path("blank.jsonl").write_text(lines([blank] * 3))
    with pytest.raises(OptionError, match=r"--data blank\.jsonl has no row with a text"):
        rows("blank.jsonl")


def test_a_text_goes_before_messages():
    Path("both.jsonl").write_text(lines([{"text": "this", "messages": TALK}]))
    assert rows("both.jsonl") == ["this"]


def test_a_table_without_rows_or_without_both_columns_is_refused():
    with pytest.raises(OptionError, match="has no row with a text"):
        rows(parquet("none.parquet", text=pyarrow.array([], pyarrow.string())))
    with pytest.raises(OptionError, match="from row 1 on: it has neither"):
        rows(parquet("other.parquet", body=["a", "b"]))


def test_a_path_that_is_not_there_is_no_dataset_on_the_hub():
    for name in ("data/train.jsonl", "data/train.JSONL"):
        with pytest.raises(OptionError, match="is neither a file nor the name of a dataset"):
            rows(name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n', r"from row 3 on: it is no JSON \(Expecting ',' delimiter\)"),
        ('{\n "other": "a"\n}\n', "from row 1 on: it has neither"),
        ('{"text": "a \\ud83d"}\n', r"from row 1 on: its text has half of a character \(a lone surrogate\)"),
        (lines([{"messages": [{"role": "user", "content": [{"type": "reasoning", "text": "a"}]}]}]), "from row 1 on: a message has no text"),
        ('{"text": "a"}\n7\n', "from row 2 on: it is no JSON object"),
        ('[{"text": "a"}, {"text": 7}]', "from row 2 on: its `text` is no text"),
        ('[{"text": "a"}', r"cannot be read \(JSONDecodeError"),
        (lines([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]), "from row 1 on: a message has no text as its content"),
    ],
)
def test_what_is_wrong_is_said_with_its_row(content, said):
    Path("a.json").write_text(content)
    with pytest.raises(OptionError, match=said):
        rows("a.json")


def test_texts_to_measure_on_are_rows_too_and_pairs_to_translate_stay_as_they_are():
    Path("a.jsonl").write_text(lines([{"text": "this"}, {"text": "one"}]))
    assert read_text(Path("a.jsonl")).content == "this\n\none"
    Path("pairs.jsonl").write_text(lines([{"source": "this", "target": "dies"}]))
    assert read_text(Path("pairs.jsonl")).content == lines([{"source": "this", "target": "dies"}])
    Path("talk.jsonl").write_text(lines([{"messages": TALK}]))
    with pytest.raises(OptionError, match=r"--text talk\.jsonl has conversations"):
        read_text(Path("talk.jsonl"))
