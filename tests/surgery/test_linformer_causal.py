"""A token sees its own block and mixtures of those finished before, whatever came in which call; what it remembers grows as was planned."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effconvert.checkpoint.checkpoint import open_checkpoint
from effconvert.convert.inspection import inspect
from effconvert.convert.run import convert
from effconvert.errors import ModelError, OptionError
from effconvert.eval.quality.perplexity import cache_bytes
from effconvert.eval.subject import open_model
from effconvert.modeling import cache_for
from effconvert.modeling.caches import growth_bytes, kv_bytes, state_bytes
from effconvert.modeling.state import State
from effconvert.options import RunOptions
from effconvert.report import tables
from effconvert.surgery._placed import open_checked
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing._mixing import Mixing
from effconvert.surgery.mixing.linformer_causal import LinformerCausal
from tests.mixers.mixing import SAME, far, in_pieces, pair, run, tokens, with_cache
from tests.models import characters, save, tiny
from tests.surgery.rows import GROUPS, HEADS, WIDTH, random
from tests.surgery.rows import config as shape
from tests.surgery.rows import rows as any_rows

SHARES = ["none", "headwise", "key-value"]
SIZES = [(6, 2, 0), (6, 2, 4), (6, 4, 1), (5, 5, 3), (7, 1, 2), (2, 1, 2), (6, 3, 6), (7, 3, 3)]  # block, rank and sinks
EXACT = 2e-6  # of float32 values of size 1
TEXT = 23
SMALL = ("linformer-causal", {"block": 6, "rank": 2})
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 14}


config = partial(shape, num_key_value_heads=GROUPS)


def rows(count=TEXT):
    return any_rows(count)


def trained(technique):
    """Parameters as training might leave them."""
    begun = technique.initial_values(config("llama"), 0)
    return {name: value + 0.3 * random(*value.shape, seed=seed) for seed, (name, value) in enumerate(begun.items())}


def mixed(technique, weights, query, key, value, sizes=None, softcap=None, change=lambda state: None):
    """What the mixer gives in one call without a state, or in several that go on from each other."""
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool)
    call = Call(query, key, value, WIDTH**-0.5, live, True, None, query.transpose(1, 2).flatten(2), None, softcap)
    if sizes is None:
        return technique.mix(weights, call)
    state, made, at = State(technique.cache_slots(config("llama"))), [], 0
    for size in sizes:
        part = call.part(at, at + size)
        state.update(part.key, part.value)
        made.append(technique.mix(weights, Call(**{**vars(part), "state": state, "pending": 0})))
        change(state)
        at += size
    assert at == key.shape[2]
    return torch.cat(made, 2)


def reference(technique, weights, query, key, value, softcap=None):
    """The definition in float64: text by text, head by head, token by token."""
    out, size = torch.zeros_like(query, dtype=torch.float64), technique.block
    for text in range(len(query)):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            e, f = (weights.get(name, weights["key_map"]).double() for name in ("key_map", "value_map"))
            e, f = (matrix[group] if len(matrix) > 1 else matrix[0] for matrix in (e, f))
            keys, values = key[text, group].double(), value[text, group].double()
            for token in range(query.shape[2]):
                scores, given, start = [], [], token // size * size
                for block in range(0, start, size):
                    for row in range(technique.rank):
                        own = [place for place in range(size) if place * technique.rank // size == row]  # the tokens that it began as the mean of
                        mixes = [place for place in range(size) if block or place >= technique.sinks]  # sinks are not mixed
                        left = len({*own} & {*mixes}) / len(own)
                        if not left:
                            continue
                        scaled, added = keys[block : block + size][mixes] / left, float(weights["weight"][head]) + math.log(left)
                        scores.append((score(query[text, head, token].double(), e[row, mixes] @ scaled, softcap), added))
                        given.append(f[row, mixes] @ values[block : block + size][mixes] / left)
                for other in [*range(min(technique.sinks, start)), *range(start, token + 1)]:
                    scores.append((score(query[text, head, token].double(), keys[other], softcap), 0.0))
                    given.append(values[other])
                shares = torch.tensor([one + added for one, added in scores], dtype=torch.float64).softmax(0)
                out[text, head, token] = sum(share * row for share, row in zip(shares, given, strict=True))
    return out


def score(query, key, softcap):
    plain = float(query @ key) / math.sqrt(WIDTH)
    return plain if softcap is None else softcap * math.tanh(plain / softcap)


def softmax(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


# What is computed


@pytest.mark.parametrize(("block", "rank", "sinks"), SIZES)
@pytest.mark.parametrize("share", SHARES)
def test_mixing_is_that_of_the_definition(block, rank, sinks, share):
    technique = LinformerCausal(block=block, rank=rank, sinks=sinks, share=share)
    weights = trained(technique)
    expected = reference(technique, weights, *rows()).float()
    for sizes in (None, [TEXT], [1] * TEXT, (6, 1, 5, 7, 4), (3, 1, 1, 1, 17), (13, 10)):
        assert torch.allclose(mixed(technique, weights, *rows(), sizes), expected, atol=EXACT), sizes


@pytest.mark.parametrize("count", [1, 5, 6, 7, 12])
def test_texts_about_as_long_as_a_block(count):
    technique = LinformerCausal(block=6, rank=3)
    weights = trained(technique)
    expected = reference(technique, weights, *rows(count)).float()
    for sizes in (None, [1] * count):
        assert torch.allclose(mixed(technique, weights, *rows(count), sizes), expected, atol=EXACT)


def test_scores_are_capped_before_mixtures_get_their_weight():
    technique = LinformerCausal(block=6, rank=2)
    weights = trained(technique)
    query, key, value = rows()
    expected = reference(technique, weights, 5 * query, key, value, softcap=1.5).float()
    assert torch.allclose(mixed(technique, weights, 5 * query, key, value, softcap=1.5), expected, atol=EXACT)
    assert not torch.allclose(mixed(technique, weights, 5 * query, key, value), expected, atol=0.1)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [1, 5, TEXT])
def test_as_many_mixtures_as_tokens_are_softmax(share, count):
    technique = LinformerCausal(block=5, rank=5, sinks=2, share=share)
    assert technique.is_exact(config("llama"))
    for sizes in (None, [1] * count):  # sinks are seen once, not in a mixture too
        assert torch.allclose(mixed(technique, technique.initial_values(config("llama"), 0), *rows(count), sizes), softmax(*rows(count)), atol=EXACT)


def test_fewer_are_not():
    technique = LinformerCausal(block=5, rank=4)
    assert not technique.is_exact(config("llama"))
    assert (mixed(technique, technique.initial_values(config("llama"), 0), *rows()) - softmax(*rows())).abs().max() > 1e-2


@pytest.mark.parametrize("sinks", [0, 1, 2, 6])
@pytest.mark.parametrize(("block", "rank"), [(6, 2), (6, 1), (6, 3), (8, 4)])
def test_where_tokens_that_are_mixed_have_the_same_key_nothing_is_lost(block, rank, sinks):
    """A mean counts as often as it has tokens: then it is exactly what they were together."""
    query, key, value = rows()
    key = key[:, :, torch.arange(TEXT) // (block // rank) * (block // rank)]
    technique = LinformerCausal(block=block, rank=rank, sinks=sinks)
    weights = technique.initial_values(config("llama"), 0)
    assert torch.allclose(mixed(technique, weights, query, key, value), softmax(query, key, value), atol=EXACT)
    weights["weight"] = torch.zeros(HEADS)
    assert not torch.allclose(mixed(technique, weights, query, key, value), softmax(query, key, value), atol=1e-2)


@pytest.mark.parametrize("at", [1, 5, 6, 7, 11, 12, 22])
def test_what_comes_later_changes_not_a_bit(at):
    technique = LinformerCausal(block=6, rank=2)
    weights, (query, key, value) = trained(technique), rows()
    later = (torch.arange(TEXT) >= at).float()[:, None] * 1e4
    other = mixed(technique, weights, query + later, key - later, value + later)
    assert torch.equal(other[:, :, :at], mixed(technique, weights, query, key, value)[:, :, :at])
    assert not torch.equal(other[:, :, at:], mixed(technique, weights, query, key, value)[:, :, at:])


def test_mixtures_of_a_block_that_is_not_finished_are_never_seen():
    """Whatever the state holds in their places."""
    technique = LinformerCausal(block=6, rank=2)
    weights = trained(technique)

    def spoil(state):
        finished = int(state.tensors["count"][0]) // 6 * 2
        for name in ("mixed_key", "mixed_value"):
            state.tensors[name][:, :, finished:] = 1e4

    for sizes in ([1] * TEXT, (4, 9, 10), (11, 1, 11)):
        made = mixed(technique, weights, *rows(), sizes, change=spoil)
        assert torch.allclose(made, reference(technique, weights, *rows()).float(), atol=EXACT)
    weights["weight"] = torch.full((HEADS,), 1e4)  # whoever sees mixtures sees nothing else
    query, key, value = rows()
    assert torch.allclose(mixed(technique, weights, query, key, value)[:, :, :6], softmax(query, key, value)[:, :, :6], atol=EXACT)


def test_a_state_with_room_for_blocks_that_are_not_there_is_as_good():
    """After padding there is more room than finished blocks: what stands in it is no mixture."""
    technique = LinformerCausal(block=6, rank=2)
    weights, (query, key, value) = trained(technique), rows()
    expected = reference(technique, weights, query, key, value).float()
    for empty in (1, 6, 20):
        shapes = [torch.cat([random(2, tensor.shape[1], empty, WIDTH, seed=9) * 100, tensor], 2) for tensor in (query, key, value)]
        live = (torch.arange(empty + TEXT) >= empty).expand(2, -1)
        whole = Call(*shapes, WIDTH**-0.5, live, True, None, shapes[0].transpose(1, 2).flatten(2), None, None, True)
        assert torch.allclose(technique.mix(weights, whole)[:, :, empty:], expected, atol=EXACT)
        state, made = State(technique.cache_slots(config("llama"))), []
        for at in range(empty + TEXT):
            part = whole.part(at, at + 1)
            state.update(part.key, part.value)
            made.append(technique.mix(weights, Call(**{**vars(part), "state": state, "pending": 0})))
        assert torch.allclose(torch.cat(made, 2)[:, :, empty:], expected, atol=EXACT)


@pytest.mark.parametrize(("block", "rank"), [(6, 2), (7, 3)])
def test_what_begins_are_means_that_count_as_often_as_they_have_tokens(block, rank):
    for share, units, names in (("none", GROUPS, 3), ("headwise", 1, 3), ("key-value", 1, 2)):
        technique = LinformerCausal(block=block, rank=rank, share=share)
        first, again = technique.initial_values(config("llama"), 0), technique.initial_values(config("llama"), 3)
        assert {name: tuple(value.shape) for name, value in first.items()} == technique.parameters(config("llama"))
        assert len(first) == names
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert first["key_map"].shape == (units, rank, block)
        assert torch.allclose(first["key_map"].sum(-1), torch.ones(units, rank))
        assert torch.equal((first["key_map"] > 0).sum(1), torch.ones(units, block).long())
        assert torch.allclose(first["weight"], torch.full((HEADS,), math.log(block / rank)))


# What is remembered


def test_the_state_grows_with_finished_blocks():
    technique = LinformerCausal(block=6, rank=2)
    seen = []
    mixed(technique, trained(technique), *rows(), [1] * TEXT, change=lambda state: seen.append({name: tensor.shape for name, tensor in state.tensors.items()}))
    assert [shapes["mixed_key"] for shapes in seen] == [(2, GROUPS, count // 6 * 2, WIDTH) for count in range(1, TEXT + 1)]
    assert [shapes["mixed_value"] for shapes in seen] == [shapes["mixed_key"] for shapes in seen]
    assert {shapes["past_key"] for shapes in seen} == {(2, GROUPS, 5, WIDTH)}


@pytest.mark.parametrize("where", [{}, {"layers": "0"}])  # all layers, or one beside softmax
def test_the_cache_has_the_size_that_was_planned(where, tmp_path):
    _, model = pair("llama", ("linformer-causal", {"block": 6, "rank": 2, **where}))
    config = open_checkpoint(save(model, tmp_path)).config
    for count in (1, 5, 6, 7, 12, 59, 60):
        for sizes in ([count], [1] * count):
            assert cache_bytes(in_pieces(model, tokens(1, count), sizes)[1]) == kv_bytes(config, 4, count)
    assert state_bytes(config, 4, 60) - state_bytes(config, 4) == 10 * (state_bytes(config, 4, 6) - state_bytes(config, 4, 5))
    assert 0 <= 60 * growth_bytes(config, 4) - (state_bytes(config, 4, 60) - state_bytes(config, 4)) < 60  # a token's share is rounded up


def test_reports_say_so(tmp_path):
    _, model = pair("llama", ("linformer-causal", {"block": 8, "rank": 2, "layers": "0"}))
    folder = save(model, tmp_path)
    characters(folder)
    config, subject = open_checkpoint(folder).config, open_model(str(folder)).subject
    assert subject.growth_bytes == growth_bytes(config, 4) == 2 * config.kv_heads * 2 * config.head_dim * 4 // 8
    assert subject.kv_bytes == subject.growth_bytes + 2 * config.kv_heads * config.head_dim * 4
    assert [tables.cache_bytes(subject, context) for context in (8, 16, 64)] == [kv_bytes(config, 4, context) for context in (8, 16, 64)]
    seen = inspect(open_checkpoint(folder))
    assert seen.kv_bytes == {context: kv_bytes(config, 4, context) for context in seen.kv_bytes}
    assert all(size == tables.cache_bytes(subject, context) for context, size in seen.kv_bytes.items())


def test_a_state_that_grows_otherwise_than_planned_is_a_fault(tmp_path, monkeypatch):
    """Verification reads on to where a block is finished."""
    source = save(tiny("llama"), tmp_path / "source")
    characters(source)
    text = tmp_path / "text.txt"
    text.write_text("Where we go, nobody knows; there and back again, many times. " * 3)
    how = {"text": text, "tokens": 96, "context": 48}
    step = LinformerCausal(block=32, rank=4)
    side = convert(str(source), (step,), RunOptions(output=tmp_path / "out", **how)).report.after
    config = open_checkpoint(tmp_path / "out").config
    assert (side.kv_bytes, side.state_bytes) == (growth_bytes(config, 4), state_bytes(config, 4))
    monkeypatch.setattr(LinformerCausal, "cache_bytes", Mixing.cache_bytes)
    with pytest.raises(ModelError, match=r"its mixers hold \d+ bytes after 48 tokens, and the plan said \d+: a fault of effconvert"):
        convert(str(source), (step,), RunOptions(output=tmp_path / "other", **how))


@pytest.fixture(scope="module")
def llama():
    return pair("llama", SMALL)[1]


def test_rows_are_chosen_repeated_and_reordered_and_the_rest_goes_on(llama):
    ids, rest = tokens(3, 15), tokens(3, 8, seed=1)
    whole = run(llama, torch.cat([ids, rest], 1))[:, 15:]
    for name, argument, picked in (
        ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("reorder_cache", torch.tensor([1, 1, 0]), [1, 1, 0]),
    ):
        _, cache = in_pieces(llama, ids, (9, 6))
        kept = copy.deepcopy(cache)
        getattr(cache, name)(argument)
        assert far(in_pieces(llama, rest[picked], (2, 1, 1, 4), cache=cache)[0], whole[picked]) <= SAME, name
        assert far(in_pieces(llama, rest, (8,), cache=kept)[0], whole) <= SAME


def test_a_cache_that_was_reset_begins_anew(llama):
    _, cache = in_pieces(llama, tokens(), (10, 10))
    cache.reset()
    assert far(in_pieces(llama, tokens(), (10, 10), cache=cache)[0], run(llama, tokens())) <= SAME
    assert cache_bytes(cache) == cache_bytes(in_pieces(llama, tokens(), (20,))[1])


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 7}], ids=str)
def test_written_text_is_that_without_a_cache(llama, how):
    cached = llama.generate(tokens(), **GREEDY, **how)
    assert torch.equal(cached, llama.generate(tokens(), **GREEDY, **{**how, "prefill_chunk_size": None}, use_cache=False))
    assert torch.equal(cached, llama.generate(tokens(), **GREEDY, **how, **with_cache(llama, cache_for(llama.config))))


def test_written_text_of_a_padded_batch_is_that_of_each_row(llama):
    texts = [tokens(1, length, seed=length) for length in (20, 13, 3)]
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for index, row in enumerate(texts):
        ids[index, 20 - row.shape[1] :], mask[index, 20 - row.shape[1] :] = row[0], 1
    together = llama.generate(ids, attention_mask=mask, **GREEDY)[:, 20:]
    assert torch.equal(together, torch.cat([llama.generate(row, **GREEDY)[:, row.shape[1] :] for row in texts]))


@pytest.mark.slow
def test_compiled_decoding_is_one_graph_across_blocks(llama):
    ids = tokens()
    _, cache = in_pieces(llama, ids[:, :9], (9,))
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
    try:
        made, _ = in_pieces(compiled, ids[:, 9:14], [1] * 5, cache=cache)
    finally:
        torch._dynamo.reset()
    assert far(made, run(llama, ids)[:, 9:14]) <= SAME


# Refusals, and where it goes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block": 6, "rank": 7}, "--rank 7 is more than the 6 tokens of a block; give at most 6, which is exact"),
        ({"rank": 65}, "--rank 65 is more than the 64 tokens"),
        ({"rank": 0}, "--rank is 0"),
        ({"block": 6, "rank": 2, "sinks": 7}, "--sinks 7 are more than the 6 tokens of a block"),
        ({"block": 1, "rank": 1}, "--block is 1"),
        ({"block": 0, "rank": 1}, "--block is 0"),
        ({"block": 6}, "--rank is needed"),
    ],
)
def test_options_that_cannot_be(options, said, llama, tmp_path):
    with pytest.raises(OptionError, match=said):
        LinformerCausal(**options)
    file = save(llama, tmp_path) / "config.json"
    written = json.loads(file.read_text())
    written["effconvert"]["replaced"][0]["options"] = options
    file.write_text(json.dumps(written))
    with pytest.raises(ModelError, match=said):
        open_checked(tmp_path)


def test_encoders_are_refused_with_what_fits_them():
    with pytest.raises(ModelError, match=r"^bert is an encoder, and linformer-causal keeps what was before .* linformer and nystrom are for them"):
        LinformerCausal(rank=4).check(config("bert"))


def test_layers_with_a_window_are_left_alone():
    alternating = config("gemma2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    assert LinformerCausal(rank=4).chosen(alternating) == {1, 3}
    with pytest.raises(OptionError, match="no layer is left to change"):
        LinformerCausal(rank=4).check(config("mistral", sliding_window=8))
    assert LinformerCausal(rank=4).chosen(config("mistral", sliding_window=None)) == set(range(4))


def test_rotated_keys_are_remarked_on_where_they_are_mixed():
    assert "after RoPE" in LinformerCausal(rank=4).notes(config("llama"))
    assert LinformerCausal(block=4, rank=4).notes(config("llama")) == ""
    assert LinformerCausal(rank=4).notes(config("gpt2")) == ""
