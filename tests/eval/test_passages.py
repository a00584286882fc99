"""The stretches of text that models are compared on, and how many bytes their tokens are."""

import pytest

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.passages import cut, recut, same
from effconvert.eval.quality.text import Text
from tests.eval.evaluating import byte_tokenizer, metaspace_tokenizer

PLAIN = Text("plain", "The quick brown fox jumps over the lazy dog.\n    And back again,\n\n\nmany times, " * 30)
WIDE = Text("wide", "Größe, naïve, 日本語の文章, Ελληνικά, 🦊🐕 and so on; " * 30)
TEXTS = [PLAIN, WIDE]


def whole(text, tokenizer, context=20):
    return cut(tokenizer, text, context, 200, 500)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_the_windows_follow_on_one_another_and_nothing_is_left_out(text):
    tokenizer = byte_tokenizer(merges_of=text.content)
    passages = whole(text, tokenizer)
    ids = [token for window in passages.windows for token in window.tolist()]
    assert ids == tokenizer(text.content).input_ids[: len(ids)]
    assert {len(window) for window in passages.windows} == {20}
    assert len(passages.windows) == 10


def test_what_is_predicted_is_counted_in_bytes():
    tokenizer = byte_tokenizer(merges_of=PLAIN.content)
    passages = whole(PLAIN, tokenizer)
    for window, size in zip(passages.windows, passages.bytes, strict=True):
        assert size == len(tokenizer.decode(window[1:]).encode())
    assert "".join(passages.content) == PLAIN.content[: sum(map(len, passages.content))]


def test_with_a_beginning_every_token_of_the_text_is_predicted():
    tokenizer = byte_tokenizer(begin=True)
    passages = whole(PLAIN, tokenizer, context=21)
    assert {window[0].item() for window in passages.windows} == {tokenizer.bos_token_id}
    assert set(passages.bytes) == {20}
    assert all(len(content) == 20 for content in passages.content)


def test_letters_of_several_bytes_are_counted_in_bytes():
    tokenizer = metaspace_tokenizer(WIDE.content, size=500)
    passages = whole(WIDE, tokenizer)
    for window, size in zip(passages.windows, passages.bytes, strict=True):
        assert size == len("".join(tokenizer.convert_ids_to_tokens(window[1:].tolist())).replace("▁", " ").encode())


def test_the_same_tokenizer_gives_the_same_passages():
    passages = whole(PLAIN, byte_tokenizer())
    assert recut(byte_tokenizer(), passages, byte_tokenizer(), 500, None, "other") is passages


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_another_tokenizer_gets_the_same_stretches_of_text(text):
    first, other = byte_tokenizer(merges_of=text.content), byte_tokenizer(begin=True)
    passages = whole(text, first)
    again = recut(first, passages, other, 500, None, "other")
    assert (passages.alike, again.alike) == (True, False)
    assert again.content == passages.content
    for window, content, size in zip(again.windows, again.content, again.bytes, strict=True):
        assert window.tolist() == [other.bos_token_id, *other(content, add_special_tokens=False).input_ids]
        assert size == len(content.encode())
        assert size == len(window) - 1  # one token a byte


def test_tokenizers_that_differ_in_their_beginning_alone_are_not_the_same():
    assert not same(byte_tokenizer(), byte_tokenizer(begin=True), ("text",))


def test_a_window_that_is_too_long_for_another_model_is_refused():
    first = byte_tokenizer(merges_of=PLAIN.content)
    with pytest.raises(OptionError, match=r"to other, which reads 24; give a smaller --context"):
        recut(first, whole(PLAIN, first), byte_tokenizer(), 500, 24, "other")


def test_a_tokenizer_of_another_model_is_refused():
    first = byte_tokenizer(merges_of=PLAIN.content)
    with pytest.raises(ModelError, match=r"the tokenizer of other gives the token \d+ and the model has 100"):
        recut(first, whole(PLAIN, first), byte_tokenizer(), 100, None, "other")


def test_a_tokenizer_that_knows_no_places_is_refused():
    slow = byte_tokenizer()
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(ModelError, match=r"save a fast one \(tokenizer.json\)"):
        whole(PLAIN, slow)


def test_a_letter_cut_by_the_end_of_a_window_counts_for_the_bytes_in_it():
    sizes = whole(WIDE, byte_tokenizer()).bytes
    assert abs(sum(sizes) - 19 * len(sizes)) <= 2 * len(sizes)
    assert max(sizes) <= 19 + 3  # a letter has four bytes at most


def test_blanks_at_the_end_of_a_window_count():
    sizes = whole(PLAIN, byte_tokenizer(trim=True)).bytes
    assert all(abs(size - 19) <= 2 for size in sizes)
