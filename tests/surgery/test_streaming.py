"""Attention to the last tokens and the first few is one softmax over both, in whatever parts it is computed, at positions inside the cache."""

import json

import pytest
import torch
from safetensors.torch import load_file

from effconvert.errors import ModelError, OptionError
from effconvert.modeling.state import State
from effconvert.surgery.mixing._call import Call, Rotation
from effconvert.surgery.mixing.streaming import Streaming
from tests.mixers.mixing import far, pair, run, tokens
from tests.surgery.rows import GROUPS, HEADS, WIDTH, config, random, rows

TOKENS = 150  # more than two chunks of the window's kernel
SPLITS = [[TOKENS], [64, 86], [7, 1, 100, 42], [1] * TOKENS]
SHAPES = [(6, 2), (6, 0), (1, 0), (1, 1), (4, 4), (70, 3), (TOKENS, 4), (1000, 4)]  # window and sinks: shorter and longer than a chunk, and than all tokens
LLAMA = config("llama", num_key_value_heads=GROUPS, max_position_embeddings=64)
EXACT = 1e-5  # of float32 values of about 1


def mixed(technique, query, key, value, live=None, split=None, angles=None, **given):
    """What a mixer gives of all tokens, called once, or in parts with a state; `angles` are cos and sin of each token, [T, D]."""
    live = torch.ones(len(key), key.shape[2], dtype=torch.bool) if live is None else live
    slots = {name: slot for name, slot in technique.cache_slots(LLAMA).items() if name != "furthest" or angles is not None}
    state = State(slots) if split else None
    made, at = [], 0
    for size in split or [key.shape[2]]:
        part = slice(at, at + size)
        at += size
        q, k, v = (tensor[:, :, part] for tensor in (query, key, value))
        if state:
            state.update(k, v)
        rotation = None if angles is None else Rotation(turn, tuple(each[None, part] for each in angles))
        call = Call(q, k, v, WIDTH**-0.5, live[:, part], True, state, q, rotation, padded=given.get("padded", False), softcap=given.get("softcap"))
        made.append(technique.mix({}, call))
    return torch.cat(made, 2)


def turn(query, key, cos, sin):
    """RoPE of halves, as a llama's."""

    def turned(rows):
        one, other = rows.chunk(2, -1)
        return rows * cos[:, None] + torch.cat([-other, one], -1) * sin[:, None]

    return turned(query), turned(key)


def angles(count, size=1.0):
    """Cos and sin of some positions, [T, D]: as YaRN has them where `size` is not 1."""
    steps = torch.arange(count)[:, None] * 0.3 ** torch.arange(WIDTH // 2)
    return tuple(size * part.repeat(1, 2) for part in (steps.cos(), steps.sin()))


def seen(count, window, sinks):
    """Which tokens a token sees, [T, T]."""
    age = torch.arange(count)[:, None] - torch.arange(count)
    return (age >= 0) & ((age < window) | (torch.arange(count) < sinks))


def reference(query, key, value, window, sinks, softcap=None):
    """Attention in float64 by its explicit matrix."""
    query, key, value = (tensor.double().repeat_interleave(HEADS // tensor.shape[1], 1) for tensor in (query, key, value))
    scores = query @ key.mT * WIDTH**-0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    return scores.masked_fill(~seen(query.shape[2], window, sinks), -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize(("window", "sinks"), SHAPES)
def test_mixing_is_one_softmax_over_the_window_and_the_first_tokens(window, sinks):
    made = mixed(Streaming(window=window, sinks=sinks), *rows(TOKENS))
    assert torch.allclose(made, reference(*rows(TOKENS), window, sinks).float(), atol=EXACT)


@pytest.mark.few(4)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("window", "sinks"), SHAPES)
def test_any_number_of_calls_gives_the_same(window, sinks, split):
    technique = Streaming(window=window, sinks=sinks)
    assert torch.allclose(mixed(technique, *rows(TOKENS), split=split), reference(*rows(TOKENS), window, sinks).float(), atol=EXACT)


@pytest.mark.parametrize("size", [1.0, 1.2])
@pytest.mark.parametrize("split", [None, *SPLITS])
@pytest.mark.parametrize(("window", "sinks"), [(6, 2), (4, 4), (70, 3)])
def test_a_query_is_no_further_from_a_sink_than_the_cache_is_long(window, sinks, split, size):
    """Beyond it the query stands at position W + S - 1 for the sinks, and where it is for the window."""
    query, key, value = rows(TOKENS)
    cos, sin = angles(TOKENS, size)
    far_cos, far_sin = (part[torch.arange(TOKENS).clamp_max(window + sinks - 1)] for part in (cos, sin))
    near, turned = turn(query, key, cos[None], sin[None])
    moved, _ = turn(query, key, far_cos[None], far_sin[None])
    shared = HEADS // GROUPS
    keys, values = (tensor.repeat_interleave(shared, 1).double() for tensor in (turned, value))
    age = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    scores = torch.where(age < window, near.double() @ keys.mT, moved.double() @ keys.mT) * WIDTH**-0.5
    expected = scores.masked_fill(~seen(TOKENS, window, sinks), -torch.inf).softmax(-1) @ values
    made = mixed(Streaming(window=window, sinks=sinks), near, turned, value, split=split, angles=(cos, sin))
    assert torch.allclose(made, expected.float(), atol=EXACT)


@pytest.mark.parametrize("split", [None, [5, 60, 85], [1] * TOKENS])
def test_padding_changes_nothing_and_takes_no_place_in_the_window(split):
    """Where a call puts its live tokens last, as it does wherever there is padding; and one text is nothing else."""
    technique, left = Streaming(window=6, sinks=2), 40
    live = torch.ones(2, TOKENS, dtype=torch.bool)
    live[0, :left] = live[1] = False
    wild = [torch.where(live[:, None, :, None], tensor, 1e4) for tensor in rows(TOKENS)]
    made = mixed(technique, *wild, live, split, padded=True)
    kept = [tensor[:1, :, left:] for tensor in rows(TOKENS)]
    assert torch.allclose(made[:1, :, left:], mixed(technique, *kept), atol=EXACT)
    assert made.isfinite().all()


@pytest.mark.parametrize("split", [None, [7, 1, 100, 42]])
def test_capped_scores_are_capped_before_their_softmax(split):
    query, key, value = rows(TOKENS)
    made = mixed(Streaming(window=6, sinks=2), 3 * query, key, value, split=split, softcap=2.0)
    assert torch.allclose(made, reference(3 * query, key, value, 6, 2, softcap=2.0).float(), atol=EXACT)
    assert (made - reference(3 * query, key, value, 6, 2)).abs().max() > 0.1


def test_gradients_are_those_of_the_explicit_matrix():
    found = []
    for form in (lambda *given: mixed(Streaming(window=6, sinks=2), *given), lambda *given: reference(*given, 6, 2)):
        given = [tensor.clone().requires_grad_() for tensor in rows(90)]
        (form(*given) * random(2, HEADS, 90, WIDTH, seed=7)).sum().backward()
        found.append([tensor.grad for tensor in given])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_what_is_remembered_is_the_window_before_a_token_and_the_sinks():
    """Whatever the length: W - 1 tokens, S of them first, how many there were, and with RoPE the angles of the furthest place."""
    technique = Streaming(window=6, sinks=2)
    heads = 2 * GROUPS * WIDTH
    assert technique.cache_bytes(LLAMA, 2) == 5 * heads * 2 + 5 + 2 * heads * 2 + 8 + 2 * WIDTH * 4
    query, key, value = rows(TOKENS)
    state = State(technique.cache_slots(LLAMA))
    state.update(key, value)
    live = torch.ones(2, TOKENS, dtype=torch.bool)
    technique.mix({}, Call(query, key, value, 1.0, live, True, state, query, Rotation(turn, tuple(part[None] for part in angles(TOKENS)))))
    assert torch.equal(state.tensors["past_key"], key[:, :, -5:])
    assert torch.equal(state.tensors["past_value"], value[:, :, -5:])
    assert torch.equal(state.tensors["sink_key"], key[:, :, :2])
    assert torch.equal(state.tensors["sink_value"], value[:, :, :2])
    assert state.tensors["count"].tolist() == [TOKENS, TOKENS]
    assert torch.equal(state.tensors["furthest"], torch.stack([part[7] for part in angles(TOKENS)]).expand(2, -1, -1))
    assert state.nbytes == 2 * technique.cache_bytes(LLAMA, 4)


def test_a_float16_model_is_finite_where_its_original_is():
    """With key biases as large as some models have: products of queries and keys beyond 65504, which their scaling brings back."""
    model, other = pair("llama", ("streaming", {"window": 6, "sinks": 2}))
    with torch.no_grad():
        for each in (model, other):
            for layer in each.model.layers:
                layer.self_attn.q_proj.bias.fill_(100.0)
                layer.self_attn.k_proj.bias.fill_(100.0)
    model, other = model.half(), other.half()
    assert run(model, tokens()).isfinite().all()
    assert run(other, tokens()).isfinite().all()
    assert far(run(other, tokens())[:, :5].float(), run(model, tokens())[:, :5].float()) < 0.05  # nothing has left the window; scores round to 32


def test_it_is_exact_where_no_text_is_longer_than_the_window():
    assert Streaming(window=64).is_exact(LLAMA)
    assert not Streaming(window=63).is_exact(LLAMA)
    assert not Streaming(window=1000).is_exact(config("llama"))  # of a model that says no longest text


def test_a_window_shorter_than_the_sinks_is_refused():
    with pytest.raises(OptionError, match="--window 3 is smaller than --sinks 4"):
        Streaming(window=3)
    assert Streaming(window=4).sinks == 4


def test_encoders_are_refused():
    with pytest.raises(ModelError, match="bert is an encoder, and streaming keeps the first and the last tokens"):
        Streaming(window=6).check(config("bert"))


def test_learnt_positions_end_all_the_same_and_it_is_said():
    assert "texts still cannot be longer than 32 tokens" in Streaming(window=6).notes(config("gpt2", n_positions=32))
    assert Streaming(window=6).notes(LLAMA) == ""


def test_without_sinks_a_family_with_windows_of_its_own_is_written_as_that():
    assert Streaming(window=6, sinks=0).config(config("llama", architectures=["LlamaForCausalLM"])).kind == "mistral"
    assert Streaming(window=6, sinks=0, layers="0").config(config("llama", architectures=["LlamaForCausalLM"])).replaced  # in mistral all layers have it
    assert Streaming(window=6, sinks=2).config(config("llama", architectures=["LlamaForCausalLM"])).replaced


def test_what_a_config_leaves_out_is_the_default_of_its_own_family():
    left_out = config("llama", architectures=["LlamaForCausalLM"]).without("num_key_value_heads", "max_position_embeddings")
    written = Streaming(window=6, sinks=0).config(left_out).raw
    assert (written["num_key_value_heads"], written["max_position_embeddings"]) == (HEADS, 2048)


def test_a_conversion_adds_no_tensor_and_says_what_mixes(model, command):
    done = command("streaming", "--window", 8, "--sinks", 2, "--keep-softmax", "0", model, "-o", "out", "--no-verify")
    assert done.exit_code == 0, done.output
    before, after = (
        {name: tensor for file in folder for name, tensor in load_file(file).items()}
        for folder in (sorted(model.glob("*.safetensors")), sorted(model.parent.glob("out/*.safetensors")))
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = json.loads((model.parent / "out/config.json").read_text())
    options = {"window": 8, "sinks": 2}
    assert said["effconvert"]["replaced"] == [{"technique": "streaming", "options": options, "place": "scores", "layers": [1, 2], "drops": []}]
    assert said["layer_types"] == ["full_attention", "effconvert_streaming", "effconvert_streaming"]
