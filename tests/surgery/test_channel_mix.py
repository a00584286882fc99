"""RWKV's channel mixing in place of the FFN: its formula, how near it begins to the FFN, and the token before across calls, padding and packed texts."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from effconvert.errors import ModelError
from effconvert.families import FAMILIES
from effconvert.surgery.mixing import _channel_mix
from effconvert.surgery.mixing._call import Call
from effconvert.surgery.mixing.rwkv import Rwkv
from tests.heal.healing import apart, opened, prose, put, run
from tests.mixers.mixing import AS_OTHERS, CAPPED, DECODERS, SAME, far, in_pieces, keep_no_activations, positions, tokens, with_cache
from tests.mixers.mixing import run as logits_of

FITTING = [kind for kind in DECODERS if FAMILIES[kind].ffn and "ffn" not in FAMILIES[kind].adds_inside and not FAMILIES[kind].experts_key]
FITTING = [(f"{version}", kind) for kind in FITTING if kind not in (*CAPPED, *AS_OTHERS) for version in (4, 7)]


@pytest.fixture(autouse=True)
def _text():
    Path("text.txt").write_text(prose())


def shaken(folder="out"):
    """A converted model whose shares of the token before, and receptances, are as training may leave them."""
    model, draw = opened(folder, dtype=torch.float32), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_shift", ".shift")):
                parameter += torch.rand(parameter.shape, generator=draw)
            if name.endswith("effconvert.receptance") and parameter.ndim == 2:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("receptance", [True, False])
def test_it_is_the_formula_of_the_paper(receptance):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 6, generator=draw)
    shapes = {"key": (10, 6), "key_bias": (10,), "value": (6, 10), "value_bias": (6,), "key_shift": (6,), "receptance": (6, 6), "receptance_shift": (6,)}
    weights = {name: torch.rand(shape, generator=draw) - 0.3 for name, shape in shapes.items() if receptance or "receptance" not in name}
    x, w = hidden.double(), {name: weight.double() for name, weight in weights.items()}
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    inner = ((before * w["key_shift"] + x * (1 - w["key_shift"])) @ w["key"].T + w["key_bias"]).clamp(min=0) ** 2
    expected = inner @ w["value"].T + w["value_bias"]
    if receptance:
        expected = expected * ((before * w["receptance_shift"] + x * (1 - w["receptance_shift"])) @ w["receptance"].T).sigmoid()
    live = torch.ones(2, 9, dtype=torch.bool)
    found = _channel_mix.mix(weights, Call(hidden, hidden, hidden, 1.0, live, True, None, hidden, None))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.few(4)
@pytest.mark.parametrize(("version", "kind"), FITTING)
def test_the_token_before_counts_however_a_text_is_split_and_padded(version, kind):
    put(Path("model"), kind, noise=1.0)
    outcome = run("model", Rwkv(version=version, channel_mix=True))
    model, ids = shaken(), tokens()
    assert model.num_parameters() == outcome.plan.after.parameters
    whole, other = logits_of(model, ids), ids.clone()
    assert far(in_pieces(model, ids, (7, 1, 5, 7))[0], whole) < SAME
    other[:, 12] += 1
    assert far(logits_of(model, other)[:, :12], whole[:, :12]) < SAME
    assert far(logits_of(model, other)[:, 12:], whole[:, 12:]) > 1e-3
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[:, :6] = 0
    padded = torch.cat([ids[:, :6], ids], 1)
    assert far(logits_of(model, padded, attention_mask=mask, **positions(model, mask))[:, 6:], whole) < SAME
    found, _ = in_pieces(model, padded, (9, 1, 16), mask, **positions(model, mask))
    assert far(found[:, 6:], whole) < SAME


def test_beams_and_greedy_search_go_on_as_a_full_pass_would():
    put(Path("model"), noise=1.0)
    run("model", Rwkv(channel_mix=True))
    model, ids = shaken(), tokens()
    made = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(made[:, 20:], torch.stack([logits_of(model, made[:, :at])[:, -1].argmax(-1) for at in range(20, made.shape[1])], 1))
    with_cache, without = (model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_it_is_saved_read_again_and_trained():
    put(Path("model"), noise=1.0)
    run("model", Rwkv(version=4, channel_mix=True))
    model = shaken()
    model.save_pretrained("again")
    assert torch.equal(logits_of(opened("again", dtype=torch.float32), tokens()), logits_of(model, tokens()))
    model.train()(tokens(), labels=tokens()).loss.backward()
    own = {name: parameter for name, parameter in model.named_parameters() if "mlp.effconvert." in name}
    assert len(own) == 7 * model.config.num_hidden_layers
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in own.values())


def test_checkpointed_gradients_of_padded_rows_are_the_plain_ones():
    put(Path("model"), noise=1.0)
    run("model", Rwkv(channel_mix=True))
    model, mask = shaken().train(), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            keep_no_activations(model)
        model.zero_grad()
        model(tokens(), attention_mask=mask, labels=tokens().where(mask == 1, -100)).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert all(torch.allclose(gradients[1][name], gradient, atol=1e-6) for name, gradient in gradients[0].items())


def test_a_cache_without_room_for_its_state_is_refused():
    put(Path("model"), noise=1.0)
    run("model", Rwkv(channel_mix=True))
    model = opened("out", dtype=torch.float32)
    with pytest.raises(ValueError, match="no room for the state of the mixer in layer 0; leave it out, or make one"):
        model(tokens(), **with_cache(model, DynamicCache()))


def test_texts_in_one_row_do_not_see_each_other():
    put(Path("model"), noise=1.0)
    run("model", Rwkv(channel_mix=True))
    model, ids = shaken(), tokens(rows=1)
    places = torch.cat([torch.arange(8), torch.arange(12)])[None]
    found = logits_of(model, ids, position_ids=places)
    assert far(found[:, :8], logits_of(model, ids[:, :8])) < SAME
    assert far(found[:, 8:], logits_of(model, ids[:, 8:])) < SAME


@pytest.mark.parametrize("kind", ["llama", "gpt2", "nemotron"])
def test_it_begins_near_the_ffn(kind):
    put(Path("model"), kind, noise=1.0)
    run("model", Rwkv(channel_mix=True, version="4"), place="both")
    run("model", Rwkv(version="4"), place="one")
    assert apart("one", "both")[0] < (1e-6 if kind == "nemotron" else 0.02 * apart("model", "one")[0])


def test_what_it_cannot_replace_is_refused():
    put(Path("mixtral"), "mixtral")
    with pytest.raises(ModelError, match="mixtral has experts in place of an FFN, which channel mixing cannot take the place of; leave out --channel-mix"):
        run("mixtral", Rwkv(channel_mix=True))
    put(Path("opt"), "opt")
    with pytest.raises(ModelError, match="a layer of opt has no module of its own for ffn"):
        run("opt", Rwkv(channel_mix=True))
    assert not Path("out").exists()
