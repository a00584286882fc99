"""Loops, distinct n-grams, passkeys; and what is said of a text, against its definition."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from effconvert.convert.run import convert
from effconvert.errors import OptionError
from effconvert.eval.quality.language import FILLER, KEYS, LENGTH, PERIOD, TAIL, distinct, hide, loops, passkey, shortest
from effconvert.options import RunOptions
from effconvert.surgery.attention.gqa import Gqa
from tests.eval.evaluating import SMALL, byte_tokenizer, measure, metaspace_tokenizer, moved, put, row, tiny_llama

PLAIN = "The quick brown fox jumps over the lazy dog. Where we go, nobody knows; there and back again, many times. " * 8
WIDE = "Größe, naïve, 日本語の文章, Ελληνικά and so on; " * 12


def noise(seed, length, kinds=1000):
    draw = random.Random(seed)
    return [draw.randrange(kinds) for _ in range(length)]


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [([1, 2, 3], 2, 1.0), ([1, 1, 1, 1, 1], 2, 1 / 4), ([1, 2, 1, 2, 1], 2, 2 / 4), ([1, 2, 3, 4, 1, 2, 3, 4], 4, 4 / 5), ([1], 2, 1.0), ([], 4, 1.0)],
)
def test_distinct_is_the_share_of_different_n_grams(tokens, n, share):
    assert distinct(tokens, n) == share


@pytest.mark.parametrize("period", range(1, PERIOD + 1))
def test_every_cycle_is_found_however_it_began(period):
    need = max(TAIL, 3 * period)
    for seed in range(10):
        cycle = list(itertools.islice(itertools.cycle(noise(seed, period)), need))
        assert loops(cycle)
        assert loops(noise(seed + 100, LENGTH - need) + cycle)
        assert loops(noise(seed + 100, 5) + cycle[1:] + cycle[need % period : need % period + 1])  # from anywhere in it
        broken = [*cycle[:-1], -1]
        assert not loops(noise(seed + 100, 5) + broken)


@pytest.mark.parametrize("period", range(1, PERIOD + 1))
def test_less_than_three_rounds_or_a_short_tail_are_no_loop(period):
    need = max(TAIL, 3 * period)
    cycle = list(itertools.islice(itertools.cycle(range(period)), need - 1))
    assert not loops([-1, *cycle])


def test_what_repeats_nothing_is_no_loop():
    assert not any(loops(noise(seed, LENGTH)) for seed in range(1000))
    assert not loops([])
    assert not loops([1] * (TAIL - 1))


def test_a_cycle_that_is_longer_than_looked_for_is_no_loop():
    assert not loops(list(range(PERIOD + 1)) * 3)


TOKENIZERS = {"bytes": byte_tokenizer(), "merged": byte_tokenizer(merges_of=FILLER + PLAIN), "beginning": byte_tokenizer(begin=True)}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("length", [256, 300, 512, 1024])
def test_a_passkey_is_hidden_in_a_text_of_that_length(tokenizer, length):
    filler = len(tokenizer(FILLER, add_special_tokens=False).input_ids)
    for depth in (0.05, 0.5, 0.95):
        ids, answer = hide(tokenizer, 71432, depth, length)
        assert length - filler - 8 <= len(ids) + len(answer) <= length
        told = tokenizer.decode(ids, skip_special_tokens=True)
        assert told.count("71432") == 2
        assert told.endswith("The pass key is")
        assert tokenizer.decode(answer) == " 71432"


def test_depth_is_where_in_the_text_the_key_is():
    tokenizer = TOKENIZERS["merged"]
    depths = [(index + 0.5) / KEYS for index in range(KEYS)]
    told = [tokenizer.decode(hide(tokenizer, 71432, depth, 4096)[0]) for depth in depths]
    places = [text.index("71432") / len(text) for text in told]
    assert places == sorted(set(places))
    assert places == pytest.approx(depths, abs=0.06)  # the task itself stands before it, and fillers are whole


class Model:
    """Predicts the next token by a rule."""

    device = torch.device("cpu")

    def __init__(self, rule, vocabulary=600):
        self.rule, self.vocabulary = rule, vocabulary

    def __call__(self, ids, use_cache):
        logits = torch.zeros(1, ids.shape[1], self.vocabulary)
        for at in range(ids.shape[1]):
            logits[0, at, self.rule(ids[0, : at + 1].tolist())] = 1
        outputs = {"logits": logits}
        return type("Output", (dict,), {"__getattr__": dict.__getitem__})(outputs)


def copy(tokens):
    """Write what came after the longest stretch that is read a second time."""
    best, after = 0, 0
    for at in range(len(tokens) - 2, -1, -1):
        length = 0
        while length <= at and tokens[at - length] == tokens[-1 - length]:
            length += 1
        if length > best:
            best, after = length, tokens[at + 1]
    return after


def quietly(_):
    return None


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_model_that_copies_finds_every_passkey_and_one_that_does_not_none(tokenizer):
    [found] = passkey(Model(copy), tokenizer, 256, quietly).samples
    assert (found.metric, found.value, found.chance, len(found.items)) == ("256_tokens", 1, 0, KEYS)
    [found] = passkey(Model(lambda tokens: tokens[-1]), tokenizer, 256, quietly).samples
    assert found.value == 0


def test_a_passkey_can_be_found_with_a_tokenizer_that_writes_a_blank_before_a_text():
    [found] = passkey(Model(copy), metaspace_tokenizer(FILLER + PLAIN + "The pass key is 1. Remember it."), 400, quietly).samples
    assert found.value == 1


def test_a_passkey_is_asked_for_in_a_text_that_goes_on():
    """Some tokenizers end each text."""
    tokenizer = byte_tokenizer(begin=True)
    ids, answer = hide(tokenizer, 71432, 0.5, 300)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (begin, end)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=special)
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    assert hide(tokenizer, 71432, 0.5, 300) == (ids, answer)


def test_a_passkey_that_does_not_fit_is_refused_or_left_out(llama, tmp_path):
    long = AutoConfig.from_pretrained(llama)
    long.max_position_embeddings = 512
    folder = tmp_path / "long"
    AutoModelForCausalLM.from_config(long).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    need = shortest(TOKENIZERS["bytes"])
    with pytest.raises(OptionError, match=rf"--passkey 64 is too short: the question alone takes {need} tokens"):
        measure(folder, **{**SMALL, "passkey": (64,)})
    assert row(measure(folder, **{**SMALL, "passkey": (need,)}), "passkey", f"{need}_tokens")


def windows(folder, text, context, tokens):
    """Log-likelihoods of the text's consecutive windows, in float64, from nothing of effconvert."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids[:tokens]
    made = []
    for at in range(0, len(ids) - context + 1, context):
        window = torch.tensor(ids[at : at + context])
        with torch.inference_mode():
            made.append((model(window[None]).logits[0, :-1].double().log_softmax(-1), window[1:], tokenizer))
    return made


def summed(found):
    return sum(log[range(len(targets)), targets].sum().item() for log, targets, _ in found)


# The losses are summed in float32: 24 bits, over 29 tokens in each window.
CLOSE = 1e-5


def test_perplexity_and_bits_per_byte_are_what_they_are_defined_as(llama, tmp_path):
    (tmp_path / "text").write_text(PLAIN)
    found = windows(llama, PLAIN, 30, 120)
    evaluation = measure(llama, text=tmp_path / "text")
    assert row(evaluation, "text", "perplexity").values[0].value == pytest.approx(math.exp(-summed(found) / (4 * 29)), rel=CLOSE)
    assert row(evaluation, "text", "bits_per_byte").values[0].value == pytest.approx(-summed(found) / math.log(2) / (4 * 29), rel=CLOSE)  # a byte a token
    assert row(evaluation, "text", "perplexity").documents == 4


def test_bits_per_byte_of_letters_of_several_bytes(tmp_path):
    tokenizer = metaspace_tokenizer(WIDE, size=120)
    folder = put(tmp_path / "model", tiny_llama(len(tokenizer)), tokenizer)
    (tmp_path / "text").write_text(WIDE, encoding="utf-8")
    found = windows(folder, WIDE, 30, 120)
    size = sum(len("".join(tokenizer.convert_ids_to_tokens(targets.tolist())).replace("▁", " ").encode()) for _, targets, _ in found)
    value = row(measure(folder, text=tmp_path / "text"), "text", "bits_per_byte").values[0].value
    assert value == pytest.approx(-summed(found) / math.log(2) / size, rel=CLOSE)


def test_a_text_measures_the_same_as_in_the_report_of_a_conversion(llama, tmp_path):
    (tmp_path / "text").write_text(PLAIN)
    told = convert(str(llama), (Gqa(groups=1, pool="mean"),), RunOptions(output=tmp_path / "mqa", text=tmp_path / "text", tokens=120, context=30)).report
    evaluation = measure(llama, tmp_path / "mqa", text=tmp_path / "text")
    first, second = row(evaluation, "text", "perplexity").values
    assert first.value == pytest.approx(told.before.quality.perplexity, rel=1e-12)
    assert second.value == pytest.approx(told.after.quality.perplexity, rel=1e-12)
    assert row(evaluation, "text", "kl").values[1].value == pytest.approx(told.after.quality.kl, rel=1e-12)
    assert row(evaluation, "text", "same_top_token").values[1].value == pytest.approx(told.after.quality.agreement, rel=1e-12)


def test_models_with_other_tokenizers_are_compared_in_bits_per_byte_alone(llama, tmp_path):
    tokenizer = byte_tokenizer(merges_of=PLAIN)
    other = put(tmp_path / "merged", tiny_llama(len(tokenizer)), tokenizer)
    same = moved(llama, tmp_path / "moved")
    evaluation = measure(llama, other, same)
    assert [value is None for value in row(evaluation, "text", "perplexity").values] == [False, True, False]
    assert [value is None for value in row(evaluation, "text", "kl").values] == [True, True, False]
    assert [value is None for value in row(evaluation, "text", "same_top_token").values] == [True, True, False]
    assert all(row(evaluation, "text", "bits_per_byte").values)
    assert [note for note in evaluation.notes if "tokenizer" in note and "merged" in note and "compare bits per byte" in note]
    assert not [note for note in evaluation.notes if "moved" in note]


def test_models_with_other_vocabularies_have_no_kl(llama, tmp_path):
    padded = put(tmp_path / "padded", tiny_llama(320), AutoTokenizer.from_pretrained(llama))
    evaluation = measure(llama, padded)
    assert all(row(evaluation, "text", "perplexity").values)
    assert not [held for held in evaluation.rows if held.metric in ("kl", "same_top_token")]
    assert [note for note in evaluation.notes if "320" in note and "258" in note and "no KL" in note]


def test_models_of_other_types_are_compared_in_their_own(llama, tmp_path):
    wide = tmp_path / "wide"
    put(wide, AutoModelForCausalLM.from_pretrained(moved(llama, tmp_path / "moved"), dtype=torch.float32), AutoTokenizer.from_pretrained(llama))
    (tmp_path / "text").write_text(PLAIN)
    evaluation = measure(llama, wide, text=tmp_path / "text")
    assert [subject.dtype for subject in evaluation.subjects] == ["bfloat16", "float32"]
    before, after = windows(llama, PLAIN, 30, 120), windows(wide, PLAIN, 30, 120)
    kl = sum((theirs.exp() * (theirs - mine)).sum().item() for (theirs, _, _), (mine, _, _) in zip(before, after, strict=True)) / (4 * 29)
    assert row(evaluation, "text", "kl").values[1].value == pytest.approx(kl, rel=1e-4)  # the distributions are in float32
    alike = measure(llama, wide, text=tmp_path / "text", dtype="float32", cache=False)
    assert row(alike, "text", "perplexity").values[1].value == pytest.approx(row(evaluation, "text", "perplexity").values[1].value, rel=1e-12)
    assert row(alike, "text", "perplexity").values[0].value != row(evaluation, "text", "perplexity").values[0].value


def test_what_a_model_writes_is_looked_at(llama, tmp_path, monkeypatch):
    settings = GenerationConfig(eos_token_id=2, repetition_penalty=9.0)

    def generate(ids, max_new_tokens, **_):
        assert (stuck.generation_config.eos_token_id, stuck.generation_config.repetition_penalty) == (2, None)  # a penalty would hide loops
        return torch.cat([ids, torch.full((1, max_new_tokens), 50)], 1)

    stuck = SimpleNamespace(generate=generate, device="cpu", generation_config=settings)
    monkeypatch.setattr("effconvert.eval.quality.running.load_measured", lambda *_: stuck)
    monkeypatch.setattr(
        "effconvert.eval.quality.language.measure", lambda _, cut, *rest: [SimpleNamespace(loss=1.0, tokens=9, kl=None, same=None) for _ in cut]
    )
    evaluation = measure(llama, **{**SMALL, "generation": True})
    values = {metric: row(evaluation, "generation", metric).values[0].value for metric in ("distinct_2", "repeated_4", "loops")}
    written = len(evaluation.continuations[0])  # letters, a token each: what the model has positions for beyond the prompt
    assert 24 < written <= LENGTH
    assert values == {"distinct_2": 1 / (written - 1), "repeated_4": 1 - 1 / (written - 3), "loops": 1}
    assert row(evaluation, "generation", "loops").better is None
    letter = AutoTokenizer.from_pretrained(llama).decode([50])
    assert evaluation.continuations == (letter * written,)
    assert stuck.generation_config is settings
    assert evaluation.prompt
