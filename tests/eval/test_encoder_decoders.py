"""What models with an encoder and a decoder are measured on: a target given its source."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from effconvert.errors import ModelError, OptionError
from tests.eval.evaluating import byte_tokenizer, measure, moved, put, row
from tests.models import tiny

ROWS = [("The sun is yellow.", "Die Sonne"), ("Where we go, nobody knows.", "Wohin"), ("A", "b")]


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    """A random model with a tokenizer of bytes."""
    return put(tmp_path_factory.mktemp("bart") / "bart", tiny("bart", vocab_size=258, decoder_start_token_id=1), byte_tokenizer(begin=True))


def written(*rows):
    pairs = (json.dumps(dict(zip(("source", "target"), row, strict=True)), ensure_ascii=False) for row in rows)
    Path("pairs.jsonl").write_text("".join(f"{pair}\n" for pair in pairs))
    return Path("pairs.jsonl")


@torch.inference_mode()
def loss(folder, rows):
    """The loss of targets that transformers computes, in nats a token."""
    model, tokenizer, total, count = AutoModelForSeq2SeqLM.from_pretrained(folder), byte_tokenizer(begin=True), 0.0, 0
    for source, target in rows:
        ids, labels = (torch.tensor([tokenizer(side).input_ids]) for side in (source, target))
        total += model(ids, labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    return total / count


def test_the_perplexity_of_targets_is_that_of_all_their_tokens(bart, tmp_path):
    other = moved(bart, tmp_path / "other", by=0.02)
    evaluation = measure(bart, other, text=written(*ROWS))
    first, second = row(evaluation, "targets", "perplexity").values
    assert first.value == pytest.approx(math.exp(loss(bart, ROWS)), rel=1e-5)
    assert second.value == pytest.approx(math.exp(loss(other, ROWS)), rel=1e-5)
    assert row(evaluation, "targets", "kl").values[1].value > 1e-4
    assert 0 < row(evaluation, "targets", "same_top_token").values[1].value < 1
    assert row(evaluation, "targets", "bits_per_byte").documents == 3
    again = measure(bart, other, text=written(*ROWS))  # from the cache
    assert again.rows == evaluation.rows


def test_a_model_is_as_far_as_nothing_from_itself(bart):
    evaluation = measure(bart, bart, text=written(*ROWS))
    assert row(evaluation, "targets", "kl").values[1].value == pytest.approx(0, abs=1e-6)
    assert row(evaluation, "targets", "same_top_token").values[1].value == 1


def test_the_first_pairs_are_read_and_at_least_one(bart):
    assert row(measure(bart, text=written(*ROWS), tokens=16), "targets", "perplexity").documents == 2  # of 10 and 6 tokens
    assert row(measure(bart, text=written(*ROWS), tokens=2), "targets", "perplexity").documents == 1


def test_of_a_plain_text_each_window_is_cut_in_two(bart):
    Path("plain.txt").write_text("abcdefgh" + "ABCDEFGH" + "ijklmnop" + "IJKLMNOP" + "rest")
    evaluation = measure(bart, text=Path("plain.txt"), context=18, tokens=36)
    expected = loss(bart, [("abcdefgh", "ABCDEFGH"), ("ijklmnop", "IJKLMNOP")])
    assert row(evaluation, "targets", "perplexity").values[0].value == pytest.approx(math.exp(expected), rel=1e-5)
    assert [note for note in evaluation.notes if "the first half of each window is the source" in note]


def test_rows_with_a_text_are_a_plain_text(bart):
    texts = ("abcdefgh" + "ABCDEFGH" + "ijkl", "nopIJKLMNOP")
    Path("rows.jsonl").write_text("".join(json.dumps({"text": text, "source": "a library"}) + "\n" for text in texts))
    Path("plain.txt").write_text("\n\n".join(texts))
    evaluation, plain = (measure(bart, text=Path(name), context=18, tokens=32) for name in ("rows.jsonl", "plain.txt"))
    assert [note for note in evaluation.notes if "the first half of each window is the source" in note]
    assert row(evaluation, "targets", "perplexity") == row(plain, "targets", "perplexity")


def test_what_is_longer_than_the_models_read_is_cut_and_noted(bart):
    evaluation = measure(bart, text=written(("x" * 100, "short"), ROWS[0]))
    assert [note for note in evaluation.notes if "bart: 1 of 4 sources and targets are longer than the 64 tokens" in note]


def test_bits_per_byte_are_of_what_was_read_of_a_target(bart):
    bits = [row(measure(bart, text=written(("a", letters))), "targets", "bits_per_byte").values[0].value for letters in ("x" * 63, "x" * 500)]
    assert bits[0] == pytest.approx(bits[1])  # 63 letters and the token that begins a text, either time


def test_a_line_ends_at_a_line_feed_alone(bart):
    assert row(measure(bart, text=written(("one\u2028two", "three"))), "targets", "perplexity").documents == 1


def test_windows_that_leave_no_room_for_a_pair_are_refused(bart):
    Path("plain.txt").write_text("x" * 100)
    with pytest.raises(OptionError, match=r"in windows of 4 leave too few .* --context of at least 10"):
        measure(bart, text=Path("plain.txt"), context=4)
    Path("plain.txt").write_text("xxxx")
    with pytest.raises(OptionError, match=r"4 tokens of .* a longer --text"):
        measure(bart, text=Path("plain.txt"))


@pytest.mark.parametrize("line", ["{", "[1]", '{"source": "a"}', '{"source": "a", "target": " "}', '{"source": "a", "target": 3}'])
def test_lines_without_a_pair_are_refused(bart, line):
    Path("pairs.jsonl").write_text(f'{{"source": "a", "target": "b"}}\n\n{line}\n')
    with pytest.raises(OptionError, match=r"line 3 of pairs\.jsonl has no"):
        measure(bart, text=Path("pairs.jsonl"))


def test_what_measures_other_models_is_refused(bart, llama, tmp_path):
    with pytest.raises(OptionError, match="--tasks is for decoders"):
        measure(bart, tasks="piqa")
    with pytest.raises(OptionError, match="--passkey is for models that predict the next token, and bart is an encoder-decoder"):
        measure(bart, passkey="256")
    with pytest.raises(OptionError, match="--context 500 is more than the 64 tokens that all of the models read; give at most 64"):
        measure(bart, context=500)
    with pytest.raises(OptionError, match="--pairs is for encoders"):
        measure(bart, pairs=written(*ROWS))
    with pytest.raises(OptionError, match=r"another kind than tiny \(encoder-decoder, decoder\)"):
        measure(bart, llama)
    bare = put(tmp_path / "bare", tiny("bart", vocab_size=258).base_model, byte_tokenizer())
    with pytest.raises(ModelError, match="no head that predicts"):
        measure(bare)
