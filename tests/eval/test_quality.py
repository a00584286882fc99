"""The numbers of the table, against their definitions."""

import math
from string import ascii_lowercase

import pytest
import torch

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import LogitsFile, kv_bytes, measure, summary, tokenize, windows
from effconvert.eval.quality.text import EVALUATION_MODULES, Text, default_text, docstrings
from tests.eval.evaluating import byte_tokenizer, metaspace_tokenizer
from tests.models import tiny


def word_pieces():
    """Letters, as BERT's tokenizer has them: a word of more than 100 is one unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase)]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


class Letters:
    """A tokenizer of one token a letter, with a beginning or without."""

    def __init__(self, begin=None):
        self.bos_token_id = begin

    def __call__(self, text, add_special_tokens=True, verbose=True):
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return type("Encoding", (), {"input_ids": begin + [ord(letter) % 128 for letter in text]})


TEXT = Text("letters", "the quick brown fox jumps over the lazy dog" * 10)


@pytest.mark.parametrize(("context", "tokens", "shape"), [(32, 128, (4, 32)), (32, 127, (3, 32)), (512, 100, (1, 100)), (512, 4096, (1, 430)), (2, 2, (1, 2))])
def test_windows_hold_no_more_than_was_asked_for(context, tokens, shape):
    assert windows(Letters(), TEXT, context, tokens, 128).shape == shape


@pytest.mark.parametrize("form", ["bytes", "words", "blanks first"])
def test_of_a_long_text_only_the_beginning_is_tokenized_and_its_tokens_are_the_same(form):
    content = default_text().content[:60_000] + " " * 40_000 + default_text().content[:20_000]
    tokenizer = {"bytes": byte_tokenizer, "words": lambda: byte_tokenizer(merges_of=content), "blanks first": lambda: metaspace_tokenizer(content)}[form]()
    whole = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)
    for count in (1, 100, 2000, len(whole.input_ids), len(content)):
        few = tokenize(tokenizer, content, count, return_offsets_mapping=True)
        assert few.input_ids[:count] == whole.input_ids[:count]
        assert few.offset_mapping[:count] == whole.offset_mapping[:count]
        assert len(few.input_ids) < len(whole.input_ids) or count > 2000


def test_a_word_is_not_cut_where_only_the_beginning_is_tokenized():
    content = "1234567890 " * 122 + "123456789 " * 68 + f"{'x' * 150} " * 200  # the first 2,112 characters end in the 191st word
    tokenizer = word_pieces()
    assert tokenize(tokenizer, content, 200).input_ids[:200] == tokenizer(content, add_special_tokens=False).input_ids[:200]


def test_each_window_begins_as_the_tokenizer_begins_a_text():
    cut = windows(Letters(begin=1), TEXT, 32, 128, 128)
    assert cut.shape == (4, 32)
    assert cut[:, 0].tolist() == [1] * 4
    assert cut[0, 1:4].tolist() == [ord(letter) for letter in "the"]


def test_a_text_of_one_token_is_too_short():
    with pytest.raises(OptionError, match="has 1 tokens"):
        windows(Letters(), Text("short", "a"), 32, 128, 128)


def test_a_text_of_a_word_says_nothing_and_is_refused_unless_that_is_asked_for():
    with pytest.raises(OptionError, match="hi has 5 tokens, and at least 32 are needed to measure on it"):
        windows(Letters(), Text("hi", "hello"), 512, 4096, 128)
    assert windows(Letters(), Text("hi", "hello"), 512, 5, 128).shape == (1, 5)
    assert windows(Letters(), Text("line", "hello " * 6), 512, 4096, 128).shape == (1, 36)
    with pytest.raises(OptionError, match="--context 2 leaves no two tokens"):
        windows(Letters(begin=1), TEXT, 2, 128, 128)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ModelError, match="do not belong together"):
        windows(Letters(), TEXT, 32, 128, 100)


def test_loss_kl_and_agreement_are_what_they_are_defined_as(tmp_path):
    first, second = tiny("llama").eval(), tiny("llama").eval()
    with torch.no_grad():
        second.lm_head.weight.mul_(1.5)
    cut = windows(Letters(), TEXT, 100, 400, 128)
    before = summary(measure(first, list(cut), record=tmp_path / "logits"), 100)
    after = summary(measure(second, list(cut), reference=LogitsFile(tmp_path / "logits", torch.float32, 128)), 100)
    with torch.no_grad():
        theirs, mine = (torch.cat([model(cut[i : i + 1]).logits[0, :-1] for i in range(len(cut))]).double().log_softmax(-1) for model in (first, second))
    target = cut[:, 1:].flatten()
    assert before.loss == pytest.approx(-theirs[range(len(target)), target].mean().item(), rel=1e-5)
    assert after.loss == pytest.approx(-mine[range(len(target)), target].mean().item(), rel=1e-5)
    assert after.kl == pytest.approx((theirs.exp() * (theirs - mine)).sum(-1).mean().item(), rel=1e-4)
    assert after.agreement == pytest.approx((theirs.argmax(-1) == mine.argmax(-1)).double().mean().item())
    assert before.perplexity == pytest.approx(math.exp(before.loss))
    assert before.tokens == len(target)


def test_a_model_beside_itself_has_moved_nowhere(tmp_path):
    model = tiny("llama").eval()
    cut = windows(Letters(), TEXT, 50, 200, 128)
    measure(model, list(cut), record=tmp_path / "logits")
    after = summary(measure(model, list(cut), reference=LogitsFile(tmp_path / "logits", torch.float32, 128)), 50)
    assert (after.kl, after.agreement) == (0, 1)


def test_a_model_that_computes_nan_is_caught():
    model = tiny("llama").eval()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        measure(model, windows(Letters(), TEXT, 50, 200, 128))


def test_the_bytes_of_the_cache_are_counted():
    model = tiny("llama", num_key_value_heads=2).eval()
    config = model.config
    assert kv_bytes(model, torch.arange(10)) == (10 * config.num_hidden_layers * 2 * 2 * config.head_dim * 4, 0)


def test_the_default_text_is_the_same_every_time_and_long_enough():
    assert default_text() == default_text.__wrapped__()  # collected anew
    assert len(default_text().content) > 100_000


@pytest.mark.parametrize("module", EVALUATION_MODULES)
def test_every_module_of_the_default_text_has_docstrings(module):
    assert sum(map(len, docstrings(module))) > 1000
