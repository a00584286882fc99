"""An exact conversion is held to its claim on texts as long as the model reads, as far as that takes no longer than people wait."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from effconvert.checkpoint.config import Config
from effconvert.convert import exact
from effconvert.convert.run import convert
from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing.linformer import Linformer
from effconvert.surgery.mixing.streaming import Streaming
from tests.models import characters, save, tiny

LONG = 600  # tokens that the models here read
PLENTY = 10**12


def lengths(longest=LONG, tokens=4096, free=PLENTY, kind="llama"):
    raw = {"model_type": kind, "max_position_embeddings": longest, "vocab_size": 128, "num_attention_heads": 4}
    return [len(text) for text in exact.texts(Config(raw, FAMILIES[kind]), tokens, free)]


def test_texts_grow_to_what_the_model_reads_or_what_is_measured_on():
    assert lengths() == [128, 512, 600]
    assert lengths(tokens=200) == [128, 200]
    assert lengths(longest=None) == [128, 512, 2048, 4096]
    assert lengths(longest=128) == [128]
    assert lengths(longest=3) == [3]


def test_each_text_begins_the_next_and_is_the_same_each_time():
    config = Config({"model_type": "llama", "max_position_embeddings": LONG, "vocab_size": 128, "num_attention_heads": 4}, FAMILIES["llama"])
    texts = exact.texts(config, 4096, PLENTY)
    assert all(torch.equal(long[: len(short)], short) for short, long in pairwise(texts))
    assert torch.equal(exact.texts(config, 4096, PLENTY)[-1], texts[-1])
    assert len(texts[-1].unique()) > 100


def test_scores_and_the_logits_of_encoders_must_fit_into_memory():
    assert lengths(longest=4096, free=16 * 4 * 1100**2) == [128, 512, 1024]
    assert lengths(longest=4096, free=16 * 4 * 1030**2, kind="bert") == [128, 512]  # beside 8 bytes for each of 128 logits a token
    assert lengths(longest=4096, free=16 * 4 * 1030**2) == [128, 512, 1024]
    assert lengths(longest=4096, free=0) == [128]


@pytest.mark.parametrize(
    ("seconds", "read"),
    [
        ((20, 59, 0), 3),  # as the length: 1024 take 118
        ((31, 0, 0), 1),  # 512 tokens would take 124 at least
        ((2, 32, 0), 2),  # as the square: 2 x 16, and then 32 x 4
        ((0, 61, 0), 2),  # as the length, where nothing is known of how it grows
        ((0.1, 30, 0), 2),  # no faster than the cube
    ],
)
def test_a_text_that_would_take_too_long_is_not_read(seconds, read, monkeypatch):
    clock, lengths = SimpleNamespace(now=0.0), (128, 512, 1024)

    def take(model, text, decoder):
        clock.now += seconds[lengths.index(len(text))]
        return torch.full((1, 1), float(len(text)))

    monkeypatch.setattr(exact, "_spread_logits", take)
    monkeypatch.setattr(exact, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    texts = [torch.zeros(length) for length in lengths]
    made = exact.logits(None, texts, True, lambda _: None)
    assert [int(values) for values in made] == list(lengths[:read])
    assert exact.compare(texts, made, made) == (0, lengths[read - 1])


def test_a_device_that_is_full_ends_the_texts_but_not_before_the_first(monkeypatch):
    def take(model, text, decoder):
        if len(text) > model:
            raise torch.OutOfMemoryError
        return torch.ones(1, 1)

    monkeypatch.setattr(exact, "_spread_logits", take)
    read = [torch.zeros(length) for length in (128, 512)]
    assert len(exact.logits(128, read, True, lambda _: None)) == 1
    with pytest.raises(torch.OutOfMemoryError):
        exact.logits(100, read, True, lambda _: None)


@pytest.fixture
def source(tmp_path):
    folder = save(tiny("llama", max_position_embeddings=LONG), tmp_path / "source")
    characters(folder)
    return folder


def test_what_is_exact_is_compared_on_as_long_a_text_as_the_model_reads(source, tmp_path):
    for surgery in (Gqa(groups=4), Streaming(window=LONG)):
        report = convert(str(source), (surgery,), RunOptions(output=tmp_path / surgery.name)).report
        assert report.compared == LONG
        assert report.difference is not None


def test_a_window_that_is_shorter_than_it_claims_is_caught_beyond_it(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Streaming, "is_exact", lambda *_: True)
    with pytest.raises(ModelError, match="on a text of 512 tokens, and this conversion must not change any"):
        convert(str(source), (Streaming(window=300, sinks=4),), RunOptions(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_state_that_forgets_is_caught(source, tmp_path, monkeypatch):
    """All logits but the last are those of a text read at once, and the last one goes on from what was remembered of it."""
    real = Call.with_window

    def forgetful(self, count):
        key, value, live = real(self, count)
        return key, value, live & (torch.arange(live.shape[1]) >= live.shape[1] - 100) if self.query.shape[-2] == 1 else live

    monkeypatch.setattr(Call, "with_window", forgetful)
    with pytest.raises(ModelError, match="on a text of 128 tokens, and this conversion must not change any"):
        convert(str(source), (Streaming(window=LONG, sinks=4),), RunOptions(output=tmp_path / "out"))


def test_an_encoder_is_compared_on_its_longest_text(tmp_path):
    folder = save(tiny("bert", max_position_embeddings=300), tmp_path / "source")
    report = convert(str(folder), (Linformer(rank=300),), RunOptions(output=tmp_path / "out")).report
    assert report.compared == 300
    assert report.difference < 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_bigcode", "gemma2"])
@pytest.mark.parametrize("bare", [False, True])
def test_logits_all_over_a_text_are_those_of_the_whole_text(kind, bare):
    model = tiny(kind)
    model = model.base_model if bare else model
    text = torch.arange(3, 63)
    with torch.no_grad():
        output = model(text[None], use_cache=False)
    expected = output.last_hidden_state[0] if bare else output.logits[0]
    [made] = exact.logits(model, [text], True, lambda _: None)
    assert torch.allclose(made, expected, atol=1e-4 * float(expected.abs().max()))


def test_nan_is_refused():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity"):
        exact.logits(model, [torch.arange(3, 60)], True, lambda _: None)
