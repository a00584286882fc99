"""What mixers remember between calls: one cache with softmax layers beside theirs, and all that `generate` does to it."""

import copy
import sys

import pytest
import torch
import transformers
from transformers import DynamicCache

from effconvert.modeling import cache_for
from effconvert.modeling.state import State
from tests.mixers.mixing import ROWS, SAME, cache_of, converted, far, in_pieces, keep_no_activations, pair, positions, run, small, tokens, with_cache
from tests.models import tiny

LAYERS = 6
STEPS = (  # layers 0 and 4 stay softmax
    ("streaming", {"window": 6, "sinks": 2, "layers": "1-3/2"}),
    ("linear", {"window": 5, "layers": "2"}),
    ("linear", {"feature": "elu", "layers": "-1"}),
)
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt_neox"])  # the second has windows of its own; the third calls its cache layer_past
def mixed(request):
    """A model with softmax, streaming and linear layers."""
    own = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8} if request.param == "gemma3_text" else {}
    return pair(request.param, *STEPS, num_hidden_layers=LAYERS, **own)[1]


@pytest.fixture(scope="module")
def llama():
    return pair("llama", *STEPS, num_hidden_layers=LAYERS)[1]


def test_each_layer_has_what_it_was_given(mixed):
    placed = [getattr(layer.get_submodule(at), "effconvert", None) for layer, at in attentions(mixed)]
    assert [mixer and mixer.technique.name for mixer in placed] == [None, "streaming", "linear", "streaming", None, "linear"]
    assert [mixer.technique.window for mixer in placed if mixer] == [6, 5, 6, 0]
    cache = cache_for(mixed.config)
    assert [isinstance(layer, State) for layer in cache.layers] == [bool(mixer) for mixer in placed]


def attentions(model):
    neox = model.config.model_type.endswith("neox")
    return [(layer, "attention" if neox else "self_attn") for layer in model.base_model.layers]


def test_layers_side_by_side_decode_as_in_one_pass(mixed):
    ids = tokens(2, 40)
    expected = run(mixed, ids)
    for sizes in ((7, 1, 5, *[1] * 27), (40,), (1, 39), (39, 1), (20, 20)):
        made, cache = in_pieces(mixed, ids, sizes)
        assert far(made, expected) <= SAME
        assert cache.get_seq_length() == 40
        assert [layer.get_seq_length() for layer in cache.layers] == [40] * LAYERS


def test_a_cache_that_was_reset_begins_anew(llama):
    own = DynamicCache()
    own.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    own.reset()
    if own.get_seq_length():
        pytest.skip("before 5.18 transformers' own layers of a cache keep their length when they are reset")
    ids = tokens()
    _, cache = in_pieces(llama, ids, (10, 10))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert far(in_pieces(llama, ids, (10, 10), cache=cache)[0], run(llama, ids)) <= SAME


def test_rows_are_chosen_repeated_and_reordered(llama):
    ids, rest = tokens(3, 15), tokens(3, 5, seed=1)
    whole = run(llama, torch.cat([ids, rest], 1))[:, 15:]
    changes = {
        "chosen": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    }
    for name, (change, rows) in changes.items():
        _, cache = in_pieces(llama, ids, (9, 6))
        change(cache)
        expected = run(llama, torch.cat([ids[rows], rest[rows]], 1))[:, 15:]
        assert far(expected, whole[rows]) <= SAME
        assert far(in_pieces(llama, rest[rows], (2, 1, 1, 1), cache=cache)[0], expected) <= SAME, name


def test_what_one_batch_left_does_not_reach_the_next(llama):
    """A state must not be a view of what came in, nor be written to in place."""
    ids = tokens()
    _, cache = in_pieces(llama, ids, (10,))
    kept = copy.deepcopy(cache)
    in_pieces(llama, ids[:, 10:], (10,), cache=cache)
    assert far(in_pieces(llama, ids[:, 10:], (1,) * 10, cache=kept)[0], run(llama, ids)[:, 10:]) <= SAME


# generate


def greedy(model, ids, length=12, **more):
    return model.generate(ids, max_new_tokens=length, **{**GREEDY, **more})[:, ids.shape[1] :]


def slow(model, ids, length):
    """Greedy decoding that runs the whole text anew for each token."""
    for _ in range(length):
        ids = torch.cat([ids, run(model, ids)[:, -1:].argmax(-1)], 1)
    return ids[:, -length:]


def test_greedy_text_is_that_of_the_whole_pass(mixed):
    ids = tokens()
    expected = slow(mixed, ids, 12)
    assert len(expected.unique()) > 2
    assert torch.equal(greedy(mixed, ids), expected)
    assert torch.equal(greedy(mixed, ids, use_cache=False), expected)
    assert torch.equal(greedy(mixed, ids, prefill_chunk_size=7), expected)
    assert torch.equal(greedy(mixed, ids, **with_cache(mixed, cache_for(mixed.config))), expected)


def test_greedy_text_of_a_padded_batch_is_that_of_each_row(mixed):
    rows = [tokens(1, length, seed=length) for length in (20, 13, 3)]
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, 20 - row.shape[1] :], mask[index, 20 - row.shape[1] :] = row[0], 1
    together = greedy(mixed, ids, attention_mask=mask)
    assert torch.equal(together, torch.cat([greedy(mixed, row) for row in rows]))
    assert torch.equal(together, torch.cat([slow(mixed, row, 12) for row in rows]))


def test_beams_are_those_without_a_cache(mixed):
    how = {"num_beams": 3, "num_return_sequences": 2}
    cached = greedy(mixed, tokens(), 8, **how)
    assert cached.shape == (4, 8)
    assert torch.equal(cached, greedy(mixed, tokens(), 8, use_cache=False, **how))
    assert not torch.equal(cached[::2], greedy(mixed, tokens(), 8))  # else the beams were never reordered


def test_samples_are_those_without_a_cache(mixed):
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        found.append(greedy(mixed, tokens(), 8, do_sample=True, num_return_sequences=3, use_cache=cached))
    assert found[0].shape == (6, 8)
    assert torch.equal(*found)
    assert len(found[0].unique(dim=0)) > 2


def test_a_text_many_windows_long_takes_no_more_memory(llama):
    ids, sizes = tokens(1, 24), set()
    cache, made = cache_for(llama.config), []
    with torch.no_grad():
        for token in [*ids[0, :4].tolist(), *ids[0].tolist()]:  # 28 tokens, more than 4 windows
            out = llama(torch.tensor([[token]]), use_cache=True, **with_cache(llama, cache))
            made.append(out.logits)
            sizes.add(tuple(layer.nbytes for layer in cache.layers if isinstance(layer, State)))
    assert torch.cat(made).isfinite().all()
    assert len(sizes) == 1
    assert [layer.keys.shape[-2] for layer in cache.layers if not isinstance(layer, State)] == [28, 28]
    text = greedy(llama, ids, 30, **with_cache(llama, cache_for(llama.config)))
    assert text.shape == (1, 30)


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized", "sliding_window"])
def test_caches_without_room_for_a_state_are_refused_by_name(llama, kind):
    with pytest.raises(ValueError, match=kind) as refusal:
        greedy(llama, tokens(), 4, cache_implementation=kind)
    assert "\n" not in str(refusal.value)


def test_the_dynamic_cache_may_be_named(llama):
    assert torch.equal(greedy(llama, tokens(), 4, cache_implementation="dynamic"), greedy(llama, tokens(), 4))
    llama.generation_config.cache_implementation = "dynamic"
    try:
        assert torch.equal(greedy(llama, tokens(), 4), greedy(llama, tokens(), 4, cache_implementation="dynamic"))
    finally:
        llama.generation_config.cache_implementation = None


def test_a_cache_of_the_callers_own_without_room_for_a_state_is_refused(mixed):
    for cache in (DynamicCache(config=mixed.config), DynamicCache()):
        given = with_cache(mixed, cache)
        for call in (lambda given=given: mixed(tokens(), **given), lambda given=given: greedy(mixed, tokens(), 4, **given)):
            with pytest.raises(ValueError, match="cache_for"):
                call()


def test_what_would_have_to_forget_is_refused(llama):
    _, cache = in_pieces(llama, tokens(), (20,))
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-5)
    for how in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": llama}):
        with pytest.raises(
            (NotImplementedError, ValueError), match=r"cannot be cropped to earlier tokens|a cache that can be cropped"
        ):  # ours, or since 5.24 theirs
            greedy(llama, tokens(1), 8, **how)


def test_masks_that_say_more_than_padding_are_refused(mixed):
    square = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="padding only"):
        mixed(tokens(), attention_mask=square)


@pytest.mark.parametrize("what", ["positional_mask", "positional_positions"])
def test_they_are_refused_however_they_are_given(llama, what):
    square = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    packed = torch.cat([torch.arange(12), torch.arange(8)])[None].expand(2, -1)
    with pytest.raises(ValueError, match=r"padding only|several texts"):
        llama(tokens(), square) if what == "positional_mask" else llama(tokens(), None, packed, cache_for(llama.config))


@pytest.mark.parametrize("kind", ["opt", "llama", "bert"])
def test_whoever_calls_forward_itself_passes_nothing_by(kind):
    """As PEFT does."""
    _, model = pair(kind, ("performer", {"features": 32}))
    with torch.no_grad():
        assert torch.equal(model.forward(tokens()).logits, model(tokens()).logits)
    model.train().forward(tokens(), labels=tokens()).loss.backward()
    with pytest.raises(ValueError, match="padding only"):
        model.forward(tokens(), attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))


@torch.no_grad()
def test_the_model_inside_needs_no_cache_of_the_caller(mixed):
    expected = mixed.base_model(tokens(), use_cache=False).last_hidden_state
    made = mixed.base_model(tokens())
    assert far(made.last_hidden_state, expected) <= SAME
    assert isinstance(cache_of(made).layers[1], State)


def test_without_a_cache_none_is_made(mixed):
    assert cache_of(mixed(tokens(), use_cache=False)) is None
    config = copy.deepcopy(mixed.config)
    config.use_cache = False
    assert cache_of(type(mixed)(config)(tokens())) is None


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"use_cache": True}], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_step_needs_no_cache_of_the_caller(mixed, how, checkpointed):
    training = copy.deepcopy(mixed).train()
    for module in training.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointed:
        keep_no_activations(training)
    loss = training(tokens(), labels=tokens(), **how).loss
    assert far(loss.detach(), mixed(tokens(), labels=tokens(), use_cache=False).loss.detach()) <= SAME
    loss.backward()


# What the layers run that stay softmax


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "gpt2", "bert", "modernbert"])
def test_layers_without_a_mixer_run_what_was_asked_for(kind, monkeypatch):
    step = ("streaming", {"window": 64, "layers": "-1"}) if kind == "gemma2" else ("linear", {"feature": "elu", "layers": "-1"})
    model = tiny(kind, num_hidden_layers=2, **({"layer_types": ["full_attention"] * 2} if kind == "gemma2" else {}))
    other = converted(model, step)
    module = sys.modules[type(model).__module__]
    calls, real = [], module.eager_attention_forward

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", counted)
    ids, mask = tokens(), torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    found = {}
    for chosen in ("sdpa", "eager"):
        other.set_attn_implementation(chosen)
        calls.clear()
        found[chosen] = torch.cat([run(other, ids), run(other, ids, attention_mask=mask)[:, :15]], 1)
        expected = 2 if chosen == "eager" or kind == "gemma2" else 0  # capped scores are only computed there
        assert len(calls) == expected, chosen
    assert far(found["eager"], found["sdpa"]) <= SAME
    for refused in ("flash_attention_2", "flex_attention", "nonsense"):
        with pytest.raises(ValueError, match=f"sdpa or eager.*{refused}"):
            other.set_attn_implementation(refused)
    for chosen, expected in (({"": "eager"}, 1), ({"text_config": "sdpa"}, 1), ({}, 1), ({"": "sdpa", "text_config": "eager"}, 1 if kind == "gemma2" else 0)):
        other.set_attn_implementation(chosen)  # as transformers takes it: parts of a model by name, this one by none
        calls.clear()
        run(other, ids)
        assert len(calls) == expected, chosen


def test_soft_capped_layers_without_a_mixer_are_those_of_the_original():
    changes = {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2, "attn_logit_softcapping": 0.5}  # which caps much
    model = tiny("gemma2", **changes)
    model.set_attn_implementation("eager")
    expected = run(model, tokens())
    uncapped = tiny("gemma2", **{**changes, "attn_logit_softcapping": None})
    assert far(run(uncapped, tokens()), expected) > 1e-3
    for layers in ("0", "2", "0,2"):
        other = converted(model, ("streaming", {"window": 64, "layers": layers}))
        for chosen in ("sdpa", "eager"):
            other.set_attn_implementation(chosen)
            assert far(run(other, tokens()), expected) <= SAME
            mask = torch.ones(2, 20, dtype=torch.long)
            assert far(run(other, tokens(), attention_mask=mask), expected) <= SAME
            assert far(in_pieces(other, tokens(), (7, 1, 12))[0], expected) <= SAME


def test_left_padding_reaches_softmax_and_mixers_alike(mixed):
    ids, mask = torch.cat([tokens(length=5, seed=1), tokens()], 1), torch.ones(2, 25, dtype=torch.long)
    mask[:, :5] = 0
    where = positions(mixed, mask)
    expected = run(mixed, tokens())
    assert far(run(mixed, ids, attention_mask=mask, **where)[:, 5:], expected) <= SAME
    assert far(in_pieces(mixed, ids, (4, 12, *[1] * 9), mask, **where)[0][:, 5:], expected) <= SAME


# torch.compile


def test_a_compiled_step_of_decoding_is_one_graph_and_equals_the_eager_one():
    """With transformers' own model it is one graph, too."""
    _, model = pair("llama", ("streaming", {"window": 6, "sinks": 2, "layers": "0"}), ("linear", {"window": 5, "layers": "1"}))
    ids = tokens()
    _, cache = in_pieces(model, ids[:, :19], (19,))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    try:
        made, _ = in_pieces(compiled, ids[:, 19:], (1,), cache=cache)
    finally:
        torch._dynamo.reset()
    assert far(made, run(model, ids)[:, 19:]) <= SAME


def test_the_softmax_by_which_a_model_is_loaded_is_kept(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    for chosen in ("eager", "sdpa"):
        model = type(llama).from_pretrained(tmp_path, attn_implementation=chosen)
        assert {module.softmax for module in model.modules() if hasattr(module, "softmax")} == {chosen}
        assert far(run(model.eval(), tokens()), run(llama, tokens())) <= SAME
    with pytest.raises(ValueError, match="can run sdpa or eager beside those with one, not 'flex_attention'"):  # which transformers itself would take
        type(llama).from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert transformers.AutoConfig.from_pretrained(tmp_path).to_dict().get("_attn_implementation") is None


@pytest.mark.parametrize("name", [name for name in ROWS if "llama" in ROWS[name].kinds])
@pytest.mark.parametrize("cached", [False, True])
def test_a_prompt_in_slices_is_the_prompt_at_once(name, cached, monkeypatch):
    _, model = pair("llama", (name, small(name, "llama")))
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        whole = [model(ids, use_cache=cached).logits, model(ids, attention_mask=mask, use_cache=cached).logits[:, 5:]]
        monkeypatch.setattr("effconvert.modeling.attention.SLICE", 6)
        sliced = [model(ids, use_cache=cached).logits, model(ids, attention_mask=mask, use_cache=cached).logits[:, 5:]]
    for one, other in zip(whole, sliced, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
