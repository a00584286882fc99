"""What encoders are measured on: masked tokens, states, sentence pairs."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertModel

from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.encoder import embed, mask, pooling_of, read_pairs
from tests.eval.evaluating import WORDS, byte_tokenizer, measure, moved, put, row, wordpiece
from tests.models import tiny

CLOSE = 1e-5  # the losses are summed in float32


def prose(count, seed=0):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random BERT with a head, and its tokenizer. Nobody may change it: copy it."""
    return put(tmp_path_factory.mktemp("bert") / "bert", tiny("bert"), wordpiece())


@pytest.fixture
def text():
    Path("text").write_text(prose(200))
    return Path("text")


@pytest.fixture
def pairs():
    rows = [{"sentence1": prose(2 + index % 7, index), "sentence2": prose(2 + index % 5, 100 + index), "score": (index * 7) % 11 / 2} for index in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path("pairs.jsonl")


def read(pairs):
    return [json.loads(line) for line in pairs.read_text().splitlines()]


def headless(bert, folder):
    return put(folder, BertModel(AutoModel.from_pretrained(bert).config).eval(), wordpiece())


def test_specials_are_never_masked_and_the_same_tokens_are_for_every_model():
    tokenizer = wordpiece()
    contents = tuple(prose(30, seed) for seed in range(100))
    masked = mask(tokenizer, contents, 64, 128)
    share = []
    for content, ids, targets in zip(contents, masked.inputs, masked.targets, strict=True):
        chosen = targets != -100
        whole = torch.tensor(tokenizer(content).input_ids)
        assert chosen.any()
        assert not chosen[[0, -1]].any()  # [CLS], [SEP]
        assert (ids[chosen] == tokenizer.mask_token_id).all()
        assert torch.equal(ids[~chosen], whole[~chosen])
        assert torch.equal(targets[chosen], whole[chosen])
        share.append(chosen.float().mean().item() * len(ids) / (len(ids) - 2))
    # 3000 tokens at 15 %: a standard deviation of 0.65 points, and four of them.
    assert np.mean(share) == pytest.approx(0.15, abs=0.026)
    again = mask(wordpiece(), contents, 64, 128)
    assert all(torch.equal(one, other) for one, other in zip(masked.inputs, again.inputs, strict=True))


def test_a_short_text_has_one_token_masked_at_least():
    for seed in range(20):
        [targets] = mask(wordpiece(), (WORDS[seed % len(WORDS)],), 64, 128).targets
        assert (targets != -100).tolist() == [False, True, False]


def test_a_tokenizer_without_a_mask_or_of_another_model_is_refused():
    with pytest.raises(ModelError, match="has no mask token"):
        mask(byte_tokenizer(), ("text",), 64, 300)
    with pytest.raises(ModelError, match="do not belong together"):
        mask(wordpiece(), (prose(9),), 64, 10)


def logs(folder, text, context):
    """Log-probabilities at the masked tokens and what was there, window by window, in float64."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    words = text.read_text().split()[:120]
    body = context - 2
    contents = tuple(" ".join(words[at : at + body]) for at in range(0, len(words) - body + 1, body))
    masked = mask(tokenizer, contents, 64, 128)
    made = []
    for ids, targets in zip(masked.inputs, masked.targets, strict=True):
        with torch.inference_mode():
            log = model(ids[None]).logits[0].double().log_softmax(-1)
        made.append((log[targets != -100], targets[targets != -100]))
    return made


def test_the_loss_at_masked_tokens_kl_and_agreement_are_what_they_are_defined_as(bert, text, tmp_path):
    other = moved(bert, tmp_path / "moved", by=0.1)
    evaluation = measure(bert, other, text=text)
    before, after = logs(bert, text, 30), logs(other, text, 30)
    loss = torch.cat([-log[range(len(targets)), targets] for log, targets in before]).mean().item()  # over all masked tokens
    assert row(evaluation, "masked", "loss").values[0].value == pytest.approx(loss, rel=CLOSE)
    loss = torch.cat([-log[range(len(targets)), targets] for log, targets in after]).mean().item()
    assert row(evaluation, "masked", "loss").values[1].value == pytest.approx(loss, rel=CLOSE)
    moves = [(theirs.exp() * (theirs - mine)).sum(-1).mean().item() for (theirs, _), (mine, _) in zip(before, after, strict=True)]
    assert row(evaluation, "masked", "kl").values[1].value == pytest.approx(np.mean(moves), rel=1e-4)
    same = [(theirs.argmax(-1) == mine.argmax(-1)).double().mean().item() for (theirs, _), (mine, _) in zip(before, after, strict=True)]
    assert row(evaluation, "masked", "same_top_token").values[1].value == pytest.approx(np.mean(same))
    assert row(evaluation, "masked", "loss").documents == len(before) == 4
    assert evaluation.continuations == ("", "")


def test_an_encoder_beside_itself_has_moved_nowhere(bert, text, pairs):
    evaluation = measure(bert, bert, text=text, pairs=pairs, cache=False)
    assert {(held.task, held.metric) for held in evaluation.rows} == {("masked", "loss"), ("masked", "kl"), ("masked", "same_top_token"), ("pairs", "spearman")}
    assert row(evaluation, "masked", "kl").values[1].value == 0
    assert row(evaluation, "masked", "same_top_token").values[1].value == 1
    for task, metric in (("masked", "loss"), ("pairs", "spearman")):
        value = row(evaluation, task, metric).values[1]
        assert (value.difference, value.difference_error, value.p) == (0, 0, 1)


def test_an_encoder_without_a_head_is_compared_by_its_states(bert, text, tmp_path):
    first = headless(bert, tmp_path / "first")
    second = moved(first, tmp_path / "second", by=0.1)
    evaluation = measure(first, second, text=text)
    [held] = evaluation.rows
    assert (held.task, held.metric, held.better) == ("states", "cosine", "higher")
    tokenizer, words = wordpiece(), text.read_text().split()[:120]
    cosines = []
    for at in range(0, len(words) - 27, 28):
        ids = torch.tensor([tokenizer(" ".join(words[at : at + 28])).input_ids])
        with torch.inference_mode():
            a, b = (AutoModel.from_pretrained(folder)(ids).last_hidden_state[0].double() for folder in (first, second))
        cosines.append(cosine_similarity(a, b, dim=-1).mean().item())
    assert held.values[0] is None
    assert held.values[1].value == pytest.approx(np.mean(cosines), rel=1e-9)
    assert held.values[1].value < 1
    itself = measure(first, first, text=text, cache=False)
    assert itself.rows[0].values[1].value == pytest.approx(1, abs=1e-12)


def embeddings(folder, sentences, pooling):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    made = []
    for sentence in sentences:  # one at a time, so that nothing is padded
        with torch.inference_mode():
            states = model(torch.tensor([tokenizer(sentence).input_ids])).last_hidden_state[0].double()
        made.append(states[0] if pooling == "cls" else states.mean(0))
    return torch.stack(made)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.filterwarnings("ignore:.*pooler.*")
def test_pairs_are_rank_correlated_with_what_people_said(bert, text, pairs, tmp_path, pooling):
    folder = Path(shutil.copytree(bert, tmp_path / "copy"))
    if pooling == "cls":
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    held = row(measure(folder, text=text, pairs=pairs), "pairs", "spearman")
    rows = read(pairs)
    sides = [embeddings(folder, [one[side] for one in rows], pooling) for side in ("sentence1", "sentence2")]
    by_hand = stats.spearmanr(cosine_similarity(*sides, dim=-1).numpy(), [one["score"] for one in rows]).statistic
    assert held.values[0].value == pytest.approx(by_hand, abs=1e-6)
    assert (held.chance, held.documents, held.better) == (0, 40, "higher")


def test_pooling_is_mean_unless_the_models_settings_say_otherwise(tmp_path):
    assert pooling_of(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    for content, pooling in [('{"pooling_mode_cls_token": true}', "cls"), ('{"pooling_mode_cls_token": false}', "mean"), ("[]", "mean"), ("{", "mean")]:
        (tmp_path / "1_Pooling" / "config.json").write_text(content)
        assert pooling_of(tmp_path) == pooling


def test_pairs_are_read_from_json_lines_and_csv_alike(tmp_path):
    rows = [("a, b", 'c "d"', 1.0), ("é", "🦊", 2.5), ("x", "y\nz", 0.0)]
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(json.dumps({"sentence1": a, "sentence2": b, "similarity_score": c}) for a, b, c in rows))
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *rows])
    for name in ("pairs.jsonl", "pairs.csv"):
        read = read_pairs(tmp_path / name)
        assert list(zip(read.first, read.second, read.scores, strict=True)) == rows


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("pairs.jsonl", '{"a": 1}\n' * 4, "is not rows with sentence1, sentence2 and score"),
        ("pairs.jsonl", "not JSON\n", "is not rows with"),
        ("pairs.jsonl", "[1, 2]\n", "is not rows with"),
        ("pairs.jsonl", '{"sentence1": "a", "sentence2": "b", "score": "much"}\n', "is not rows with"),
        ("pairs.jsonl", '{"sentence1": "a", "sentence2": "b", "score": null}\n', "is not rows with"),
        ("pairs.csv", "one,two,three\n1,2,3\n", "is not rows with"),
        ("pairs.csv", "sentence1,sentence2,score\na,b\n", "is not rows with"),
        ("pairs.csv", "sentence1,sentence2,score\na,b,1\na,b,2\n", "has 2 pairs"),
        ("pairs.csv", "", "has 0 pairs"),
        ("pairs.csv", "sentence1,sentence2,score\na,b,1\na,b,nan\na,b,3\n", "has a score that is no number in row 2; mend that row"),
        ("pairs.csv", "sentence1,sentence2,score\na,b,1\na,c,1\na,d,1\n", "has the same score in all rows"),
        ("pairs.csv", b"sentence1,sentence2,score\n\xff,b,1\n", "is not rows with"),
    ],
)
def test_files_that_are_no_pairs_are_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OptionError, match=told):
        read_pairs(tmp_path / name)


def test_a_file_of_pairs_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(OptionError, match=r"--pairs .* cannot be read"):
            read_pairs(path)


def test_without_pairs_it_is_said_that_nothing_is_known_of_sentences(bert, text):
    assert [note for note in measure(bert, text=text).notes if "--pairs FILE" in note]


def test_other_tokenizers_are_compared_on_pairs_alone(bert, text, pairs, tmp_path):
    shutil.copytree(bert, tmp_path / "cased")
    settings = tmp_path / "cased" / "tokenizer.json"
    held = json.loads(settings.read_text())
    held["post_processor"]["single"].append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    settings.write_text(json.dumps(held))
    evaluation = measure(bert, tmp_path / "cased", text=text, pairs=pairs)
    assert {held.task for held in evaluation.rows} == {"masked", "pairs"}
    assert [held.values[1] is None for held in evaluation.rows] == [held.task == "masked" for held in evaluation.rows]
    assert [note for note in evaluation.notes if "cased has another tokenizer than bert" in note]


def test_encoders_and_decoders_are_not_compared(bert, llama):
    for models in ((bert, llama), (llama, bert)):
        with pytest.raises(OptionError, match="another kind"):
            measure(*models)


def test_what_is_for_decoders_is_refused_for_encoders_and_the_other_way_round(bert, llama, pairs):
    with pytest.raises(OptionError, match="give --pairs, not --tasks"):
        measure(bert, tasks="piqa")
    with pytest.raises(OptionError, match="--passkey is for models that predict the next token, and bert is an encoder"):
        measure(bert, passkey="256")
    with pytest.raises(OptionError, match="--pairs is for encoders"):
        measure(llama, pairs=pairs)


def test_a_model_without_a_head_is_measured_by_pairs_or_beside_another(bert, text, pairs, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(bert, bare)
    AutoModel.from_pretrained(bert).save_pretrained(bare)
    with pytest.raises(OptionError, match="bare has no head, so nothing can be measured of it alone; give --pairs FILE, or another model"):
        measure(bare, text=text)
    assert {row.task for row in measure(bare, text=text, pairs=pairs).rows} == {"pairs"}
    assert measure(bare, bare, text=text).rows


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("roberta", 30),
        ("roberta", 62),
        ("bert", 64),
        ("distilbert", 64),
        ("modernbert", 64),
        ("fnet", 64),
    ],
)
def test_every_family_of_encoders_is_measured(kind, context, text, pairs, tmp_path):
    folder = put(tmp_path / kind, tiny(kind), wordpiece())
    evaluation = measure(folder, moved(folder, tmp_path / "moved", by=0.1), text=text, pairs=pairs, context=context)
    assert len(evaluation.rows) == 4
    assert all(held.values[1] for held in evaluation.rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", ["bert", "fnet"])
def test_a_sentence_is_the_same_whatever_stands_in_its_batch(kind, pooling, pairs, tmp_path):
    """FNet's class takes no notice of padding."""
    model, tokenizer, said = tiny(kind), wordpiece(), read(pairs)
    sentences = [row["sentence1"] for row in said]
    assert len({len(tokenizer(sentence).input_ids) for sentence in sentences}) > 3
    found = embed(model, tokenizer, sentences, pooling, 64, lambda _: None)
    with torch.inference_mode():
        alone = [model.base_model(torch.tensor([tokenizer(sentence).input_ids])).last_hidden_state[0].double() for sentence in sentences]
    torch.testing.assert_close(found, torch.stack([states[0] if pooling == "cls" else states.mean(0) for states in alone]), rtol=1e-5, atol=1e-5)


def test_a_roberta_reads_fewer_tokens_than_it_has_positions(text, tmp_path):
    model = tiny("roberta")
    reads = 64 - model.config.pad_token_id - 1
    with pytest.raises(OptionError, match=f"--context {reads + 1} is more than the {reads} tokens"):
        measure(put(tmp_path / "roberta", model, wordpiece()), text=text, context=reads + 1)


def test_a_text_that_is_too_short_to_mask_is_refused(bert):
    Path("short").write_text(prose(7))
    with pytest.raises(OptionError, match="has 7 tokens, and at least 8"):
        measure(bert, text=Path("short"))


def test_an_encoder_that_computes_nan_is_caught(bert, text, pairs, tmp_path):
    broken = moved(bert, tmp_path / "broken", by=float("nan"), only="layer.1.output")
    with pytest.raises(ModelError, match="NaN"):
        measure(broken, text=text)
